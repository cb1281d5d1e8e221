"""The PPO loss: clipped policy loss, clipped value loss and entropy bonus, with their gradients made in the forward."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from ._autograd import custom_op, direct, register
from ._checks import check_range, check_same_device, reads_values
from .policy import check_entropy, check_like, check_policy, check_targets, normalizer_of
from .reference.ppo import STATS, accumulator_dtype

_VALUE_STATS = ("value_clip_fraction", "explained_variance", "value_mean", "return_mean")


class PPOLoss(NamedTuple):
    """The total loss, its two parts (they backpropagate too), and a dict of detached scalars on the device."""

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor | None
    metrics: dict[str, Tensor]


def ppo_loss(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    values=None,
    old_values=None,
    returns=None,
    cliprange=0.2,
    cliprange_high=None,
    dual_clip=None,
    cliprange_value=0.2,
    vf_coef=0.1,
    entropy=None,
    entropy_coef=0.0,
    loss_agg_mode="token-mean",
    num_items_in_batch=None,
):
    """PPO loss: policy_loss + vf_coef * value_loss - entropy_coef * entropy, each aggregated over the kept tokens.

    policy: max(-A r, -A clip(r, 1 - cliprange, 1 + cliprange_high)), r = exp(log_probs - old_log_probs), Schulman et
    al. 2017, eq. (7); where A < 0 at most -A dual_clip (Ye et al. 2020).
    value: 1/2 max((V - R)^2, (clip(V, V_old - cliprange_value, V_old + cliprange_value) - R)^2).

    Args:
        log_probs: [B, T] fp32|bf16|fp16|fp64, +log p of the sampled tokens now; differentiated. Arithmetic in fp32
            (fp64 for fp64).
        old_log_probs: [B, T], +log p when the tokens were sampled.
        advantages: [B, T].
        response_mask: [B, T] bool or integer, 1 = keep. What stands under a 0 may be NaN.
        values: [B, T] value function now, differentiated; None = no value loss.
        old_values: [B, T] values when the tokens were sampled; needed to clip.
        returns: [B, T] targets of the values; needed with values.
        cliprange: >= 0 and <= 1, how far below 1 the ratio counts; paper: 0.2.
        cliprange_high: >= 0, how far above 1; None = cliprange.
        dual_clip: > 1, bound on the ratio where A < 0; None = no bound.
        cliprange_value: > 0, in units of the score: 0.2 holds a value function of scores around 10 in place, so
            watch value_clip_fraction; None = no clipping.
        vf_coef: >= 0, weight of the value loss.
        entropy: [B, T] entropy of each token's distribution in nats, differentiated; None = not in loss or metrics.
        entropy_coef: >= 0, weight of the entropy bonus; needs entropy.
        loss_agg_mode: "token-mean": sum over tokens / tokens. "token-sum". "seq-mean-token-sum": mean over sequences of
            the sum over tokens. "seq-mean-token-mean". "seq-mean-token-sum-norm": mean over sequences of sum / T,
            T the width of the tensors. A sequence without a kept token is not counted.
        num_items_in_batch: number or 0-d tensor: tokens (token-mean) or sequences (seq-*) of the whole batch, over all
            micro-batches and processes; divides instead of this call's count, so that the gradients of the parts
            add up to those of one big batch.
    Returns:
        PPOLoss(loss, policy_loss, value_loss, metrics): 0-d, fp32 (fp64 for fp64); value_loss None without values.
        Metrics are plain means over kept tokens, NaN without any: tokens (their count), approx_kl (of 1/2 (log r)^2),
        clip_fraction (the clip is active), ratio_mean, ratio_var, ratio_max; dual_clip_fraction with dual_clip;
        value_clip_fraction, explained_variance (1 - var(R - V) / var(R)), value_mean, return_mean with values;
        entropy with entropy.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; an argument that another one needs is missing; a number out
            of range; unknown loss_agg_mode; num_items_in_batch with "token-sum".
    Cost:
        One pass with gradients in the forward, metrics included; the backward is one product, on the CPU none where the
        gradient of loss is 1. No host sync.
    Example:
        >>> import torch
        >>> new, old = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.tensor([[-1.0, -2.5]])
        >>> loss = ppo_loss(new, old, torch.tensor([[0.65, 0.65]]), torch.tensor([[True, True]]))
        >>> loss.loss.backward()
        >>> round(loss.loss.item(), 4)  # -(0.65 + 0.65 * 1.2) / 2
        -0.715
        >>> new.grad  # the clipped token has none
        tensor([[-0.3250,  0.0000]])
    """
    mask = check_policy(log_probs, old_log_probs, response_mask)
    check_like("advantages", advantages, log_probs, "log_probs")
    _check_values(log_probs, values, old_values, returns, cliprange_value)
    check_entropy(log_probs, entropy, entropy_coef)
    _check_numbers(cliprange, cliprange_high, dual_clip, cliprange_value, vf_coef)
    tensors = {
        "log_probs": log_probs,
        "old_log_probs": old_log_probs,
        "advantages": advantages,
        "response_mask": mask,
        "values": values,
        "old_values": old_values,
        "returns": returns,
        "entropy": entropy,
    }
    check_same_device(**tensors)
    normalizer = normalizer_of("num_items_in_batch", num_items_in_batch, "loss_agg_mode", loss_agg_mode, log_probs)
    numbers = [
        float(cliprange),
        float(cliprange if cliprange_high is None else cliprange_high),
        math.inf if dual_clip is None else float(dual_clip),
        math.inf if cliprange_value is None or values is None else float(cliprange_value),
        float(vf_coef),
        float(entropy_coef),
    ]
    loss, policy_loss, value_loss, *_, stats = _losses(
        *(None if x is None else x.contiguous() for x in tensors.values()), normalizer, numbers, loss_agg_mode
    )
    metrics = _metrics(stats, values, entropy, dual_clip)
    return PPOLoss(loss, policy_loss, None if values is None else value_loss, metrics)


def _check_values(log_probs, values, old_values, returns, cliprange_value):
    if values is None:
        for name, x in (("old_values", old_values), ("returns", returns)):
            if x is not None:
                raise ValueError(f"{name} is given but values is None; give both, or neither")
        return
    check_like("values", values, log_probs, "log_probs")
    if returns is None:
        raise ValueError("returns is None, but values is given: the value loss needs [B, T] returns")
    check_targets(values, old_values, returns, cliprange_value)


def _check_numbers(cliprange, cliprange_high, dual_clip, cliprange_value, vf_coef):
    check_range("cliprange", cliprange, 0, 1)
    check_range("vf_coef", vf_coef, 0)
    if cliprange_high is not None:
        check_range("cliprange_high", cliprange_high, 0)
    if dual_clip is not None:
        check_range("dual_clip", dual_clip, 1, low_open=True)
    if cliprange_value is not None:
        check_range("cliprange_value", cliprange_value, 0, low_open=True)


def _metrics(stats, values, entropy, dual_clip):
    absent = set()
    if values is None:
        absent.update(_VALUE_STATS)
    if entropy is None:
        absent.add("entropy")
    if dual_clip is None:
        absent.add("dual_clip_fraction")
    return {name: value for name, value in zip(STATS, stats.unbind(), strict=True) if name not in absent}


@custom_op("ppo_fwd")
def ppo_fwd(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    normalizer: Tensor | None,
    numbers: list[float],
    loss_agg_mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Total, policy and value loss, gradients of the total in log_probs, values and entropy, stats.

    With vf_coef = 0 the gradient in values is that of the value loss.

    numbers: cliprange, cliprange_high, dual_clip, cliprange_value (inf = off), vf_coef, entropy_coef. They come as one
    argument because PyTorch's time for a call grows with the square of their count.
    """
    *limits, vf_coef, entropy_coef = numbers
    limits = (None if x == math.inf else x for x in limits)
    backend = dispatch.pick("ppo", log_probs)
    tensors = (log_probs, old_log_probs, advantages, mask, values, old_values, returns, entropy, normalizer)
    inputs = (*tensors, *limits, loss_agg_mode, vf_coef or 1.0, -entropy_coef)
    if hasattr(backend, "ppo_total_fwd"):  # the launches that a GPU is handed are fewer
        return backend.ppo_total_fwd(*inputs, vf_coef=vf_coef, entropy_coef=entropy_coef)
    losses, *grads, stats = backend.ppo_fwd(*inputs)
    policy_loss, value_loss, entropy_loss = losses.unbind()
    loss = policy_loss.add(value_loss, alpha=vf_coef)
    if entropy_coef:
        loss = loss.sub_(entropy_loss, alpha=entropy_coef)
    return loss, policy_loss.clone(), value_loss.clone(), *grads, stats


