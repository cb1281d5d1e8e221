"""The native policy loss on every instruction set, against the reference in float64."""

import itertools

import pytest
import torch

from rlhf_kernels.cpu import policy as native
from rlhf_kernels.reference import policy as reference
from rlhf_kernels.reference.policy import ESTIMATORS, KL_GRADIENTS, TERMS, Settings, Tensors

NUMBERS = {  # of each term, so that every flag is raised somewhere
    "clip": {"a": 0.9, "b": 1.15, "c": 1.3},
    "sequence": {"a": 0.99, "b": 1.01},
    "cispo": {"a": 0.8, "b": 1.28},
    "sapo": {"a": 1.0, "b": 1.05},
    "gmpo": {"a": 0.15, "b": 0.2},
    "dppo_tv": {"a": 0.03, "b": 0.05, "c": 1.3},
    "dppo_kl": {"a": 0.004, "b": 0.006, "c": 0.9},
    "plain": {},
    "dro": {"a": 0.4},
    "kl_cov": {},
}


def settings_of(term, **numbers):
    return Settings(term=float(TERMS.index(term)), **{**NUMBERS[term], **numbers})


def random_tensors(B, T, seed=0, spread=0.3, absent=()):
    """Tensors of any shape, with NaN under the mask's zeros, an empty row, A = 0 and weights of 0 here and there."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return scale * torch.randn(B, T, generator=generator, dtype=torch.float32)

    def share(of):
        return torch.rand(B, T, generator=generator, dtype=torch.float32) < of

    mask = torch.rand(B, T, generator=generator, dtype=torch.float32) < 2 * torch.rand(
        B, 1, generator=generator, dtype=torch.float32
    )
    mask[B // 2] = B < 2
    old, returns = -normal().abs() - 0.01, normal()
    old_values = returns + normal(0.4)
    tensors = {
        "log_probs": (old + normal(spread)).clamp(max=-1e-4),
        "old_log_probs": old,
        "advantages": normal() * share(0.9),
        "ref_log_probs": old + normal(0.2),
        "weights": normal().abs() * share(0.8),
        "coefficients": normal().abs() * share(0.3),
        "values": old_values + normal(0.3),
        "old_values": old_values,
        "returns": returns,
        "entropy": normal().abs(),
    }
    kept = {name: torch.where(mask, x, torch.nan) for name, x in tensors.items() if name not in absent}
    return Tensors(mask, **kept)


def in_float64(tensors):
    return Tensors(tensors.mask, *(None if x is None else x.double() for x in tensors[1:]))


def assert_native_is_exact(tensors, settings, assert_close_to_fp64, scale=4):
    """Every result against the reference in float64; a statistic is NaN where that one is."""
    exact = reference.policy_fwd(in_float64(tensors), settings)
    for found, wanted in zip(native.policy_fwd(tensors, settings), exact, strict=True):
        assert torch.equal(found.isnan(), wanted.isnan())
        known = ~wanted.isnan()
        assert_close_to_fp64(found[known], wanted[known].float().double(), torch.float32, scale)


@pytest.mark.parametrize("case", reference.CASES)
@pytest.mark.parametrize("term", TERMS)
def test_values(isa, term, case, assert_close_to_fp64):
    inputs = reference.example_inputs(case, dtype=torch.float32)
    tensors = inputs["tensors"]
    if case == "far" and term in ("sequence", "gmpo", "kl_cov", "clip"):
        tensors = tensors._replace(advantages=tensors.advantages / 1e4)  # sums that float32 still holds
    settings = inputs["settings"]._replace(
        **settings_of(term, log_ratio_clamp=20.0 if case == "far" else reference.INF)._asdict()
    )
    assert_native_is_exact(tensors, settings, assert_close_to_fp64)


@pytest.mark.parametrize("T", [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 341, 1023, 1024, 1025, 17000])
@pytest.mark.parametrize("term", TERMS)
def test_every_width(isa, term, T, assert_close_to_fp64):
    """Rows that fill a vector, a block or a piece, by one too few and one too many; parts absent in turn."""
    values = ("values", "old_values", "returns")
    absent = [("entropy",), ("weights",), ("ref_log_probs", *values), values, ("old_values",)]
    for seed, missing in enumerate(absent):
        tensors = random_tensors(3, T, seed, absent=missing)
        if seed % 2:
            tensors = tensors._replace(normalizer=torch.tensor(7.0), entropy_normalizer=torch.tensor(5.0))
        settings = settings_of(
            term, loss_agg_mode=float(seed), entropy_agg_mode=float(-seed % 5), kl_coef=0.3, kl_estimator=2.0,
            cliprange_value=0.2 if tensors.old_values is not None else reference.INF, value_scale=0.5,
            entropy_scale=-0.1, d=float(seed == 3 and T < 40),
        )  # fmt: skip
        assert_native_is_exact(tensors, settings, assert_close_to_fp64)


@pytest.mark.parametrize("gradient", KL_GRADIENTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_kl_term(isa, estimator, gradient, assert_close_to_fp64):
    tensors = random_tensors(4, 61, 3, absent=("values", "old_values", "returns", "entropy"))
    chosen = {"kl_estimator": float(ESTIMATORS.index(estimator)), "kl_gradient": float(KL_GRADIENTS.index(gradient))}
    bounds = {"kl_low": -0.15, "kl_high": 0.25, "kl_cap": 0.02, "kl_ratio_cap": 1.1, "log_ratio_clamp": 0.4}
    for numbers in ({}, bounds):
        assert_native_is_exact(tensors, settings_of("clip", kl_coef=0.3, **chosen, **numbers), assert_close_to_fp64)


@pytest.mark.parametrize("clamp", [0.1, 20.0])
@pytest.mark.parametrize("term", TERMS)
def test_the_clamp_on_the_log_ratio(isa, term, clamp, assert_close_to_fp64):
    tensors = random_tensors(4, 50, 5)
    far = torch.arange(50) % 7 == 0
    tensors = tensors._replace(old_log_probs=torch.where(far, tensors.old_log_probs - 150, tensors.old_log_probs))
    tensors = tensors._replace(advantages=torch.where(far, tensors.advantages / 1e4, tensors.advantages))
    settings = settings_of(term, log_ratio_clamp=clamp, loss_agg_mode=3.0)
    _, grad, *_, stats = native.policy_fwd(tensors, settings)
    exact = reference.policy_fwd(in_float64(tensors), settings)
    assert_close_to_fp64(grad, exact[1].float().double(), torch.float32, 4)
    for name in ("ratio_max", "approx_kl", "approx_kl_k1"):  # approx_kl_k3 overflows, as it should
        i = reference.STATS.index(name)
        assert stats[i].item() == pytest.approx(exact[-1][i].item(), rel=1e-5)


@pytest.mark.parametrize("term", [name for name in TERMS if name not in ("plain", "dro")])
def test_no_advantage_no_loss(isa, term):
    """A = 0 gives 0 where the ratio overflows, of one token and of a whole sequence."""
    shape = (2, 40)
    zero = torch.zeros(shape)
    tensors = Tensors(torch.ones(shape, dtype=torch.bool), zero - 0.5, zero - 200, zero, coefficients=zero)
    if term == "sequence":
        tensors = tensors._replace(old_log_probs=zero - 2000)
    losses, grad, *_, stats = native.policy_fwd(tensors, settings_of(term))
    assert losses[0] == 0 and (grad == 0).all()
    assert stats[reference.STATS.index("ratio_max")] == torch.inf


def test_a_nan_that_is_kept_shows(isa):
    """In the loss, in its own gradient and in the means, but in no other token's gradient."""
    tensors = random_tensors(4, 50, 6, absent=("weights", "values", "old_values", "returns", "entropy"))
    row, column = tensors.mask.nonzero()[5]
    for term, name in itertools.product(("clip", "cispo", "dro", "dppo_kl"), ("log_probs", "old_log_probs")):
        broken = getattr(tensors, name).clone()
        broken[row, column] = torch.nan
        losses, grad, *_, stats = native.policy_fwd(tensors._replace(**{name: broken}), settings_of(term, kl_coef=0.1))
        assert losses[0].isnan() and stats[reference.STATS.index("ratio_mean")].isnan()
        assert grad.isnan().nonzero().tolist() == [[row, column]]


