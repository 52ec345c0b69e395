from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from spear_lightning.policy.logprobs import ChunkedHead
from spear_lightning.policy.policy import LoRA, Policy, Reference


def batch(lengths=(9, 4, 1, 6), vocabulary=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, vocabulary, mask.shape, generator=generator) * mask
    return ids, mask.long()


def plain_stats(policy: Policy, ids: torch.Tensor, mask: torch.Tensor, temperature: float):
    """One row at a time, no padding, plain logits."""
    logps, entropies = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for row, length in enumerate(mask.sum(-1).tolist()):
        if length > 1:
            logits = policy.model(input_ids=ids[row : row + 1, :length]).logits[0, :-1] / temperature
            distribution = torch.distributions.Categorical(logits=logits)
            logps[row, 1:length] = distribution.log_prob(ids[row, 1:length])
            entropies[row, 1:length] = distribution.entropy()
    return logps, entropies


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_stats_are_aligned_with_the_tokens_and_equal_the_plain_computation(tiny_policy, kind, temperature):
    policy = tiny_policy(kind, chunk_bytes=20_000)
    assert policy.chunked
    ids, mask = batch()
    stats = policy(ids, mask, temperature)
    with torch.no_grad():
        expected = plain_stats(policy, ids, mask, temperature)
    torch.testing.assert_close(tuple(stats), expected, rtol=1e-5, atol=1e-5)
    assert not stats.logps[:, 0].any()
    assert not stats.logps[mask == 0].any()
    assert expected[1].std() > 0.1, "the test model's distributions must differ from position to position"


def test_gradients_equal_the_plain_computation(tiny_policy):
    policy = tiny_policy("qwen2", chunk_bytes=20_000)
    ids, mask = batch()
    loss_mask = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5) * mask
    gradients = []
    for stats in (
        lambda: policy(ids, mask, 0.7, loss_mask=loss_mask),
        lambda: plain_stats(policy, ids, mask, 0.7),
    ):
        policy.zero_grad()
        logps, entropies = stats()
        ((logps * 1.5 - entropies * 0.3) * loss_mask).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_what_is_not_wanted_is_zero_without_gradient_and_spared(tiny_policy):
    policy = tiny_policy()
    ids, mask = batch()
    loss_mask = torch.zeros_like(mask)
    loss_mask[0, 3] = loss_mask[1, 1] = loss_mask[0, 0] = 1  # position 0 has no prediction, wanted or not
    rows = []
    policy.causal_lm.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    stats = policy(ids, mask, loss_mask=loss_mask)
    assert rows == [2]
    assert stats.logps.nonzero().tolist() == stats.entropies.nonzero().tolist() == [[0, 3], [1, 1]]
    everywhere = policy(ids, mask)
    torch.testing.assert_close(stats.logps[0, 3], everywhere.logps[0, 3])
    stats.logps[loss_mask == 0].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


def test_a_batch_in_which_nothing_is_wanted_gives_zero_gradients(tiny_policy):
    policy = tiny_policy()
    ids, mask = batch()
    stats = policy(ids, mask, loss_mask=torch.zeros_like(mask))
    (stats.logps.sum() + stats.entropies.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_padding_on_the_left_changes_nothing(tiny_policy):
    policy = tiny_policy()
    ids, mask = batch((5, 5))
    padded_ids = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), ids], 1)
    padded_mask = torch.cat([torch.zeros(2, 3, dtype=mask.dtype), mask], 1)
    left = policy(padded_ids, padded_mask, loss_mask=torch.cat([padded_mask[:, :4] * 0, mask[:, 1:]], 1))
    torch.testing.assert_close(left.logps[:, 4:], policy(ids, mask).logps[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": None},
        {"model_type": "granite", "logits_scaling": 8.0},
        {"model_type": "cohere", "logit_scale": 0.25},
    ],
    ids=lambda changes: changes["model_type"],
)
def test_heads_that_are_not_plain_use_the_models_own_logits(tiny_policy, changes):
    policy = tiny_policy("llama", config=changes, attention="eager")
    assert not policy.chunked
    ids, mask = batch()
    policy_stats = policy(ids, mask, 0.8)
    with torch.no_grad():
        expected = plain_stats(policy, ids, mask, 0.8)
    torch.testing.assert_close(tuple(policy_stats), expected, rtol=1e-5, atol=1e-5)
    (policy_stats.logps.sum() - policy_stats.entropies.sum()).backward()
    assert all(p.grad is not None for p in policy.parameters())
    nothing = policy(ids, mask, loss_mask=torch.zeros_like(mask))
    assert not nothing.logps.any()


