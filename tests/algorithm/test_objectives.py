import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_lightning.algorithm import (
    ClipCov,
    KLCov,
    PPOClip,
    aggregate,
    clip_cov,
    covariance,
    k3_kl,
    kl_cov,
    ppo_clip,
    truncated_importance_weights,
)


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def ratios(*values):
    """Log-probabilities with the given ratios to old ones of -1."""
    return row(*(math.log(value) - 1 for value in values)), torch.full((1, len(values)), -1.0, dtype=torch.float64)


def test_ppo_clip_by_hand():
    logp, old = ratios(0.5, 0.5, 1.5, 1.5, 1.25)
    adv = row(2.0, -2.0, 2.0, -2.0, 2.0)
    out = ppo_clip(logp, old, adv, torch.ones(1, 5))
    # max(−A·r, −A·clip(r, 0.8, 1.28))
    torch.testing.assert_close(out.loss, row(-1.0, 1.6, -2.56, 3.0, -2.5))
    assert out.clip_fraction.item() == pytest.approx(2 / 5)
    assert out.approx_kl.item() == pytest.approx(-(2 * math.log(0.5) + 2 * math.log(1.5) + math.log(1.25)) / 5)
    assert out.cov_fraction.item() == 0.0


def test_dual_clip_bounds_what_a_bad_token_can_cost():
    logp, old = ratios(15.0, 15.0)
    adv = row(-1.0, 1.0)
    mask = torch.ones(1, 2)
    torch.testing.assert_close(ppo_clip(logp, old, adv, mask).loss, row(10.0, -1.28))
    torch.testing.assert_close(ppo_clip(logp, old, adv, mask, dual_clip=3.0).loss, row(3.0, -1.28))
    torch.testing.assert_close(ppo_clip(logp, old, adv, mask, dual_clip=None).loss, row(15.0, -1.28))


def test_log_ratio_is_clamped():
    out = ppo_clip(row(50.0, -50.0), row(0.0, 0.0), row(-1.0, -1.0), torch.ones(1, 2), dual_clip=None)
    torch.testing.assert_close(out.loss, row(math.exp(20), 0.8))
    assert kl_cov(row(50.0), row(0.0), row(1.0), torch.ones(1, 1)).loss.item() == pytest.approx(-math.exp(20) + 20)


def test_gradient_is_that_of_the_unclipped_side():
    logp, old = ratios(1.0, 1.5, 0.5)
    logp.requires_grad_()
    ppo_clip(logp, old, row(1.0, 1.0, 1.0), torch.ones(1, 3)).loss.sum().backward()
    torch.testing.assert_close(logp.grad, row(-1.0, 0.0, -0.5))


# A − mean = (1, −1, 3, −3), logπ − mean = (1, −1, 2, −2): covariances 1, 1, 6, 6.
COV_ADV = row(2.0, 0.0, 4.0, -2.0)
COV_LOGP = row(-1.0, -3.0, 0.0, -4.0)


def test_clip_cov_with_ratio_one_drops_every_eligible_token():
    out = clip_cov(COV_LOGP, COV_LOGP.clone(), COV_ADV, torch.ones(1, 4), ratio=1.0, lower=0.9, upper=6.5)
    assert out.loss.tolist() == [[0.0, 0.0, 0.0, 0.0]]
    out = clip_cov(COV_LOGP, COV_LOGP.clone(), COV_ADV, torch.ones(1, 4), ratio=1.0, lower=2.0, upper=40.0)
    torch.testing.assert_close(out.loss, row(-2.0, 0.0, 0.0, 0.0))  # the second is zero by its advantage
    assert out.cov_fraction.item() == pytest.approx(0.5)
    out = clip_cov(COV_LOGP, COV_LOGP.clone(), COV_ADV, torch.ones(1, 4), ratio=1.0, lower=0.5, upper=5.0)
    torch.testing.assert_close(out.loss, row(0.0, 0.0, -4.0, 2.0))


def test_clip_cov_bounds_are_exclusive():
    mask = torch.ones(1, 4)
    tight = {"ratio": 1.0, "lower": 1.0 + 1e-7, "upper": 6.0 - 1e-7}
    assert clip_cov(COV_LOGP, COV_LOGP.clone(), COV_ADV, mask, **tight).cov_fraction.item() == 0.0


def test_clip_cov_leaves_tokens_clipped_by_the_ratio_alone():
    old = COV_LOGP - row(0.0, 0.0, math.log(2.0), 0.0)  # the third token has ratio 2 and a positive advantage
    out = clip_cov(COV_LOGP, old, COV_ADV, torch.ones(1, 4), ratio=1.0, lower=2.0)
    torch.testing.assert_close(out.loss, row(-2.0, 0.0, -4 * 1.28, 0.0))
    assert out.clip_fraction.item() == pytest.approx(0.25)
    assert out.cov_fraction.item() == pytest.approx(0.25)


