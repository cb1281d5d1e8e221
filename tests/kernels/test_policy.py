"""policy_loss and value_loss: the seven questions, for every objective and KL term."""

import math
import re
from pathlib import Path

import pytest
import torch

from rlhf_kernels import KLTerm, Objective, backend, dispatch, policy_loss, ppo_loss, value_loss
from rlhf_kernels.objectives import CISPO, DPPO, DRO, GMPO, GPG, GSPO, RLOO, SAPO, Clip, ClipCov, KLCov, Reinforce
from rlhf_kernels.reference import policy as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OBJECTIVES = {
    "clip": Clip(),
    "clip high dual": Clip(0.1, 0.28, 1.3),
    "gspo": GSPO(0.02, 0.03),
    "rloo": RLOO(),
    "rloo clipped": RLOO(0.2, 0.3),
    "reinforce": Reinforce(),
    "gpg": GPG(),
    "cispo": CISPO(high=0.2),
    "cispo low": CISPO(0.2, 0.28),
    "sapo": SAPO(),
    "gmpo": GMPO(0.15, 0.2),
    "dppo tv": DPPO(low=0.03, high=0.05, ratio_cap=1.3),
    "dppo kl": DPPO("kl", 0.004, 0.006, 1.3),
    "dro": DRO(0.4),
}
KL_TERMS = {
    **{f"{e} {g}": KLTerm(0.3, e, g) for e in reference.ESTIMATORS for g in reference.KL_GRADIENTS},
    "k3 clamped": KLTerm(0.3, "k3", clamp_input=(-0.15, 0.25), clamp_output=0.02),
    "k2 clamped": KLTerm(0.3, "k2", "ratio", clamp_input=0.3, clamp_output=0.03),
    "k1 capped": KLTerm(0.3, "k1", "straight_through_ratio", ratio_cap=1.1),
}


def inputs(dtype=torch.float32, seed=0, shape=(6, 17), spread=0.3):
    """Arguments of policy_loss by name; NaN under the mask, one sequence without a token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    old = -normal().abs() - 0.01
    mask = torch.rand(shape, generator=generator, dtype=torch.float32) < 0.7
    mask[1] = False
    found = {
        "log_probs": old + normal(spread),
        "old_log_probs": old,
        "advantages": normal(),
        "ref_log_probs": old + normal(0.2),
        "weights": normal().abs() * mask.roll(3, 1),
        "entropy": normal().abs(),
    }
    found["log_probs"] = found["log_probs"].clamp(max=-1e-3)
    found = {name: torch.where(mask, x, math.nan).to(dtype) for name, x in found.items()}
    return {**found, "response_mask": mask}


def mean_weights(mask, mode):
    """Share of each token, from the words of the docstring."""
    rows = [sum(row) for row in mask.tolist()]
    count, sequences = sum(rows), sum(1 for n in rows if n)
    return torch.tensor(
        [
            [
                0.0
                if not keep
                else {
                    "token-mean": 1 / max(count, 1),
                    "token-sum": 1.0,
                    "seq-mean-token-sum": 1 / max(sequences, 1),
                    "seq-mean-token-mean": 1 / max(sequences, 1) / max(n, 1),
                    "seq-mean-token-sum-norm": 1 / max(sequences, 1) / mask.shape[1],
                }[mode]
                for keep in row
            ]
            for row, n in zip(mask.tolist(), rows, strict=True)
        ],
        dtype=torch.float64,
    )


def sequence_ratio(log_ratio, mask, summed):
    """[B, T] ratio of the sequence, differentiated through each token's own place only."""
    total = torch.stack(
        [row[keep].sum() / (1 if summed else max(int(keep.sum()), 1)) for row, keep in zip(log_ratio, mask)]
    )
    return torch.exp(total.detach().unsqueeze(1) + log_ratio - log_ratio.detach())


def surrogate(ratio, a, low, high, dual):
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
    return torch.where(a < 0, torch.minimum(loss, -a * dual), loss) if dual else loss