@custom_op("ppo_bwd")
def ppo_bwd(
    grad_loss: Tensor | None,
    grad_policy_loss: Tensor | None,
    grad_value_loss: Tensor | None,
    grad_log_probs: Tensor,
    grad_values: Tensor,
    grad_entropy: Tensor,
    vf_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The saved gradients times the upstream gradients of the losses that they are part of."""
    return dispatch.pick("ppo", grad_log_probs).ppo_bwd(
        grad_loss,
        grad_policy_loss,
        grad_value_loss,
        grad_log_probs,
        grad_values,
        grad_entropy,
        vf_coef,
    )


@ppo_fwd.register_fake
def _(log_probs, old_log_probs, advantages, mask, values, old_values, returns, entropy, *_):
    dtype = accumulator_dtype(log_probs.dtype)
    losses = (log_probs.new_empty((), dtype=dtype) for _ in range(3))
    grads = (log_probs.new_empty((0,) if x is None else x.shape, dtype=dtype) for x in (log_probs, values, entropy))
    return *losses, *grads, log_probs.new_empty(len(STATS), dtype=dtype)


@ppo_bwd.register_fake
def _(grad_loss, grad_policy_loss, grad_value_loss, *grads_and_numbers):
    return tuple(torch.empty_like(x) for x in grads_and_numbers[:3])


_ppo_bwd = direct(ppo_bwd)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[3:6])
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in (0, 4, 7)]
    ctx.vf_coef = inputs[9][4]
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _is_one(grad_loss, grad_policy_loss, grad_value_loss):
    """Whether the total is all that is differentiated, and by 1, as far as that can be known without waiting."""
    return grad_policy_loss is None and grad_value_loss is None and reads_values(grad_loss) and grad_loss.item() == 1


def _backward(ctx, grad_loss, grad_policy_loss, grad_value_loss, *_):
    grads = [None] * 11
    upstream = grad_loss, grad_policy_loss, grad_value_loss
    if any(x is not None for x in upstream):
        if _is_one(*upstream) and ctx.vf_coef != 0:
            products = ctx.saved_tensors
        else:
            products = _ppo_bwd(*upstream, *ctx.saved_tensors, ctx.vf_coef)
        for position, dtype, product in zip((0, 4, 7), ctx.dtypes, products, strict=True):
            grads[position] = None if dtype is None else product.to(dtype)
    return tuple(grads)


_losses = register(ppo_fwd, _backward, _setup_context, log_probs=0, values=4, entropy=7)