def test_clip_cov_looks_only_inside_the_mask():
    pad = torch.nn.functional.pad
    inside = clip_cov(COV_LOGP, COV_LOGP.clone(), COV_ADV, torch.ones(1, 4), ratio=1.0, lower=2.0)
    logp = pad(COV_LOGP, (0, 2), value=-500.0)
    padded = clip_cov(
        logp, logp.clone(), pad(COV_ADV, (0, 2), value=70.0), pad(torch.ones(1, 4), (0, 2)), ratio=1.0, lower=2.0
    )
    torch.testing.assert_close(padded.loss[:, :4], inside.loss)
    assert padded.cov_fraction.item() == pytest.approx(inside.cov_fraction.item())


def test_clip_cov_draws_its_share_uniformly_and_reproducibly():
    generator = torch.Generator().manual_seed(3)
    logp = torch.randn(1, 200, generator=generator, dtype=torch.float64)
    adv = logp.clone()  # covariance is a square: half of the tokens or so lie between the bounds
    mask = torch.ones(1, 200)

    def drawn(seed):
        source = torch.Generator().manual_seed(seed)
        out = clip_cov(logp, logp.clone(), adv, mask, ratio=0.05, lower=0.3, upper=40.0, generator=source)
        return (out.loss == 0).flatten()

    eligible = (clip_cov(logp, logp.clone(), adv, mask, ratio=1.0, lower=0.3, upper=40.0).loss == 0).flatten()
    assert drawn(0).sum() == 10  # ⌊0.05·200⌋
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    times = sum(drawn(seed).long() for seed in range(400))
    assert torch.equal(times > 0, eligible)  # each eligible token is drawn sooner or later, and none else
    assert times[eligible].float().std() < 2 * (400 * 10 / eligible.sum()) ** 0.5


def test_clip_cov_drops_one_token_at_least():
    out = clip_cov(COV_LOGP, COV_LOGP.clone(), COV_ADV, torch.ones(1, 4), ratio=0.001, lower=2.0)
    assert out.cov_fraction.item() == pytest.approx(0.25)


def test_kl_cov_by_hand():
    old = COV_LOGP - row(0.1, -0.1, 0.2, -0.2)
    out = kl_cov(COV_LOGP, old, COV_ADV, torch.ones(1, 4), ratio=0.5, coef=3.0)
    plain = -COV_ADV * row(0.1, -0.1, 0.2, -0.2).exp()
    torch.testing.assert_close(out.loss, plain + row(0.0, 0.0, 0.6, 0.6))
    assert out.cov_fraction.item() == pytest.approx(0.5)
    out = kl_cov(COV_LOGP, old, COV_ADV, torch.ones(1, 4), ratio=0.01, coef=3.0)  # one at least; a tie: the earlier
    torch.testing.assert_close(out.loss, plain + row(0.0, 0.0, 0.6, 0.0))


def test_covariance_state_by_state_by_hand():
    """Two states of two actions each; equal advantages, as those of replayed successes are."""
    probabilities = torch.tensor([[0.8, 0.5]], dtype=torch.float64)
    entropies = -(probabilities * probabilities.log() + (1 - probabilities) * (1 - probabilities).log())
    logp, ones = probabilities.log(), torch.ones(1, 2)
    by_hand = logp + entropies
    assert by_hand[0, 1].item() == pytest.approx(0.0)  # both actions are as likely: reinforcing one changes nothing yet
    for size in (0.1, 1.0, 10.0):  # at any scale of the rewards
        torch.testing.assert_close(covariance(logp, torch.full((1, 2), size), ones, entropies), by_hand)
    assert (covariance(logp, torch.ones(1, 2), ones) == 0).all()  # over the batch equal advantages vanish
    punished = covariance(logp, torch.tensor([[1.0, -1.0]], dtype=torch.float64), ones, entropies)
    torch.testing.assert_close(punished, by_hand * torch.tensor([[1.0, -1.0]]))