def token_loss(objective, p, old, a, mask):
    """The papers' formulas by autograd, float64, masked tokens 0; gradients only where the papers let them flow."""
    u = p - old
    ratio = torch.exp(u)
    if isinstance(objective, Clip):
        high = objective.low if objective.high is None else objective.high
        return surrogate(ratio, a, objective.low, high, objective.dual)
    if isinstance(objective, GSPO):
        return surrogate(sequence_ratio(u, mask, False), a, objective.low, objective.high, None)
    if isinstance(objective, RLOO) and objective.low is not None:
        length = mask.sum(1, keepdim=True).clamp(min=1)
        loss = surrogate(sequence_ratio(u, mask, True), a, objective.low, objective.high, None)
        return loss.detach() + length * (
            loss - loss.detach()
        )  # the sum moves with each token: the mean's share, n times
    if isinstance(objective, (RLOO, Reinforce)):
        return -a * p
    if isinstance(objective, CISPO):
        low = 0.0 if objective.low is None else 1 - objective.low
        return -ratio.clamp(low, 1 + objective.high).detach() * a * p
    if isinstance(objective, SAPO):
        t = torch.where(a > 0, objective.positive, torch.full_like(a, objective.negative))
        return -a * torch.sigmoid(t * (ratio - 1)) * 4 / t
    if isinstance(objective, GMPO):
        sign = torch.sign(a)
        held = sign * torch.minimum(sign * u, sign * u.clamp(-objective.low, objective.high))
        count = mask.sum(1, keepdim=True).clamp(min=1)
        mean, geometric = a.sum(1, keepdim=True) / count, torch.exp(held.sum(1, keepdim=True) / count)
        return -mean * geometric.detach() * torch.exp(held - held.detach())
    if isinstance(objective, DPPO):
        new, before = p.exp(), old.exp()
        gap = before * (old - p) + (1 - before) * torch.log((1 - before) / (1 - new))
        high = objective.low if objective.high is None else objective.high
        if objective.divergence == "tv":
            valid = torch.where(a > 0, new - before <= high, new - before >= -objective.low)
        else:
            valid = torch.where(a > 0, (gap <= high) | (new <= before), (gap <= objective.low) | (new >= before))
        return torch.where(valid, -a * ratio.clamp(max=objective.ratio_cap).detach() * p, 0)
    assert isinstance(objective, DRO)
    return -(a * p - objective.beta / 2 * u.square())


def kl_loss(kl, p, ref, old):
    e = p - ref
    low, high = (
        kl.clamp_input if isinstance(kl.clamp_input, tuple) else (-(kl.clamp_input or 1e9), kl.clamp_input or 1e9)
    )
    x = e.clamp(low, high)
    value = {"k1": x, "k2": x.square() / 2, "k3": torch.exp(-x) - 1 + x, "abs": x.abs()}[kl.estimator]
    value = value.clamp(-(kl.clamp_output or 1e9), kl.clamp_output or 1e9)
    ratio = torch.exp(p - old)
    through = e.square() / 2
    if kl.gradient == "plain":
        return value
    if kl.gradient == "ratio":
        return value * ratio
    if kl.gradient == "straight_through_ratio":
        through = ratio.clamp(max=kl.ratio_cap or 1e9).detach() * through
    return value.detach() + through - through.detach()


def expected(case, objective, mode, kl=None, weighted=False, entropy_coef=0.0, entropy_mode="token-mean"):
    """(loss, policy loss, kl loss, d / d log_probs, d / d entropy) in float64 from the formulas above."""
    mask = case["response_mask"]
    x = {name: torch.where(mask, t.detach().double(), 0) for name, t in case.items() if name != "response_mask"}
    p, h = x["log_probs"].requires_grad_(), x["entropy"].requires_grad_()
    share, entropy_share = mean_weights(mask, mode), mean_weights(mask, entropy_mode)
    terms = token_loss(objective, p, x["old_log_probs"], x["advantages"], mask)
    policy = (share * (x["weights"] if weighted else 1.0) * terms).sum()
    of_kl = p.sum() * 0 if kl is None else (share * kl_loss(kl, p, x["ref_log_probs"], x["old_log_probs"])).sum()
    loss = policy + (0 if kl is None else kl.coef) * of_kl - entropy_coef * (entropy_share * h).sum()
    return loss, policy, of_kl, *torch.autograd.grad(loss, (p, h))