def test_no_policy(isa, assert_close_to_fp64):
    """Values alone, and with the entropy."""
    absent = ("log_probs", "old_log_probs", "advantages", "ref_log_probs", "weights", "coefficients")
    for missing in ((*absent, "entropy"), absent):
        tensors = random_tensors(5, 1030, 7, absent=missing)
        assert_native_is_exact(tensors, Settings(cliprange_value=0.2, loss_agg_mode=2.0), assert_close_to_fp64)


def test_variances_do_not_cancel(isa):
    """Ratios of 20 +- 1, of tokens and of whole sequences, with an outlier in front."""
    tensors = random_tensors(40, 900, 8, absent=("weights", "values", "old_values", "returns", "entropy"))
    old = tensors.old_log_probs - 3
    noise = 0.05 * tensors.advantages
    tensors = tensors._replace(old_log_probs=old, log_probs=old + 3 + noise)
    for term in ("clip", "sequence"):
        _, *_, stats = native.policy_fwd(tensors, settings_of(term))
        exact = reference.policy_fwd(in_float64(tensors), settings_of(term))[-1]
        i = reference.STATS.index("ratio_var")
        assert stats[i].item() == pytest.approx(exact[i].item(), rel=1e-4)


@pytest.mark.parametrize("term", TERMS)
def test_contract(isa, term, monkeypatch):
    """The same bits on one thread and on two; with a given count a row has the same bits alone as in its batch."""
    tensors = random_tensors(37, 1100, 9)._replace(normalizer=torch.tensor(9.0), entropy_normalizer=torch.tensor(9.0))
    settings = settings_of(
        term, loss_agg_mode=3.0, entropy_agg_mode=3.0, kl_coef=0.2, kl_gradient=2.0, cliprange_value=0.2
    )
    results = []
    for count in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results.append(native.policy_fwd(tensors, settings))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*results, strict=True))
    row = Tensors(*(x[7:8] if x is not None and x.dim() else x for x in tensors))
    alone = native.policy_fwd(row, settings)
    assert all(torch.equal(a, b[7:8]) for a, b in zip(alone[1:4], results[0][1:4], strict=True))