def test_covariance_state_by_state_is_the_change_of_entropy():
    """To first order a step of the policy gradient on one state changes its entropy by −η·Σ π²(A·(logπ + H)) + …"""
    logits = torch.tensor([1.5, 0.3, -0.4, 0.0], dtype=torch.float64, requires_grad=True)
    adv = torch.tensor([1.0, -2.0, 0.5, 0.7], dtype=torch.float64)
    with torch.no_grad():
        adv -= (logits.softmax(0) * adv).sum()  # an advantage: nothing is expected of it
    logp = logits.log_softmax(0)
    entropy = -(logp.exp() * logp).sum()
    step = 1e-4 * adv  # natural policy gradient: each logit moves by its advantage
    after = (logits + step).detach().log_softmax(0)
    change = -(after.exp() * after).sum() - entropy.detach()
    with torch.no_grad():
        cov = covariance(logp[None], adv[None], torch.ones(1, 4), entropy.expand(1, 4))[0]
        expected = -1e-4 * (logp.exp() * cov).sum() * adv.square().mean().sqrt()
    assert change.item() == pytest.approx(expected.item(), rel=1e-3)


def test_clip_cov_state_by_state_acts_on_equal_advantages():
    probabilities = torch.tensor([[0.8, 0.5, 0.999]], dtype=torch.float64)
    entropies = -(probabilities * probabilities.log() + (1 - probabilities) * (1 - probabilities).log())
    logp, adv, mask = probabilities.log(), torch.full((1, 3), 0.4), torch.ones(1, 3)
    state = ClipCov(ratio=1.0, lower=0.1, upper=5.0, covariance="state")(logp, logp, adv, mask, entropies=entropies)
    assert (state.loss[0] == 0).tolist() == [True, False, False]
    assert state.cov_fraction.item() == pytest.approx(1 / 3)
    assert clip_cov(logp, logp, adv, mask, ratio=1.0, lower=0.0, upper=5.0).cov_fraction.item() == 0.0


def test_kl_cov_state_by_state_penalises_the_largest_covariances():
    generator = torch.Generator().manual_seed(5)
    logp, old, adv = (torch.randn(2, 10, generator=generator, dtype=torch.float64) for _ in range(3))
    entropies = 9 * torch.rand(2, 10, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, 10)
    loss = KLCov(ratio=0.2, coef=3.0, covariance="state")(logp, old, adv, mask, entropies=entropies).loss
    penalty = loss + adv * (logp - old).exp()
    largest = covariance(logp, adv, mask, entropies).flatten().argsort(descending=True)[:4]
    expected = torch.zeros(20, dtype=torch.float64)
    expected[largest] = 3 * (logp - old).abs().flatten()[largest]
    torch.testing.assert_close(penalty.flatten(), expected)


def test_kl_cov_is_not_clipped():
    logp, old = ratios(15.0)
    assert kl_cov(logp, old, row(-1.0), torch.ones(1, 1), coef=0.0).loss.item() == pytest.approx(15.0)


LOSSES = [PPOClip(), PPOClip(dual_clip=None), ClipCov(ratio=1.0, lower=-1.0), KLCov(ratio=0.5)]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@given(seed=st.integers(0, 2**31), garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 3.0]))
@settings(max_examples=30, deadline=None)
def test_masked_tokens_change_nothing_and_get_exactly_no_gradient(loss, seed, garbage):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 6)
    logp, old, adv = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = (torch.rand(shape, generator=generator) < 0.5).double()

    def run(logp, old, adv):
        logp = logp.clone().requires_grad_()
        out = loss(logp, old, adv, mask)
        total = aggregate(out.loss, mask, "token-mean")
        total.backward()
        return total.item(), logp.grad, (out.clip_fraction, out.approx_kl, out.cov_fraction)

    clean = run(logp, old, adv)
    for dirty_ones in ({0}, {1}, {2}, {0, 1, 2}):
        given_ = [torch.where(mask != 0, x, garbage) if n in dirty_ones else x for n, x in enumerate((logp, old, adv))]
        dirty = run(*given_)
        assert clean[0] == dirty[0]
        assert torch.equal(clean[1], dirty[1])
        assert (dirty[1][mask == 0] == 0).all()
        assert all(a.item() == b.item() for a, b in zip(clean[2], dirty[2], strict=True))


