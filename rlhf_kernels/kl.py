"""KL divergences in nats: exact between two sets of logits, and estimated from the log-probs of samples."""

from __future__ import annotations

import math

import torch

from . import dispatch
from ._autograd import custom_op, direct, register
from ._checks import check_dtype, check_in, check_range, check_same_device, check_shape
from .logprobs import check_logits

DIRECTIONS = ("reverse", "forward")
ESTIMATORS = ("k1", "k2", "k3", "abs")
GRADIENTS = ("plain", "straight_through")
_UNBOUNDED = [-math.inf, math.inf]


def _wider(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def _backend(a: torch.Tensor, b: torch.Tensor):
    """What serves a call whose inputs may differ in dtype: the wider one decides."""
    return dispatch.pick("kl", b if b.dtype == torch.float64 else a)


@custom_op("kl_fwd")
def kl_fwd(
    logits: torch.Tensor, ref_logits: torch.Tensor, temperature: float, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backend(logits, ref_logits).kl_fwd(logits, ref_logits, temperature, reverse)


@kl_fwd.register_fake
def _(logits, ref_logits, temperature, reverse):
    dtype = _wider(logits, ref_logits)
    return tuple(logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(5))


@custom_op("kl_bwd")
def kl_bwd(
    grad: torch.Tensor, logits: torch.Tensor, ref_logits: torch.Tensor, kl: torch.Tensor, row_max: torch.Tensor,
    log_sum: torch.Tensor, ref_row_max: torch.Tensor, ref_log_sum: torch.Tensor, temperature: float, reverse: bool,
    need_logits: bool, need_ref: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _backend(logits, ref_logits).kl_bwd(
        grad, logits, ref_logits, kl, row_max, log_sum, ref_row_max, ref_log_sum, temperature, reverse, need_logits,
        need_ref,
    )  # fmt: skip


def _gradients_like(a, b, need_a, need_b):
    return a.new_empty(a.shape if need_a else 0), b.new_empty(b.shape if need_b else 0)


@kl_bwd.register_fake
def _(grad, logits, ref_logits, *rest):
    return _gradients_like(logits, ref_logits, *rest[-2:])


_kl_bwd = direct(kl_bwd)


def _kl_setup(ctx, inputs, output):
    logits, ref_logits, *ctx.options = inputs
    ctx.save_for_backward(logits, ref_logits, output[0].clone(), *output[1:])  # the caller may write over the result
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _kl_backward(ctx, grad, *_):
    need = ctx.needs_input_grad[:2]
    if grad is None:
        return None, None, None, None
    grads = _kl_bwd(grad, *ctx.saved_tensors, *ctx.options, *need)
    return *(g if wanted else None for g, wanted in zip(grads, need)), None, None


_exact = register(kl_fwd, _kl_backward, _kl_setup, keeps_inputs=True, logits=0, ref_logits=1)


@custom_op("approx_kl_fwd")
def approx_kl_fwd(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor, estimator: str, straight_through: bool, bounds: list[float]
) -> torch.Tensor:
    """bounds: of log_probs - ref_log_probs, then of the estimate."""
    return _bounded(_backend(log_probs, ref_log_probs), log_probs, ref_log_probs, estimator, bounds)[0]


def _bounded(backend, log_probs, ref_log_probs, estimator, bounds):
    """(the estimate, where no bound holds, the log-ratio); the latter two None where nothing asks for them."""
    of_input, of_output = bounds[:2], bounds[2:]
    value = gap = inside = None
    if of_input != _UNBOUNDED or estimator == "abs":
        gap = backend.approx_kl_fwd(log_probs, ref_log_probs, "k1")
        inside = (gap >= of_input[0]) & (gap <= of_input[1])
        value = gap.clamp(*of_input)
        if estimator == "abs":
            value = value.abs_()
        elif estimator != "k1":
            value = backend.approx_kl_fwd(value, torch.zeros_like(value), estimator)
    else:
        value = backend.approx_kl_fwd(log_probs, ref_log_probs, estimator)
    if of_output != _UNBOUNDED:
        within = (value >= of_output[0]) & (value <= of_output[1])
        inside = within if inside is None else inside & within
        value = value.clamp(*of_output)
    return value, inside, gap


@approx_kl_fwd.register_fake
def _(log_probs, ref_log_probs, estimator, straight_through, bounds):
    return log_probs.new_empty(log_probs.shape, dtype=_wider(log_probs, ref_log_probs))


@custom_op("approx_kl_bwd")
def approx_kl_bwd(
    grad: torch.Tensor, log_probs: torch.Tensor, ref_log_probs: torch.Tensor, estimator: str, straight_through: bool,
    bounds: list[float], need_log_probs: bool, need_ref: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    backend = _backend(log_probs, ref_log_probs)
    if straight_through:
        estimator = "k2"
    elif estimator == "abs" or bounds != 2 * _UNBOUNDED:
        _, inside, gap = _bounded(backend, log_probs, ref_log_probs, estimator, bounds)
        if estimator == "abs":
            estimator, grad = "k1", grad * gap.sign()
        grad = torch.where(inside, grad, 0)
    return backend.approx_kl_bwd(grad, log_probs, ref_log_probs, estimator, need_log_probs, need_ref)


@approx_kl_bwd.register_fake
def _(grad, log_probs, ref_log_probs, estimator, straight_through, bounds, need_log_probs, need_ref):
    return _gradients_like(log_probs, ref_log_probs, need_log_probs, need_ref)


_approx_kl_bwd = direct(approx_kl_bwd)


def _approx_setup(ctx, inputs, output):
    log_probs, ref_log_probs, *ctx.options = inputs
    ctx.save_for_backward(log_probs, ref_log_probs)


def _approx_backward(ctx, grad):
    need = ctx.needs_input_grad[:2]
    grads = _approx_kl_bwd(grad, *ctx.saved_tensors, *ctx.options, *need)
    return *(g if wanted else None for g, wanted in zip(grads, need)), None, None, None


_estimate = register(approx_kl_fwd, _approx_backward, _approx_setup, keeps_inputs=True, log_probs=0, ref_log_probs=1)


def kl_from_logits(
    logits: torch.Tensor, ref_logits: torch.Tensor, *, temperature: float = 1.0, direction: str = "reverse"
) -> torch.Tensor:
    """Exact KL divergence between softmax(logits / temperature) and softmax(ref_logits / temperature), row by row.

    With p the policy and q the reference: "reverse" is KL(p || q) = sum_j p_j (log p_j - log q_j), whose estimate from
    samples of the policy is PPO's KL penalty; "forward" is KL(q || p), the loss of distillation. There is no factor
    temperature^2.

    Args:
        logits: [..., V] fp32, bf16, fp16 or fp64, the policy's.
        ref_logits: [..., V], the reference's; its dtype may differ.
        temperature: > 0, divides both; default 1.0.
        direction: "reverse", the default, or "forward".
    Returns:
        [...] fp32 (fp64 if either input is), in nats, >= 0. Differentiable in both inputs. Tokens without probability
        on the side that is averaged over add 0; where only the other side lacks them the divergence is +inf, and that
        row gets no gradient.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; temperature not > 0 and finite; unknown direction.
    Cost: reads both inputs once, and again in the backward, which writes one gradient for each input that needs one;
        no host sync.
    Example:
        >>> import torch
        >>> policy, reference = torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.25, 0.75]]))
        >>> kl_from_logits(policy, reference)
        tensor([0.1438])
        >>> kl_from_logits(policy, reference, direction="forward")
        tensor([0.1308])
    """
    check_logits("logits", logits)
    check_logits("ref_logits", ref_logits)
    check_shape("ref_logits", ref_logits, tuple(logits.shape), "the shape of logits")
    check_same_device(logits=logits, ref_logits=ref_logits)
    check_range("temperature", temperature, 0.0, float("inf"), low_open=True, high_open=True)
    check_in("direction", direction, DIRECTIONS)
    return _exact(logits, ref_logits, float(temperature), direction == "reverse")[0]


def approx_kl(
    log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor,
    *,
    estimator: str = "k1",
    gradient: str = "plain",
    clamp_input: float | tuple[float, float] | None = None,
    clamp_output: float | tuple[float, float] | None = None,
) -> torch.Tensor:
    """Estimate of KL(policy || reference) at each sampled token, from its two log-probs.

    With d = log_probs - ref_log_probs: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, abs = |d|. Averaged over tokens
    sampled from the policy, k1 and k3 are unbiased; k1 of a single token may be negative, k2 and k3 never are. As a
    reward use k1: the estimators are unbiased as values, their gradients are not gradients of the KL, but k2's is in
    the mean, on samples of the policy as it is. "straight_through" takes that one whatever the value.

    Args:
        log_probs: any shape, fp32, bf16, fp16 or fp64, the policy's, in nats.
        ref_log_probs: the same shape, the reference's, in nats.
        estimator: "k1", the default, "k2", "k3" or "abs".
        gradient: "plain", the default, of the estimate; or "straight_through", d times that of log_probs: verl's "+",
            OpenRLHF's unbiased_gradient without old log-probs.
        clamp_input: d is held within +- this number, or within (low, high), before the estimate; None, the default,
            for no bound. verl's "low_var_kl": 20. OpenRLHF's k3: (-10, inf).
        clamp_output: the estimate likewise, default None. verl's "low_var_kl", and all of OpenRLHF's: 10.
    Returns:
        The shape of log_probs, fp32 (fp64 if either input is), in nats. Differentiable in both inputs; where a clamp
        holds, the plain gradient is 0, at any gap. Entries that are equal, also both -inf, give 0. Unclamped, k3 grows
        as exp(-d). Where the upstream gradient is 0, so is the gradient, whatever the entries.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; unknown estimator or gradient; a clamp that is neither a
            number > 0 nor (low, high) with low < high.
    Cost: reads two values and writes one an entry; the backward reads three and writes two; no host sync. "abs" and
        each clamp take some elementwise ops more in either direction.
    Example:
        >>> import torch
        >>> approx_kl(torch.tensor([-0.15, -0.30]), torch.tensor([-0.20, -0.45]))
        tensor([0.0500, 0.1500])
        >>> approx_kl(torch.tensor([-100.0]), torch.tensor([0.0]), estimator="k3", clamp_input=20, clamp_output=10)
        tensor([10.])
    """
    check_dtype("log_probs", log_probs)
    check_dtype("ref_log_probs", ref_log_probs)
    check_shape("ref_log_probs", ref_log_probs, tuple(log_probs.shape), "the shape of log_probs")
    check_same_device(log_probs=log_probs, ref_log_probs=ref_log_probs)
    check_in("estimator", estimator, ESTIMATORS)
    check_in("gradient", gradient, GRADIENTS)
    bounds = [*_bounds("clamp_input", clamp_input), *_bounds("clamp_output", clamp_output)]
    return _estimate(log_probs, ref_log_probs, estimator, gradient == "straight_through", bounds)


def _bounds(name, clamp):
    """(low, high) of a clamp: a number, both, or none."""
    if clamp is None:
        return _UNBOUNDED
    if not isinstance(clamp, tuple):
        check_range(name, clamp, 0, low_open=True)
        return [-float(clamp), float(clamp)]
    for bound in clamp:
        check_range(name, bound)
    if len(clamp) != 2 or not clamp[0] < clamp[1]:
        raise ValueError(f"{name} is {clamp!r}, expected a number > 0 or (low, high) with low < high")
    return [float(bound) for bound in clamp]