def ours(case, objective, mode="token-mean", kl=None, weighted=False, **options):
    p, h = (case[name].detach().clone().requires_grad_() for name in ("log_probs", "entropy"))
    result = policy_loss(
        p,
        case["old_log_probs"],
        case["advantages"],
        case["response_mask"],
        objective=objective,
        ref_log_probs=None if kl is None else case["ref_log_probs"],
        kl=kl,
        weights=case["weights"] if weighted else None,
        entropy=h,
        loss_agg_mode=mode,
        **options,
    )
    result.loss.backward()
    return result, p.grad, h.grad


def ours_in_fp64(case, *arguments, **options):
    wide = {name: x if name == "response_mask" else x.double() for name, x in case.items()}
    with backend("reference"):
        return ours(wide, *arguments, **options)


def compare(case, dtype, check, objective, mode, **options):
    loss, policy, of_kl, grad, entropy_grad = expected(case, objective, mode, **options)
    result, found, entropy_found = ours(case, objective, mode, **options)
    scale = 10 if dtype in (torch.bfloat16, torch.float16) else 4
    check(result.loss, loss.detach(), dtype, scale)
    check(result.metrics["policy_loss"], policy.detach(), dtype, scale)
    if options.get("kl") is not None:
        check(result.metrics["kl_loss"], of_kl.detach(), dtype, scale)
    check(found, grad, dtype, scale)
    check(entropy_found, entropy_grad, dtype, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients(backend_name, served, dtype, name, assert_close_to_fp64):
    """Every objective with KL, weights and entropy bonus against autograd in float64 on the papers' formulas."""
    served(dtype)
    options = {"kl": KLTerm(0.3), "weighted": True, "entropy_coef": 0.2}
    compare(inputs(dtype), dtype, assert_close_to_fp64, OBJECTIVES[name], "token-mean", **options)


@pytest.mark.parametrize("mode", ("token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"))
@pytest.mark.parametrize("name", ("clip", "gspo", "rloo clipped", "gmpo"))
def test_every_aggregation(backend_name, name, mode, assert_close_to_fp64):
    options = {"kl": KLTerm(0.3), "entropy_coef": 0.2, "entropy_mode": "seq-mean-token-sum"}
    case = inputs(seed=3)
    loss, _, _, grad, entropy_grad = expected(case, OBJECTIVES[name], mode, **options)
    result, found, entropy_found = ours(
        case, OBJECTIVES[name], mode, kl=options["kl"], entropy_coef=0.2, entropy_agg_mode="seq-mean-token-sum"
    )
    assert_close_to_fp64(result.loss, loss.detach(), torch.float32, 4)
    assert_close_to_fp64(found, grad, torch.float32, 4)
    assert_close_to_fp64(entropy_found, entropy_grad, torch.float32, 4)


@pytest.mark.parametrize("name", KL_TERMS)
def test_every_kl_term(backend_name, name, assert_close_to_fp64):
    compare(inputs(seed=5), torch.float32, assert_close_to_fp64, Clip(), "token-mean", kl=KL_TERMS[name])


def test_reference():
    """Numbers by hand: two tokens, A = 0.65, ratios 1 and e^0.5."""
    new, old = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.tensor([[-1.0, -2.5]])
    keep, advantage = torch.ones(1, 2, dtype=torch.bool), torch.tensor([0.65])
    by_hand = {
        Clip(): -0.65 * (1 + 1.2) / 2,
        GSPO(0.2, 0.2): -0.65 * 1.2,  # exp(0.25) is over 1.2
        GSPO(0.2, 0.5): -0.65 * math.exp(0.25),
        RLOO(0.2, 1.0): -0.65 * math.exp(0.5),
        Reinforce(): 0.65 * (1 + 2) / 2,
        CISPO(high=0.2): 0.65 * (1 + 1.2 * 2) / 2,
        SAPO(): -0.65 * 2 * (0.5 + 1 / (1 + math.exp(1 - math.exp(0.5)))),
        GMPO(0.4): -0.65 * math.exp(0.2),
        DPPO(low=0.05): 0.65 / 2,  # p rose from 0.082 to 0.135
        DPPO(low=0.06): 0.65 * (1 + math.exp(0.5) * 2) / 2,
        DRO(0.4): (0.65 * 3 + 0.2 * 0.25) / 2,
    }
    for objective, wanted in by_hand.items():
        assert policy_loss(new, old, advantage, keep, objective=objective).loss.item() == pytest.approx(
            wanted, rel=1e-6
        )


def test_the_kl_by_hand():
    new, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    values = {"k1": (0.5 - 1) / 2, "k2": (0.125 + 0.5) / 2, "abs": 0.75}
    values["k3"] = (math.exp(-0.5) - 0.5 + math.e - 2) / 2
    for estimator, wanted in values.items():
        result = policy_loss(
            new, new, torch.zeros(1), torch.ones(1, 2, dtype=torch.bool), ref_log_probs=ref, kl=KLTerm(2.0, estimator)
        )
        assert result.metrics["ref_kl"].item() == pytest.approx(wanted, rel=1e-6)
        assert result.loss.item() == pytest.approx(2 * wanted, rel=1e-6)


@pytest.mark.parametrize("mode", reference.AGG_MODES)
def test_clip_is_ppo_loss(backend_name, mode):
    """The same bits as ppo_loss, where both are served by one backend."""
    case = inputs(seed=2)
    result, grad, _ = ours(case, Clip(0.2, 0.28, 1.5), mode)
    p = case["log_probs"].clone().requires_grad_()
    other = ppo_loss(
        p, case["old_log_probs"], case["advantages"], case["response_mask"], cliprange_high=0.28, dual_clip=1.5,
        loss_agg_mode=mode,
    )  # fmt: skip
    other.loss.backward()
    assert torch.equal(result.loss.detach(), other.loss.detach()) and torch.equal(grad, p.grad)
    for name, x in other.metrics.items():
        assert torch.equal(x, result.metrics[name]), name


def test_value_loss_is_ppos(backend_name):
    case = inputs(seed=4)
    values, old, returns = case["log_probs"], case["old_log_probs"], case["ref_log_probs"]
    first, second = (values.clone().requires_grad_() for _ in range(2))
    result = value_loss(first, old, returns, case["response_mask"], cliprange_value=0.1)
    other = ppo_loss(
        torch.zeros_like(values), torch.zeros_like(values), torch.zeros_like(values), case["response_mask"],
        values=second, old_values=old, returns=returns, cliprange_value=0.1,
    )  # fmt: skip
    result.loss.backward()
    other.value_loss.backward()
    assert torch.equal(result.loss.detach(), other.value_loss.detach())
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-6, atol=0)
    for name in ("tokens", "value_clip_fraction", "explained_variance", "value_mean", "return_mean"):
        assert torch.equal(result.metrics[name], other.metrics[name]), name