def test_dropout_is_taken_out_so_that_the_ratio_is_one(tiny_policy):
    policy = tiny_policy("qwen2", config={"attention_dropout": 0.5})
    assert policy.training
    ids, mask = batch()
    assert torch.equal(policy(ids, mask).logps, policy(ids, mask).logps)


def test_gradient_checkpointing_is_at_work_and_changes_no_gradient(tiny_policy, tiny_model_folder):
    gradients = []
    for on in (False, True):
        policy = Policy(model=tiny_model_folder, gradient_checkpointing=on)  # loaded models come in evaluation mode
        calls = []
        layer = policy.causal_lm.base_model.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        ids, mask = batch()
        policy(ids, mask).logps.sum().backward()
        assert len(calls) == (2 if on else 1)
        gradients.append([p.grad for p in policy.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_fresh_weights_depend_on_the_seed_only(tiny_policy):
    torch.manual_seed(1)
    first = tiny_policy(seed=3)
    state = torch.get_rng_state()
    second, other = tiny_policy(seed=3), tiny_policy(seed=4)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_saved_and_loaded_again(tiny_policy, tmp_path: Path, kind):
    policy = tiny_policy(kind)
    policy.save_pretrained(tmp_path)
    ids, mask = batch()
    again = Policy(model=str(tmp_path))
    assert torch.equal(again(ids, mask).logps, policy(ids, mask).logps)
    assert again.fingerprint() == policy.fingerprint()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(stock(input_ids=ids).logits, policy.model(input_ids=ids).logits)
    assert again.tokenizer("go to desk 1").input_ids == policy.tokenizer("go to desk 1").input_ids


def test_state_dict_is_the_stock_models(tiny_policy, tiny_model_folder):
    policy = Policy(model=tiny_model_folder)
    stock = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    assert set(policy.state_dict()) == {f"model.{name}" for name in stock.state_dict()}
    head = policy.causal_lm.get_output_embeddings()
    assert isinstance(head, ChunkedHead)
    assert head.weight is policy.causal_lm.get_input_embeddings().weight, "still tied"


def test_bfloat16(tiny_policy):
    policy = tiny_policy(dtype="bfloat16")
    ids, mask = batch()
    stats = policy(ids, mask)
    assert stats.logps.dtype == torch.float32
    stats.logps.sum().backward()
    assert {p.grad.dtype for p in policy.parameters()} == {torch.bfloat16}


def test_casting_the_weights_leaves_the_rotary_frequencies(tiny_policy):
    policy = tiny_policy()
    before = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    assert any("inv_freq" in name for name in before)
    torch.nn.ModuleDict({"policy": policy}).bfloat16()  # as a precision plugin casts the module around it
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    for name, buffer in policy.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)


def test_fingerprints_tell_models_and_tokenizers_apart(tiny_policy, tiny_model_folder):
    prints = [
        tiny_policy("qwen2").fingerprint(),
        tiny_policy("llama").fingerprint(),
        tiny_policy("qwen2", config={"num_hidden_layers": 1}).fingerprint(),
    ]
    text = (Path(tiny_model_folder) / "tokenizer.json").read_text().replace('"happens"', '"up"')
    (Path(tiny_model_folder) / "tokenizer.json").write_text(text)
    prints.append(Policy(model=tiny_model_folder).fingerprint())
    assert len({json.dumps(p) for p in prints}) == 4


class TestLoRA:
    def test_only_adapters_are_trained_and_merging_keeps_the_policy(self, tiny_policy, tmp_path):
        policy = tiny_policy("llama", lora=LoRA(rank=2, alpha=4))
        assert policy.chunked
        ids, mask = batch()
        base = policy(ids, mask).logps.detach()
        policy(ids, mask).logps.sum().backward()
        trained = {name for name, p in policy.named_parameters() if p.grad is not None}
        assert trained
        assert all("lora_" in name for name in trained)
        torch.manual_seed(0)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        adapted = policy(ids, mask).logps
        assert (adapted - base).abs().max() > 0.01
        policy.save_pretrained(tmp_path / "merged", merge_lora=True)
        merged = Policy(model=str(tmp_path / "merged"))
        torch.testing.assert_close(merged(ids, mask).logps, adapted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(policy(ids, mask).logps, adapted)
        policy.save_pretrained(tmp_path / "adapters")
        with pytest.raises(ValueError, match=r"policy\.model.*adapters"):
            Policy(model=str(tmp_path / "adapters"))

    def test_with_gradient_checkpointing(self, tiny_policy):
        policy = tiny_policy("qwen2", lora=LoRA(rank=2), gradient_checkpointing=True)
        ids, mask = batch()
        policy(ids, mask).logps.sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in policy.parameters())

    def test_an_adapted_head_is_not_plain(self, tiny_policy):
        policy = tiny_policy("llama", lora=LoRA(rank=2, target_modules=["q_proj", "lm_head"]))
        assert not policy.chunked
        ids, mask = batch()
        with torch.no_grad():
            torch.testing.assert_close(
                tuple(policy(ids, mask)), plain_stats(policy, ids, mask, 1.0), rtol=1e-5, atol=1e-5
            )

    def test_bad_settings(self, tiny_policy):
        with pytest.raises(ValueError, match=r"LoRA\.rank"):
            LoRA(rank=0)
        with pytest.raises(ValueError, match=r"lora\.target_modules"):
            tiny_policy(lora=LoRA(target_modules=["no_such_layer"]))


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_the_reference_stays_what_the_policy_was(tiny_policy, lora):
    policy = tiny_policy("llama", lora=lora)
    ids, mask = batch()
    before = policy(ids, mask).logps.detach()
    owner = nn.ModuleDict({"policy": policy, "reference": Reference(policy)})
    assert not [name for name in owner.state_dict() if name.startswith("reference")]
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    owner.train()
    after = owner["reference"](ids, mask)
    assert not after.logps.requires_grad
    torch.testing.assert_close(after.logps, before)
    moved = policy(ids, mask).logps
    assert (moved - before).abs().max() > 1e-3, "the policy itself has changed, adapters at work again"
    assert moved.requires_grad
    owner.to(torch.float64)
    assert owner["reference"](ids, mask).logps.dtype == torch.float64, "the reference moves with its owner"


class TestBadInput:
    """One message that names the key and what is wrong."""

    def test_model_and_config_exclude_each_other(self, tiny_tokenizer):
        for arguments in ({}, {"model": tiny_tokenizer, "config": {"model_type": "qwen2"}}):
            with pytest.raises(ValueError, match=r"policy\.model.*policy\.config"):
                Policy(**arguments)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"policy\.model: there is no folder '.*nowhere'"):
            Policy(model=str(tmp_path / "nowhere"))

    def test_hub_id_without_network(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=r"policy\.model: there is no folder 'acme/none'.*network"):
            Policy(model="acme/none")

    def test_folder_without_a_model(self, tmp_path):
        with pytest.raises(ValueError, match=r"policy\.model: .*config\.json"):
            Policy(model=str(tmp_path))

    def test_corrupt_weights(self, tiny_model_folder):
        (Path(tiny_model_folder) / "model.safetensors").write_bytes(b"not weights")
        with pytest.raises(ValueError, match=r"policy\.model: cannot load"):
            Policy(model=tiny_model_folder)

    def test_weights_of_another_model(self, tiny_policy, tiny_model_folder, tmp_path):
        tiny_policy("qwen2", config={"num_hidden_layers": 1}).save_pretrained(tmp_path / "shallow")
        shutil.copy(tmp_path / "shallow" / "model.safetensors", tiny_model_folder)
        with pytest.raises(ValueError, match=r"policy\.model: .* lacks \d+ weights"):
            Policy(model=tiny_model_folder)

    def test_tokenizer_without_end_of_sequence(self, tiny_model_folder):
        file = Path(tiny_model_folder) / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        del settings["eos_token"]
        file.write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=r"policy\.model: .*end-of-sequence"):
            Policy(model=tiny_model_folder)

    def test_tokenizer_larger_than_the_model(self, tiny_policy):
        with pytest.raises(ValueError, match=r"policy\.tokenizer: .*only 10 entries"):
            tiny_policy(config={"vocab_size": 10})

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"hidden_siz": 32}, r"policy\.config\.hidden_siz: .*did you mean hidden_size"),
            ({"model_type": "qwen9"}, r"policy\.config\.model_type: .*qwen9"),
            ({"model_type": None}, r"policy\.config: needs"),
            ({"hidden_size": "wide"}, r"policy\.config: .*hidden_size"),
        ],
    )
    def test_fresh_model(self, tiny_policy, config, message):
        with pytest.raises(ValueError, match=message):
            tiny_policy(config=config)

    def test_fresh_model_needs_a_tokenizer(self):
        with pytest.raises(ValueError, match=r"policy\.tokenizer"):
            Policy(config={"model_type": "qwen2"})

    def test_settings(self, tiny_policy):
        with pytest.raises(ValueError, match=r"Policy\.dtype must be one of float32, bfloat16, not float8"):
            tiny_policy(dtype="float8")
        with pytest.raises(ValueError, match="no_such_attention"):
            tiny_policy(attention="no_such_attention")
        with pytest.raises(ValueError, match="temperature"):
            tiny_policy()(*batch(), temperature=0.0)