@pytest.mark.parametrize(
    ("loss", "function"),
    [
        (PPOClip, ppo_clip),
        (ClipCov, clip_cov),
        (KLCov, kl_cov),
    ],
)
def test_every_setting_of_a_loss_acts_in_its_class_and_its_function(loss, function):
    generator = torch.Generator().manual_seed(0)
    logp, old, adv = (3 * torch.randn(4, 50, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(4, 50)
    entropies = 9 * torch.rand(4, 50, generator=generator, dtype=torch.float64)
    plain = function(logp, old, adv, mask, **({"generator": seeded()} if loss is ClipCov else {})).loss
    changes = {
        "clip_low": 0.5,
        "clip_high": 0.9,
        "dual_clip": 2.0,
        "ratio": 0.5,
        "lower": 8.0,
        "upper": 2.0,
        "coef": 9.0,
        "covariance": "state",
    }
    mine = [field.name for field in dataclasses.fields(loss) if field.name in changes]
    assert len(mine) == len(dataclasses.fields(loss))
    for name in mine:
        made = loss(**{name: changes[name]})(logp, old, adv, mask, entropies=entropies, generator=seeded()).loss
        assert not torch.equal(made, plain)
        if name != "covariance":
            options = {name: changes[name]} | ({"generator": seeded()} if loss is ClipCov else {})
            assert torch.equal(made, function(logp, old, adv, mask, **options).loss)


def seeded():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_an_empty_mask_is_no_accident(loss):
    logp = torch.randn(2, 3, requires_grad=True)
    mask = torch.zeros(2, 3)
    out = loss(logp, logp.detach(), torch.ones(2, 3), mask)
    aggregate(out.loss, mask, "token-mean").backward()
    assert torch.equal(logp.grad, torch.zeros(2, 3))
    assert out.clip_fraction.item() == out.approx_kl.item() == out.cov_fraction.item() == 0.0


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_precision_of_losses(loss):
    logp = torch.randn(2, 3, dtype=torch.float64)
    assert loss(logp, logp, logp, torch.ones(2, 3)).loss.dtype == torch.float64
    assert loss(logp.bfloat16(), logp.bfloat16(), logp.bfloat16(), torch.ones(2, 3)).loss.dtype == torch.float32


def test_first_update_has_the_plain_policy_gradient():
    logp = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    adv = torch.randn(2, 3, dtype=torch.float64)
    for loss in (PPOClip(), KLCov()):
        (grad,) = torch.autograd.grad(loss(logp, logp.detach(), adv, torch.ones(2, 3)).loss.sum(), logp)
        torch.testing.assert_close(grad, -adv)


def test_k3_kl():
    kl = k3_kl(row(-1.0, -1.0, -1.0), row(-1.0, -1.5, -0.5))
    torch.testing.assert_close(kl, row(0.0, math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5))
    logp = row(-2.0).requires_grad_()
    k3_kl(logp, row(-1.0)).sum().backward()
    assert logp.grad.item() == pytest.approx(1 - math.e)  # pulled up towards the reference
    # The estimate is unbiased: its mean under π is the divergence.
    p, q = torch.tensor([0.2, 0.8]).double(), torch.tensor([0.6, 0.4]).double()
    assert (p * k3_kl(p.log(), q.log())).sum().item() == pytest.approx((p * (p / q).log()).sum().item())


def test_truncated_importance_weights():
    old, rollout = row(-1.0, -1.0, -1.0), row(-1.0, -1.0 + math.log(2), -1.0 - math.log(5))
    torch.testing.assert_close(truncated_importance_weights(old, rollout, 2.0), row(1.0, 0.5, 2.0))
    # Geometric means: (5/2)^(1/3) = 1.36 over all three, 5^(1/2) = 2.24 over the first and last.
    torch.testing.assert_close(truncated_importance_weights(old, rollout, 2.0, "sequence"), row(1.0, 1.0, 1.0))
    mask = torch.tensor([[1, 0, 1]])
    torch.testing.assert_close(truncated_importance_weights(old, rollout, 2.0, "sequence", mask), row(0.0, 0.0, 0.0))
    # A sequence that the engine found far more likely than the trainer does is masked too.
    torch.testing.assert_close(truncated_importance_weights(rollout, old, 2.0, "sequence", mask), row(0.0, 0.0, 0.0))
    assert not truncated_importance_weights(old.requires_grad_(), rollout).requires_grad
    with pytest.raises(ValueError, match="cap must be at least 1"):
        truncated_importance_weights(old, rollout, 0.5)
    with pytest.raises(ValueError, match="unknown importance weight mode"):
        truncated_importance_weights(old, rollout, 2.0, "row")


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: PPOClip(clip_low=0), "PPOClip.clip_low must be above 0 and at most 1, not 0"),
        (lambda: PPOClip(clip_high=-0.1), "PPOClip.clip_high"),
        (lambda: PPOClip(dual_clip=1.0), "PPOClip.dual_clip must be above 1, not 1.0"),
        (lambda: ClipCov(ratio=0), "ClipCov.ratio"),
        (lambda: ClipCov(lower=3, upper=3), "ClipCov.lower must be below ClipCov.upper = 3"),
        (lambda: ClipCov(clip_low=1.5), "ClipCov.clip_low"),
        (lambda: KLCov(ratio=1.1), "KLCov.ratio"),
        (lambda: KLCov(coef=-1), "KLCov.coef"),
    ],
)
def test_values_out_of_range_are_named(make, key):
    with pytest.raises(ValueError, match=key):
        make()