def test_metrics(backend_name):
    """Each metric from its definition, over the kept tokens only."""
    case = inputs(seed=8)
    metrics = ours(case, Clip(0.1, 0.15, 1.3), kl=KLTerm(0.1), weighted=True)[0].metrics
    mask = case["response_mask"]
    kept = {name: x[mask].double() for name, x in case.items() if name != "response_mask"}
    log_ratio, a, w = kept["log_probs"] - kept["old_log_probs"], kept["advantages"], kept["weights"]
    ratio, e = log_ratio.exp(), kept["log_probs"] - kept["ref_log_probs"]
    wanted = {
        "tokens": float(mask.sum()),
        "approx_kl_k1": -log_ratio.mean(),
        "approx_kl": (log_ratio.square() / 2).mean(),
        "approx_kl_k3": (ratio - 1 - log_ratio).mean(),
        "clip_fraction": (((a > 0) & (ratio > 1.15)) | ((a < 0) & (ratio < 0.9))).double().mean(),
        "clip_fraction_low": ((a < 0) & (ratio < 0.9)).double().mean(),
        "clip_fraction_high": ((a > 0) & (ratio > 1.15)).double().mean(),
        "dual_clip_fraction": ((a < 0) & (ratio > 1.3)).double().mean(),
        "ratio_mean": ratio.mean(),
        "ratio_var": ratio.var(correction=0),
        "ratio_max": ratio.max(),
        "effective_sample_size": w.sum().square() / len(w) / w.square().sum(),
        "filtered_fraction": (w == 0).double().mean(),
        "ref_kl": (torch.exp(-e) - 1 + e).mean(),
        "entropy": kept["entropy"].mean(),
    }
    assert set(metrics) == {*wanted, "policy_loss", "kl_loss", "entropy_loss"}
    for name, value in wanted.items():
        assert metrics[name].item() == pytest.approx(float(value), rel=2e-5, abs=1e-7), name


