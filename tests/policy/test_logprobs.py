from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spear_lightning.policy.logprobs import (
    ChunkedHead,
    checkpointed_stats_of_logits,
    chunk_tokens,
    stats_of_logits,
    token_logprobs_and_entropy,
)

TOKENS, WIDTH, VOCABULARY = 23, 8, 31


def _inputs(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    shift = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden, weight, shift if bias else None, targets


def _plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float):
    distribution = torch.distributions.Categorical(logits=nn.functional.linear(hidden, weight, bias) / temperature)
    return distribution.log_prob(targets), distribution.entropy()


@pytest.mark.parametrize("chunk_size", [1, 7, 23, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_the_plain_computation(chunk_size, temperature, bias):
    results, gradients = [], []
    weights = torch.linspace(-1, 2, TOKENS), torch.linspace(3, -1, TOKENS)
    for chunked in (True, False):
        hidden, weight, shift, targets = _inputs(bias=bias)
        if chunked:
            logps, entropies = token_logprobs_and_entropy(
                hidden, weight, targets, bias=shift, temperature=temperature, chunk_size=chunk_size
            )
        else:
            logps, entropies = _plain(hidden, weight, shift, targets, temperature)
        (logps * weights[0] + entropies * weights[1]).sum().backward()
        results.append((logps, entropies))
        gradients.append([p.grad for p in (hidden, weight, shift) if p is not None])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output", [0, 1])
def test_gradcheck_in_double_precision_through_each_output(output):
    hidden, weight, bias, targets = _inputs(torch.float64)
    hidden, targets = hidden[:5].detach().requires_grad_(), targets[:5]

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        pair = token_logprobs_and_entropy(hidden, weight, targets, bias=bias, temperature=0.7, chunk_size=2)
        return pair[output]

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_only_needed_gradients_are_computed():
    hidden, weight, _, targets = _inputs(bias=False)
    weight = weight.detach()  # a frozen head, as under LoRA
    token_logprobs_and_entropy(hidden, weight, targets)[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_bfloat16_inputs_get_a_float32_softmax():
    hidden, weight, bias, targets = _inputs(torch.bfloat16)
    logps, entropies = token_logprobs_and_entropy(hidden, weight, targets, bias=bias, chunk_size=5)
    assert logps.dtype == entropies.dtype == torch.float32
    logits = nn.functional.linear(hidden, weight, bias).float()
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logps, expected.log_prob(targets), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, expected.entropy(), rtol=1e-5, atol=1e-5)
    (logps.sum() + entropies.sum()).backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_under_autocast_as_a_linear_layer_would():
    hidden, weight, _, targets = _inputs(bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, _ = token_logprobs_and_entropy(hidden, weight, targets, chunk_size=4)
        logits = nn.functional.linear(hidden, weight)
    torch.testing.assert_close(logps, stats_of_logits(logits, targets)[0], rtol=1e-5, atol=1e-5)
    logps.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_extreme_logits_stay_finite():
    hidden, weight, _, targets = _inputs(bias=False)
    logps, entropies = token_logprobs_and_entropy(hidden * 1e4, weight, targets)
    (logps + entropies).sum().backward()
    assert all(torch.isfinite(x).all() for x in (logps, entropies, hidden.grad, weight.grad))
    assert (entropies >= -1e-3).all()


def test_no_tokens_give_empty_results_that_still_reach_the_parameters():
    hidden, weight, _, targets = _inputs(bias=False)
    logps, entropies = token_logprobs_and_entropy(hidden[:0], weight, targets[:0])
    assert logps.shape == entropies.shape == (0,)
    (logps.sum() + entropies.sum()).backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_nothing_of_size_tokens_by_vocabulary_is_made():
    tokens, vocabulary, chunk = 64, 500, 4
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    weight = torch.randn(vocabulary, WIDTH, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    with Watch():
        logps, entropies = token_logprobs_and_entropy(
            hidden, weight, torch.zeros(tokens, dtype=torch.long), chunk_size=chunk
        )
        (logps.sum() + entropies.sum()).backward()
    assert largest <= max(vocabulary * WIDTH, chunk * vocabulary)


def test_checkpointed_stats_equal_plain_ones():
    torch.manual_seed(0)
    logits, targets = torch.randn(9, VOCABULARY, requires_grad=True), torch.arange(9)
    plain = stats_of_logits(logits, targets, 0.5)
    gradient = torch.autograd.grad(plain[0].sum() + plain[1].sum(), logits)
    parts = checkpointed_stats_of_logits(logits, targets, 0.5, 4)
    torch.testing.assert_close(parts, plain)
    torch.testing.assert_close(torch.autograd.grad(parts[0].sum() + parts[1].sum(), logits), gradient)


def test_chunked_head_shares_parameters_and_still_gives_logits():
    plain = nn.Linear(WIDTH, VOCABULARY)
    head = ChunkedHead.sharing(plain)
    assert head.weight is plain.weight
    assert head.bias is plain.bias
    assert list(head.state_dict()) == list(plain.state_dict())
    hidden, targets = torch.randn(3, WIDTH), torch.tensor([1, 2, 3])
    torch.testing.assert_close(head(hidden), plain(hidden))
    torch.testing.assert_close(head(hidden, targets, 0.5), stats_of_logits(plain(hidden), targets, 0.5))


def test_chunks_are_bounded_by_bytes():
    assert chunk_tokens(1000, 16 * 1000 * 10) == 10
    assert chunk_tokens(10**9, 1) == 1


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    hidden, weight, _, targets = _inputs()
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs_and_entropy(hidden, weight, targets, temperature=temperature)
