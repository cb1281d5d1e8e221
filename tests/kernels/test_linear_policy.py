"""linear_policy_loss: policy_loss of log-probs that torch makes from the whole logits in float64, gradients and all."""

import math
import types

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import KLTerm, dispatch, linear_policy_loss, linear_ppo_loss, policy_loss
from rlhf_kernels.objectives import CISPO, DPPO, GMPO, GSPO, RLOO, Clip, ClipCov, KLCov
from tests.kernels.test_policy import OBJECTIVES

OP = "linear"
B, T, H, V = 4, 9, 6, 13


@pytest.fixture(autouse=True)
def tokens_served(request):
    """Skip where the backend of the head cannot serve the walk over the tokens."""
    if "backend_name" in request.fixturenames:
        request.getfixturevalue("backend_name")
        try:
            dispatch.pick("policy", torch.zeros(1, dtype=torch.float32))
        except RuntimeError as error:
            pytest.skip(str(error))


def inputs(dtype=torch.float32, seed=0):
    """Arguments by name; NaN under the mask, hidden states too, and one sequence without a token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.rand(B, T, generator=generator, dtype=torch.float32) < 0.7
    mask[1] = False
    hidden, weight, bias = normal(B, T, H), normal(V, H), normal(V)
    labels = torch.randint(0, V, (B, T), generator=generator, dtype=torch.int64)
    log_p = torch.log_softmax(hidden @ weight.t() + bias, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    tokens = {
        "old_log_probs": log_p + 0.2 * normal(B, T),
        "advantages": normal(B, T),
        "ref_log_probs": log_p + 0.2 * normal(B, T),
        "weights": normal(B, T).abs(),
    }
    tokens = {name: torch.where(mask, x, math.nan).to(dtype) for name, x in tokens.items()}
    hidden = torch.where(mask.unsqueeze(-1), hidden, math.nan)
    return {
        "hidden_states": hidden.to(dtype),
        "weight": weight.to(dtype),
        "bias": bias.to(dtype),
        "labels": torch.where(mask, labels, -7),
        "response_mask": mask,
        **tokens,
    }


def leaves_of(case, dtype):
    return [case[name].detach().to(dtype).requires_grad_() for name in ("hidden_states", "weight", "bias")]


def options_of(case, kl, weighted):
    options = {"ref_log_probs": case["ref_log_probs"], "kl": KLTerm(0.3)} if kl else {}
    return {**options, "weights": case["weights"]} if weighted else options


def expected(case, objective, mode, coef=0.2, kl=True, weighted=True, temperature=1.0):
    """(PolicyLoss, gradients) through the whole logits, float64."""
    wide = {k: x.double() if x.is_floating_point() else x for k, x in case.items()}
    hidden, weight, bias = leaves_of(case, torch.float64)
    mask = case["response_mask"]
    logits = (torch.where(mask.unsqueeze(-1), hidden, 0) @ weight.t() + bias) / temperature
    log_p = torch.log_softmax(logits, -1)
    chosen = log_p.gather(-1, torch.where(mask, case["labels"], 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    with rlhf_kernels.backend("reference"):
        result = policy_loss(
            chosen, wide["old_log_probs"], wide["advantages"], mask, objective=objective, entropy=entropy,
            entropy_coef=coef, loss_agg_mode=mode, **options_of(wide, kl, weighted),
        )  # fmt: skip
        return result, torch.autograd.grad(result.loss, (hidden, weight, bias))


def ours(case, objective, mode, coef=0.2, kl=True, weighted=True, dtype=torch.float32, **options):
    hidden, weight, bias = leaves_of(case, dtype)
    tokens = (case[name] for name in ("labels", "old_log_probs", "advantages", "response_mask"))
    result = linear_policy_loss(
        hidden, weight, *tokens, bias=bias, objective=objective, entropy_coef=coef, loss_agg_mode=mode,
        **options_of(case, kl, weighted), **options,
    )  # fmt: skip
    return result, torch.autograd.grad(result.loss, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients(backend_name, served, dtype, name, assert_close_to_fp64):
    served(dtype)
    case = inputs(dtype, seed=1)
    wanted, wanted_grads = expected(case, OBJECTIVES[name], "seq-mean-token-mean")
    result, grads = ours(case, OBJECTIVES[name], "seq-mean-token-mean", dtype=dtype)
    assert_close_to_fp64(result.loss, wanted.loss.detach(), dtype, 8)
    for grad, exact in zip(grads, wanted_grads, strict=True):
        assert_close_to_fp64(grad, exact, dtype, 8, gradient=True)
    assert set(result.metrics) == set(wanted.metrics)
    for metric, value in wanted.metrics.items():
        assert_close_to_fp64(result.metrics[metric], value, dtype, 16)


@pytest.mark.parametrize("mode", ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"))
def test_every_aggregation(backend_name, mode, assert_close_to_fp64):
    case = inputs(seed=2)
    for objective in (CISPO(high=0.2), GSPO(0.02, 0.03), GMPO(0.1)):
        wanted, wanted_grads = expected(case, objective, mode)
        result, grads = ours(case, objective, mode)
        assert_close_to_fp64(result.loss, wanted.loss.detach(), torch.float32, 8)
        for grad, exact in zip(grads, wanted_grads, strict=True):
            assert_close_to_fp64(grad, exact, torch.float32, 8)


def test_kl_covariance(backend_name, assert_close_to_fp64):
    """What is chosen over the batch is chosen by the log-probs of this head."""
    case = inputs(seed=3)
    wanted, wanted_grads = expected(case, KLCov(0.7, 0.2), "token-mean")
    result, grads = ours(case, KLCov(0.7, 0.2), "token-mean")
    assert_close_to_fp64(result.loss, wanted.loss.detach(), torch.float32, 8)
    for grad, exact in zip(grads, wanted_grads, strict=True):
        assert_close_to_fp64(grad, exact, torch.float32, 8)
    drawn, _ = ours(case, ClipCov(ratio=0.2, cov_low=-9.0, cov_high=9.0), "token-mean")
    assert math.isfinite(drawn.loss.item())


def test_clip_is_linear_ppo_loss(backend_name):
    """The same gradients and metrics to the bit where both have the same to do; the loss may be rounded once less."""
    case = inputs(seed=4)
    result, grads = ours(case, Clip(0.2, 0.28), "token-mean", kl=False, weighted=False)
    hidden, weight, bias = leaves_of(case, torch.float32)
    tokens = (case[name] for name in ("labels", "old_log_probs", "advantages", "response_mask"))
    other = linear_ppo_loss(hidden, weight, *tokens, bias=bias, cliprange_high=0.28, entropy_coef=0.2)
    torch.testing.assert_close(result.loss, other.loss, rtol=2**-22, atol=0)
    for x, y in zip(grads, torch.autograd.grad(other.loss, (hidden, weight, bias)), strict=True):
        assert torch.equal(x, y)
    for name, x in other.metrics.items():
        assert torch.equal(x, result.metrics[name]), name


def test_chunks_change_nothing(backend_name, assert_close_to_fp64):
    case = inputs(seed=5)
    wanted, wanted_grads = expected(case, GSPO(), "seq-mean-token-mean", temperature=0.7)
    for size in (1, 7, 100):
        result, grads = ours(case, GSPO(), "seq-mean-token-mean", chunk_size=size, temperature=0.7)
        assert_close_to_fp64(result.loss, wanted.loss.detach(), torch.float32, 8)
        for grad, exact in zip(grads, wanted_grads, strict=True):
            assert_close_to_fp64(grad, exact, torch.float32, 8)


def test_packed_tokens(backend_name):
    """[N] is [1, N] for objectives of single tokens, and an error for those of sequences."""
    case = inputs(seed=6)
    flat = {k: x if k in ("weight", "bias") else x.flatten(0, 1) for k, x in case.items()}
    first, grads = ours(case, DPPO(), "token-mean")
    second, others = ours(flat, DPPO(), "token-mean")
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(x.flatten(), y.flatten()) for x, y in zip(grads, others, strict=True))
    with pytest.raises(ValueError, match=r"labels has shape \[36\]"):
        ours(flat, GSPO(), "token-mean")
    with pytest.raises(ValueError, match=r"labels has shape \[36\]"):
        ours(flat, Clip(), "seq-mean-token-mean")


def test_masked_garbage(backend_name):
    case = inputs(seed=7)
    keep = case["response_mask"]
    for objective in (Clip(), RLOO(0.2)):
        first, grads = ours(case, objective, "token-mean")
        shown = {**case, "hidden_states": torch.where(keep.unsqueeze(-1), case["hidden_states"], 1e30)}
        second, others = ours(shown, objective, "token-mean")
        assert torch.isfinite(first.loss) and torch.equal(first.loss, second.loss)
        assert all(torch.equal(x, y) for x, y in zip(grads, others, strict=True))
        assert (grads[0][~keep] == 0).all()


def test_bad_input():
    case = inputs()
    with pytest.raises(ValueError, match="old_log_probs has shape"):
        ours({**case, "old_log_probs": case["old_log_probs"][:, :3]}, Clip(), "token-mean")
    with pytest.raises(ValueError, match="advantages has shape"):
        ours({**case, "advantages": torch.ones(3)}, Clip(), "token-mean")
    with pytest.raises(ValueError, match="process_group is given, expected None with ClipCov"):
        ours(case, ClipCov(), "token-mean", process_group=types.SimpleNamespace(group_name="ranks"))
    with pytest.raises(ValueError, match="objective must be an Objective"):
        ours(case, "clip", "token-mean")
    with pytest.raises(ValueError, match="ref_log_probs has shape"):
        ours({**case, "ref_log_probs": torch.ones(3)}, Clip(), "token-mean")