@pytest.mark.parametrize("name", ("gspo", "cispo low", "dppo tv", "dppo kl", "gmpo", "sapo"))
def test_flags(backend_name, name):
    """Where a gradient (of CISPO: a weight) is held, as the objective's own words say."""
    objective, case = OBJECTIVES[name], inputs(seed=9)
    metrics = ours(case, objective)[0].metrics
    mask = case["response_mask"]
    p, old, a = (torch.where(mask, case[x].double(), 0) for x in ("log_probs", "old_log_probs", "advantages"))
    ratio = sequence_ratio(p - old, mask, False) if name == "gspo" else torch.exp(p - old)
    rise = p.exp() - old.exp()
    if name == "gspo":
        low, high = (a < 0) & (ratio < 0.98), (a > 0) & (ratio > 1.03)
    elif name == "cispo low":
        low, high = ratio < 0.8, ratio > 1.28
    elif name == "gmpo":
        low, high = (a < 0) & (p - old < -0.15), (a > 0) & (p - old > 0.2)
    elif name == "dppo tv":
        low, high = (a <= 0) & (rise < -0.03), (a > 0) & (rise > 0.05)
    elif name == "dppo kl":
        gap = old.exp() * (old - p) + (1 - old.exp()) * torch.log((1 - old.exp()) / (1 - p.exp()))
        low, high = (a <= 0) & (gap > 0.004) & (rise < 0), (a > 0) & (gap > 0.006) & (rise > 0)
    else:
        low = high = torch.zeros_like(mask)
    low, high = low[mask].double().mean(), high[mask].double().mean()
    assert name == "sapo" or (low > 0 and high > 0)
    assert metrics["clip_fraction_low"].item() == pytest.approx(low.item(), abs=1e-7)
    assert metrics["clip_fraction_high"].item() == pytest.approx(high.item(), abs=1e-7)


def test_covariance_objectives(backend_name):
    """What ClipCov draws lies in its band and is not held; KLCov holds the largest; both against a loop over tokens."""
    case = inputs(seed=10, shape=(8, 40))
    mask = case["response_mask"]
    p, old, a = (case[x][mask].double() for x in ("log_probs", "old_log_probs", "advantages"))
    covariance, ratio = (a - a.mean()) * (p - p.mean()), torch.exp(p - old)
    chosen = int(0.05 * len(a))
    result, grad, _ = ours(case, KLCov(0.7, 0.05))
    largest = torch.zeros_like(mask)
    largest[mask] = covariance >= covariance.sort(descending=True).values[chosen - 1]
    slope = (-a * ratio + 0.7 * torch.where(largest[mask], torch.sign(p - old), 0)) / len(a)
    torch.testing.assert_close(grad[mask].double(), slope, rtol=1e-4, atol=1e-6)
    assert result.loss.item() == pytest.approx(
        ((-a * ratio) + 0.7 * torch.where(largest[mask], (p - old).abs(), 0)).mean().item(), rel=1e-5
    )
    torch.manual_seed(0)
    objective = ClipCov(ratio=0.05, cov_low=0.1, cov_high=0.9)
    _, plain, _ = ours(case, Clip())
    _, drawn, _ = ours(case, objective)
    stopped = (plain != drawn)[mask]
    assert int(stopped.sum()) == chosen and (drawn[mask][stopped] == 0).all()
    assert ((covariance[stopped] > 0.1) & (covariance[stopped] < 0.9)).all()


