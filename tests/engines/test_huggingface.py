"""The in-process engine against the plain computation: full prompts, one at a time, no cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from spear_lightning.engines.base import Completion, Request, RolloutEngine, Sampling
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.policy.policy import LoRA, Policy
from spear_lightning.utils.randomness import stream_seed, uniforms

VOCABULARY = 41
STOPS = (1, 4, 6, 8)


def request(session: str, ids, seed: int = 0, **sampling) -> Request:
    values = {"max_new_tokens": 6, "stop_ids": STOPS, **sampling}
    return Request(session, np.asarray(ids, np.int32), Sampling(**values), seed)


@torch.no_grad()
def one_by_one(policy: Policy, asked: Request) -> Completion:
    """What a request must give: the whole sequence through the stock model for each token, drawn in plain numpy."""
    sampling, ids, logps, entropies = asked.sampling, list(asked.prompt_ids), [], []
    finish = "length"
    policy.eval()
    for uniform in uniforms(asked.seed, sampling.max_new_tokens):
        logits = policy.causal_lm(input_ids=torch.tensor([ids])).logits[0, -1].double()
        probabilities = torch.softmax(logits / (sampling.temperature or 1.0), -1).numpy()
        weights = probabilities.copy()
        if sampling.top_k:
            weights[np.argsort(-weights)[sampling.top_k :]] = 0
        if sampling.top_p < 1:
            order = np.argsort(-weights)
            keep = np.cumsum(weights[order]) - weights[order] < sampling.top_p * weights.sum()
            weights[order[~keep]] = 0
        token = int(np.argmax(np.cumsum(weights) > uniform * weights.sum()))
        if sampling.temperature == 0:
            token = int(probabilities.argmax())
        ids.append(token)
        logps.append(np.log(probabilities[token]))
        entropies.append(-(probabilities * np.log(probabilities)).sum())
        if token in sampling.stop_ids:
            finish = "stop"
            break
    policy.train()
    new = np.array(ids[len(asked.prompt_ids) :], np.int32)
    return Completion(new, np.array(logps, np.float32), np.array(entropies, np.float32), finish, 0)


def check(given: Completion, expected: Completion) -> None:
    assert given.ids.tolist() == expected.ids.tolist()
    assert given.finish == expected.finish
    assert given.ids.dtype == np.int32
    np.testing.assert_allclose(given.logps, expected.logps, atol=2e-5)
    np.testing.assert_allclose(given.entropies, expected.entropies, atol=2e-5)


def engine_of(policy: Policy, **settings) -> HuggingFaceEngine:
    engine = HuggingFaceEngine(**settings)
    engine.sync(policy, 3)
    return engine


KINDS: dict[str, tuple[str, dict, dict]] = {
    "qwen2": ("qwen2", {}, {}),
    "llama": ("llama", {}, {}),
    "eager": ("qwen2", {}, {"attention": "eager"}),
    "sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, {}),
    "mistral": ("llama", {"model_type": "mistral", "sliding_window": 7}, {}),
    "gemma2": (
        "llama",
        {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 7},
        {"attention": "eager"},
    ),
    "gpt2": ("", {}, {}),
    "lora": ("qwen2", {}, {"lora": LoRA(rank=2, dropout=0.5)}),
    "checkpointing": ("qwen2", {}, {"gradient_checkpointing": True}),
}


def make(tiny_policy: Callable[..., Policy], kind: str) -> Policy:
    base, config, settings = KINDS[kind]
    if kind == "gpt2":
        config = {
            "model_type": "gpt2",
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "initializer_range": 0.3,
        }
        return tiny_policy(base, replace=config, **settings)
    policy = tiny_policy(base, config=config, **settings)
    if settings.get("lora"):
        torch.manual_seed(0)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                # Enough to change what is drawn; larger ones make a model that amplifies rounding beyond the bound.
                torch.nn.init.normal_(parameter, std=0.05)
    return policy


def play(policy: Policy, engine: RolloutEngine, *, sessions: int = 9, turns: int = 4, stepwise: bool = False) -> int:
    """Ragged episodes that come and go, every completion checked; the number of cached tokens that could be used."""
    rng = np.random.default_rng(5)
    opening = [rng.integers(3, VOCABULARY, rng.integers(1, 12)) for _ in range(3)]
    contexts = {f"s{number}": opening[number % 3] for number in range(sessions)}
    for turn in range(turns):
        order = rng.permutation(sorted(contexts))
        asked = []
        for name in order:
            context = contexts[name]
            if stepwise and turn:  # shares the beginning of its last prompt only, and is shorter now and then
                context = np.concatenate([context[: rng.integers(0, len(context) + 1)], rng.integers(3, VOCABULARY, 5)])
                contexts[name] = context
            asked.append(request(name, context, stream_seed(name, turn), temperature=0.8, max_new_tokens=3 + turn))
        for one, given in zip(asked, engine.generate(asked), strict=True):
            check(given, one_by_one(policy, one))
            assert given.weight_version == 3
            seen = rng.integers(3, VOCABULARY, rng.integers(0, 9))
            contexts[one.session] = np.concatenate([one.prompt_ids, given.ids, seen])
        if turn == 1:
            for name in ("s1", "s5"):
                engine.end(name)
                del contexts[name]
            contexts["late"] = opening[0]
        if turn == 2:  # an old name with another prompt, without having been ended
            contexts["s2"] = rng.integers(3, VOCABULARY, 4)
    return len(contexts)


@pytest.mark.parametrize("kind", list(KINDS))
def test_episodes_that_come_and_go_equal_the_plain_computation(tiny_policy, kind):
    policy = make(tiny_policy, kind)
    if kind in ("qwen2", "llama", "lora", "checkpointing"):
        assert policy.chunked
    if kind == "gemma2":
        assert not policy.chunked
    play(policy, engine_of(policy))
    assert policy.training
    assert all(module.training for module in policy.modules())


@pytest.mark.parametrize("settings", [{"max_batch": 4}, {"max_batch": 1}, {"keep_cache": False}], ids=str)
@pytest.mark.parametrize("stepwise", [False, True])
def test_whatever_the_settings(tiny_policy, settings, stepwise):
    policy = tiny_policy("llama")
    play(policy, engine_of(policy, **settings), stepwise=stepwise)


def test_prompts_that_share_only_their_beginning_with_the_cache(tiny_policy):
    policy = tiny_policy("qwen2")
    play(policy, engine_of(policy), stepwise=True)


class Counting:
    """Counts the token ids that enter a model, padding included."""

    def __init__(self, policy: Policy) -> None:
        self.fed = 0
        embedding = policy.causal_lm.get_input_embeddings()
        embedding.register_forward_hook(lambda module, inputs, output: self._count(inputs[0]))

    def _count(self, ids: torch.Tensor) -> None:
        self.fed += ids.numel()

    def since(self) -> int:
        fed, self.fed = self.fed, 0
        return fed


def test_only_what_is_new_is_fed(tiny_policy):
    policy = tiny_policy()
    engine, counting = engine_of(policy), Counting(policy)
    prompt = np.arange(3, 33)
    given = engine.generate([request("a", prompt, max_new_tokens=4, stop_ids=())])[0]
    assert counting.since() == 30 + 3  # the last token drawn is not fed
    longer = np.concatenate([prompt, given.ids, [5, 6]])
    engine.generate([request("a", longer, max_new_tokens=1)])
    assert counting.since() == 1 + 2
    engine.generate([request("a", longer, max_new_tokens=1)])
    assert counting.since() == 1, "all is known: one token to start from"
    engine.generate([request("a", np.concatenate([longer[:20], [9]]), max_new_tokens=1)])
    assert counting.since() == 1, "cut back to the common beginning"
    engine.end("a")
    engine.generate([request("a", prompt, max_new_tokens=1)])
    assert counting.since() == 30


def test_a_group_that_starts_from_one_prompt_has_it_computed_once(tiny_policy):
    policy = tiny_policy()
    engine, counting = engine_of(policy), Counting(policy)
    asked = [request(f"{prompt}{i}", [prompt] * 20, seed=i, max_new_tokens=1) for prompt in (5, 7) for i in range(4)]
    given = engine.generate(asked)
    assert counting.since() == 2 * 20
    for one, completion in zip(asked, given, strict=True):
        check(completion, one_by_one(policy, one))


def test_a_long_prompt_does_not_make_the_others_long(tiny_policy):
    policy = tiny_policy()
    engine, counting = engine_of(policy), Counting(policy)
    engine.generate([request(str(i), [5 + i] * (300 if i == 3 else 10), max_new_tokens=1) for i in range(16)])
    assert counting.since() == 300 + 15 * 10


def test_rows_that_are_done_stop_costing(tiny_policy):
    policy = tiny_policy()
    engine, counting = engine_of(policy), Counting(policy)
    asked = [request(str(i), [5, 6, 7 + i], seed=i, max_new_tokens=40 if i == 5 else 2, stop_ids=()) for i in range(8)]
    given = engine.generate(asked)
    assert counting.since() <= 8 * 3 + 8 + 39
    for one, completion in zip(asked, given, strict=True):
        check(completion, one_by_one(policy, one))


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_what_is_drawn_does_not_depend_on_the_batch(tiny_policy, kind):
    policy = tiny_policy(kind)
    rng = np.random.default_rng(0)
    asked = [request(f"s{i}", rng.integers(3, VOCABULARY, 3 + 5 * i % 13), stream_seed(i)) for i in range(12)]
    together = engine_of(policy).generate(asked)
    for order in (np.arange(12)[::-1], rng.permutation(12)[:7], [4]):
        engine = engine_of(policy, max_batch=5)
        for number, given in zip(order, engine.generate([asked[number] for number in order]), strict=True):
            check(given, together[number])
    assert len({tuple(given.ids) for given in together}) > 6


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_log_probabilities_are_the_policys(tiny_policy, temperature):
    policy = tiny_policy()
    engine = engine_of(policy)
    prompts = [np.arange(3, 3 + n) for n in (4, 9, 2)]
    asked = [request(str(i), p, i, temperature=temperature, stop_ids=()) for i, p in enumerate(prompts)]
    for one, given in zip(asked, engine.generate(asked), strict=True):
        ids = torch.from_numpy(np.concatenate([one.prompt_ids, given.ids]))[None].long()
        stats = policy(ids, torch.ones_like(ids), temperature)
        start = len(one.prompt_ids)
        np.testing.assert_allclose(given.logps, stats.logps[0, start:].detach().numpy(), atol=1e-5)
        np.testing.assert_allclose(given.entropies, stats.entropies[0, start:].detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"top_k": 4, "top_p": 0.8, "temperature": 1.3},
        {"top_p": 1e-9},
    ],
    ids=str,
)
def test_greedy_and_truncated_sampling(tiny_policy, sampling):
    policy = tiny_policy()
    mixed = [request("plain", [5, 6, 7], 1), request("special", [5, 6, 7], 2, **sampling)]
    for one, given in zip(mixed, engine_of(policy).generate(mixed), strict=True):
        check(given, one_by_one(policy, one))


def test_no_room_and_little_room(tiny_policy):
    policy = tiny_policy(config={"max_position_embeddings": 16})
    engine = engine_of(policy)
    lengths = (15, 16, 17, 30, 4)
    asked = [request(str(n), [5] * n, max_new_tokens=6, stop_ids=()) for n in lengths]
    given = engine.generate(asked)
    assert [len(completion.ids) for completion in given] == [1, 0, 0, 0, 6]
    assert {completion.finish for completion in given} == {"length"}
    assert all(len(c.logps) == len(c.entropies) == len(c.ids) for c in given)
    assert [len(c.ids) for c in engine_of(policy, max_length=6).generate(asked)] == [0, 0, 0, 0, 2]
    assert engine.generate([]) == []


class TestWeights:
    def test_generating_before_the_first_sync_is_refused(self):
        with pytest.raises(RuntimeError, match="before sync"):
            HuggingFaceEngine().generate([request("a", [5])])

    def test_generating_with_changed_weights_is_refused_until_sync(self, tiny_policy):
        policy = tiny_policy()
        engine, optimizer = engine_of(policy), torch.optim.SGD(policy.parameters(), lr=1.0)
        asked = request("a", np.arange(3, 20))
        engine.generate([asked])
        ids = torch.arange(3, 20)[None]
        policy(ids, torch.ones_like(ids)).logps.mean().neg().backward()  # nothing of inference mode leaks
        optimizer.step()
        with pytest.raises(RuntimeError, match="sync"):
            engine.generate([asked])
        engine.sync(policy, 4)
        given = engine.generate([asked])[0]
        check(given, one_by_one(policy, asked))
        assert given.weight_version == 4

    @pytest.mark.parametrize("forget", ["sync", "sleep", "end"])
    def test_forgotten_caches_are_not_used(self, tiny_policy, forget):
        policy = tiny_policy()
        engine, counting = engine_of(policy), Counting(policy)
        asked = [request("a", [5] * 20, max_new_tokens=1)]
        engine.generate(asked)
        counting.since()
        {"sync": lambda: engine.sync(policy, 4), "sleep": engine.sleep, "end": lambda: engine.end("a")}[forget]()
        engine.end("unknown")
        engine.wake()
        engine.generate(asked)
        assert counting.since() == 20

    def test_closed(self, tiny_policy):
        engine = engine_of(tiny_policy())
        engine.close()
        with pytest.raises(RuntimeError, match="sync"):
            engine.generate([request("a", [5])])

    def test_another_policy(self, tiny_policy):
        engine = engine_of(tiny_policy("qwen2"))
        asked = request("a", [5, 6, 7])
        engine.generate([asked])
        other = tiny_policy("llama")
        engine.sync(other, 4)
        check(engine.generate([asked])[0], one_by_one(other, asked))


def test_an_interrupted_call_leaves_nothing_wrong_behind(tiny_policy):
    policy = tiny_policy()
    engine = engine_of(policy)
    prompts = {name: np.arange(3, 3 + n) for name, n in (("a", 9), ("b", 17))}
    engine.generate([request(name, prompt) for name, prompt in prompts.items()])
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    hook = policy.causal_lm.base_model.layers[1].mlp.act_fn.register_forward_hook(fail)
    changed = {name: np.concatenate([prompt[:5], [30, 31, 32]]) for name, prompt in prompts.items()}
    other = [request(name, prompt, stop_ids=()) for name, prompt in changed.items()]
    with pytest.raises(KeyboardInterrupt):
        engine.generate(other)
    hook.remove()
    assert policy.training
    # The interrupted call has overwritten keys and values that the first one had left.
    for asked in ([request(name, prompt) for name, prompt in reversed(prompts.items())], other):
        for one, given in zip(asked, engine.generate(asked), strict=True):
            check(given, one_by_one(policy, one))


def test_modes_are_restored_module_by_module(tiny_policy):
    policy = tiny_policy()
    policy.causal_lm.base_model.layers[0].eval()
    before = [module.training for module in policy.modules()]
    engine_of(policy).generate([request("a", [5])])
    assert [module.training for module in policy.modules()] == before


def test_bfloat16(tiny_policy):
    policy = tiny_policy(dtype="bfloat16")
    engine = engine_of(policy)
    asked = request("a", np.arange(3, 20), stop_ids=())
    given = engine.generate([asked])[0]
    ids = torch.from_numpy(np.concatenate([asked.prompt_ids, given.ids]))[None].long()
    logps = policy(ids, torch.ones_like(ids)).logps[0, -len(given.ids) :]
    np.testing.assert_allclose(given.logps, logps.detach().numpy(), atol=0.2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([request("a", [])], "prompt is empty"),
        ([request("a", [5]), request("a", [6])], "same session"),
        ([request("a", [5, 1000])], "token id 1000"),
        ([request("a", [-1, 5])], "token id -1"),
    ],
)
def test_malformed_requests(tiny_policy, asked, message):
    with pytest.raises(ValueError, match=message):
        engine_of(tiny_policy()).generate(asked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be at least 0 and below inf, not -1.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
    ],
)
def test_sampling_out_of_range(settings, message):
    with pytest.raises(ValueError, match=rf"Sampling\.{message}"):
        Sampling(**{"max_new_tokens": 1, **settings})


def test_models_without_an_ordinary_cache_are_refused(tiny_policy):
    config = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        engine_of(tiny_policy(replace=config))


@pytest.mark.parametrize("settings", [{"max_batch": 0}, {"max_length": 1}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=rf"HuggingFaceEngine\.{next(iter(settings))} must be at least"):
        HuggingFaceEngine(**settings)


def test_it_is_a_rollout_engine():
    assert isinstance(HuggingFaceEngine(), RolloutEngine)
