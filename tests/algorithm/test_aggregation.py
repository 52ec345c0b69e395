import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_lightning.algorithm import AGGREGATIONS, aggregate, aggregate_sum, masked_mean, normalizer

LOSS = torch.tensor([[1.0, 2.0, 3.0, 9.0], [4.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
L = 10


def test_masked_mean_by_hand():
    x = torch.tensor([1.0, 2.0, 30.0], dtype=torch.float64)
    mask = torch.tensor([1.0, 1.0, 0.0])
    assert masked_mean(x, mask).item() == 3.0 / (2 + 1e-8)
    assert masked_mean(x, torch.zeros(3)).item() == 0.0
    assert masked_mean(torch.tensor([1.0, math.nan]), torch.tensor([1, 0])).item() == 1.0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 10 / 4),
        ("seq-mean-token-sum", (6 + 4) / 2),  # the third row has no token: it is no sequence
        ("seq-mean-token-mean", (2 + 4) / 2),
        ("seq-mean-token-sum-norm", 10 / L),
    ],
)
def test_aggregates_by_hand(mode, expected):
    assert aggregate(LOSS, MASK, mode, L).item() == pytest.approx(expected, rel=1e-7)


def test_aggregations_are_all_named():
    assert set(AGGREGATIONS) == {
        "token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-mean",
        "seq-mean-token-sum-norm",
    }


def test_the_constant_defaults_to_the_width():
    assert aggregate(LOSS, MASK, "seq-mean-token-sum-norm").item() == pytest.approx(10 / 4)


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_kept(mode, dtype):
    assert aggregate(LOSS.to(dtype), MASK, mode, L).dtype == dtype
    assert aggregate(LOSS.half(), MASK, mode, L).dtype == torch.float32


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_nothing_in_the_mask_gives_zero_and_no_gradient(mode):
    loss = torch.ones(2, 3, requires_grad=True)
    total = aggregate(loss, torch.zeros(2, 3), mode, L)
    total.backward()
    assert total.item() == 0.0
    assert torch.equal(loss.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_padding_changes_nothing(mode):
    padded_loss = torch.nn.functional.pad(LOSS, (0, 3, 0, 2), value=math.nan)
    padded_mask = torch.nn.functional.pad(MASK, (0, 3, 0, 2))
    assert aggregate(padded_loss, padded_mask, mode, L).item() == aggregate(LOSS, MASK, mode, L).item()


@st.composite
def minibatches(draw):
    """A minibatch, and a cut of it into micro-batches, each trimmed to the width it needs."""
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    loss = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    mask = (torch.rand(rows, width, generator=generator) < draw(st.floats(0.1, 0.9))).long()
    order = torch.randperm(rows, generator=generator)
    cuts = sorted(draw(st.sets(st.integers(1, rows), max_size=rows)) | {rows})
    pieces = [order[start:end] for start, end in zip([0, *cuts], cuts, strict=False)]
    return loss, mask, [piece for piece in pieces if len(piece)]


@given(minibatches(), st.sampled_from(AGGREGATIONS), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_any_cut_into_micro_batches_and_ranks_gives_the_same_loss_and_gradient(batch, mode, ranks):
    values, mask, pieces = batch
    whole = values.clone().requires_grad_()
    expected = aggregate(whole**2, mask, mode, L)
    expected.backward()

    cut = values.clone().requires_grad_()
    widths = [max(1, int(mask[piece].any(0).nonzero().max()) + 1) if mask[piece].any() else 1 for piece in pieces]
    by_rank = [[mask[p, :w] for p, w in list(zip(pieces, widths, strict=True))[rank::ranks]] for rank in range(ranks)]

    def summed_over_ranks(mine):
        locally = [normalizer(masks, mode, L, reduce=lambda own: counts.append(own) or own) for masks in by_rank]
        assert len(locally) == ranks
        return sum(counts)

    counts: list[torch.Tensor] = []
    divisor = normalizer(by_rank[0], mode, L, reduce=summed_over_ranks)
    total = 0.0
    for piece, width in zip(pieces, widths, strict=True):
        part = aggregate_sum(cut[piece, :width] ** 2, mask[piece, :width], mode) / divisor
        part.backward()
        total += part.item()
    assert total == pytest.approx(expected.item(), rel=1e-12, abs=1e-14)
    torch.testing.assert_close(cut.grad, whole.grad, rtol=1e-12, atol=1e-14)
    assert torch.equal(cut.grad[mask == 0], torch.zeros_like(cut.grad[mask == 0]))


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="unknown aggregation 'mean': use one of token-mean"):
        aggregate(LOSS, MASK, "mean")
    with pytest.raises(ValueError, match="needs max_length"):
        normalizer([MASK], "seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        normalizer([MASK], "token-mean", 0)