@pytest.mark.slow_interpreted
def test_masked_garbage(backend_name):
    """Nothing under the mask reaches value, gradient or metric, for any objective."""
    case = inputs(seed=11)
    other = {
        name: torch.where(case["response_mask"], x, 1e30) if name != "response_mask" else x for name, x in case.items()
    }
    for objective in (*OBJECTIVES.values(), KLCov()):
        first, grad, _ = ours(case, objective, kl=KLTerm(0.1, gradient="ratio"), weighted=True)
        second, same, _ = ours(other, objective, kl=KLTerm(0.1, gradient="ratio"), weighted=True)
        assert torch.isfinite(first.loss) and torch.equal(first.loss, second.loss) and torch.equal(grad, same)
        assert (grad[~case["response_mask"]] == 0).all()
        assert all(torch.equal(x, second.metrics[name]) for name, x in first.metrics.items())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_far_ratios(backend_name, name):
    """Overflowing ratios give no NaN; a clamp on the log-ratio holds them and stops their gradient."""
    case = inputs(seed=12)
    case["log_probs"] = torch.where(case["response_mask"], torch.full_like(case["log_probs"], -0.5), math.nan)
    case["old_log_probs"] = torch.where(case["response_mask"], torch.full_like(case["log_probs"], -200.0), math.nan)
    case["advantages"] = torch.where(case["response_mask"], case["advantages"].abs(), math.nan)
    result, grad, _ = ours(case, OBJECTIVES[name], log_ratio_clamp=20.0)
    assert torch.isfinite(result.loss) and torch.isfinite(grad).all()
    assert result.metrics["ratio_max"].item() <= math.exp(20.0) * 1.001 or name == "rloo clipped"
    if name == "clip":
        case["advantages"] = -case["advantages"]
        result, grad, _ = ours(case, Clip(), log_ratio_clamp=20.0)
        assert (grad == 0).all() and math.isfinite(result.loss.item())


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "dro"])
def test_an_advantage_of_zero(backend_name, name):
    """No loss and no gradient where A = 0, also where the ratio overflows."""
    p, keep = torch.full((2, 3), -0.5, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    result = policy_loss(p, torch.full((2, 3), -300.0), torch.zeros(2), keep, objective=OBJECTIVES[name])
    result.loss.backward()
    assert result.loss.item() == 0 and p.grad.eq(0).all()


@pytest.mark.parametrize("name", ("clip", "gspo", "rloo clipped", "gmpo"))
def test_long_and_many_sequences(backend_name, name, monkeypatch, assert_close_to_fp64):
    """A sequence that several programs share, and more sequences than one takes; every statistic against float64."""
    if backend_name == "triton":
        for size in ("MERGED", "ADDED"):  # so that a few pieces are added in several steps
            monkeypatch.setattr(f"rlhf_kernels.triton.policy.{size}", 2)
    options = {"kl": KLTerm(0.3), "weighted": True, "entropy_coef": 0.2}
    for shape in ((2, 4500), (200, 33)):
        case = inputs(seed=16, shape=shape, spread=0.02)
        compare(case, torch.float32, assert_close_to_fp64, OBJECTIVES[name], "seq-mean-token-mean", **options)
        result, *_ = ours(case, OBJECTIVES[name], "seq-mean-token-mean", **options)
        exact, *_ = ours_in_fp64(case, OBJECTIVES[name], "seq-mean-token-mean", **options)
        for metric, value in exact.metrics.items():
            assert result.metrics[metric].item() == pytest.approx(value.item(), rel=2e-5, abs=1e-7), metric


def test_edges(backend_name):
    for shape in ((0, 5), (1, 1), (3, 0)):
        p = torch.zeros(shape, requires_grad=True)
        for objective in (Clip(), GSPO(), GMPO(), KLCov(), ClipCov()):
            result = policy_loss(
                p, p.detach(), torch.ones(shape), torch.ones(shape, dtype=torch.bool), objective=objective
            )
            result.loss.backward()
            assert torch.isfinite(result.loss)
    case = inputs(seed=13)
    case["response_mask"] = torch.zeros_like(case["response_mask"])
    result, grad, _ = ours(case, Clip(), kl=KLTerm(0.1), weighted=True)
    assert result.loss.item() == 0 and (grad == 0).all() and math.isnan(result.metrics["ratio_mean"].item())


def test_shapes_and_strides(backend_name):
    """Advantages and weights of a sequence; transposed inputs; integer masks."""
    case = inputs(seed=14)
    keep, rows = case["response_mask"], torch.linspace(-1, 1, 6)
    whole, grad, _ = ours({**case, "advantages": rows.unsqueeze(1).expand(6, 17)}, Clip())
    for advantages in (rows, rows.unsqueeze(1)):
        again, same, _ = ours({**case, "advantages": advantages}, Clip())
        assert torch.equal(whole.loss, again.loss) and torch.equal(grad, same)
    turned = {name: x.t().contiguous().t() for name, x in case.items()}
    assert torch.equal(ours(turned, GSPO())[1], ours(case, GSPO())[1])
    assert torch.equal(ours({**case, "response_mask": keep.long()}, Clip())[1], ours(case, Clip())[1])


def test_bad_input():
    case = inputs()
    arguments = [case[name] for name in ("log_probs", "old_log_probs", "advantages", "response_mask")]

    def refused(message, *positional, **options):
        with pytest.raises(ValueError, match=message):
            policy_loss(*(positional or arguments), **options)

    refused("objective must be an Objective", objective="clip")
    refused("kl must be a KLTerm", ref_log_probs=case["ref_log_probs"], kl=0.1)
    refused("ref_log_probs is None", kl=KLTerm(0.1))
    refused("kl is None", ref_log_probs=case["ref_log_probs"])
    refused("advantages has shape", *arguments[:2], torch.ones(6, 2), arguments[3])
    refused("weights has shape", weights=torch.ones(5))
    refused("log_ratio_clamp", log_ratio_clamp=0.0)
    refused("entropy is None", entropy_coef=0.1)
    refused("loss_agg_mode must be one of", loss_agg_mode="mean")
    refused("entropy_agg_mode must be one of", entropy_agg_mode="mean")
    refused("num_items_in_batch has no meaning", loss_agg_mode="token-sum", num_items_in_batch=3)
    for make, message in (
        (lambda: Clip(low=2.0), "low"),
        (lambda: Clip(dual=0.5), "dual"),
        (lambda: CISPO(high=-1.0), "high"),
        (lambda: SAPO(0.0), "positive"),
        (lambda: DPPO("js"), "divergence"),
        (lambda: DRO(0.0), "beta"),
        (lambda: RLOO(high=0.2), "high is 0.2"),
        (lambda: KLTerm(-1.0), "coef"),
        (lambda: KLTerm(1.0, "k4"), "estimator"),
        (lambda: KLTerm(1.0, gradient="exact"), "gradient"),
        (lambda: KLTerm(1.0, clamp_input=(1.0, 0.0)), "clamp_input"),
        (lambda: ClipCov(cov_low=6.0), "cov_high"),
        (lambda: KLCov(ratio=0.0), "ratio"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="old_values is None"):
        value_loss(case["log_probs"], None, case["advantages"], case["response_mask"])


def test_parts_add_up(backend_name):
    """Micro-batches with the whole batch's counts give the gradient of one call."""
    case = inputs(seed=15)
    tokens = int(case["response_mask"].sum())
    _, whole, entropies = ours(case, CISPO(), kl=KLTerm(0.1), entropy_coef=0.1)
    grads, bonus = [], []
    for part in (slice(0, 2), slice(2, 6)):
        some = {name: x[part] for name, x in case.items()}
        counts = {"num_items_in_batch": tokens, "entropy_num_items_in_batch": torch.tensor(float(tokens))}
        _, grad, entropy_grad = ours(some, CISPO(), kl=KLTerm(0.1), entropy_coef=0.1, **counts)
        grads.append(grad)
        bonus.append(entropy_grad)
    torch.testing.assert_close(torch.cat(grads), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(bonus), entropies, rtol=1e-6, atol=0)


def test_the_page_says_what_is_served():
    """The table of docs/objectives.md against the dispatch table and what the tests here go through."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "objectives.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \| ([\w, ]+) \| ([\w, ]+) \|$", text, flags=re.MULTILINE)
    served = [name for name, _ in dispatch.TABLE["policy"]]
    order = ("reference", "cpu", "triton", "cuda")
    here = ", ".join(name for name in order if name in served)
    hidden = ", ".join(name for name in order if name in served and name in dict(dispatch.TABLE["linear"]))
    tested = {type(objective).__name__ for objective in OBJECTIVES.values()} | {"ClipCov", "KLCov"}
    assert {row[0] for row in rows} == tested == {kind.__name__ for kind in subclasses(Objective)}
    assert {row[1:] for row in rows} == {(here, here, hidden)}


def subclasses(kind):
    found = kind.__subclasses__()
    return found + [other for one in found for other in subclasses(one)]
