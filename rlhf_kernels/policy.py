"""Policy loss of any objective, with KL, weights and entropy bonus; and the value loss: one walk over the tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from ._autograd import custom_op, direct, register
from ._checks import (
    FLOATS,
    check_dtype,
    check_in,
    check_mask,
    check_range,
    check_same_device,
    check_shape,
    reads_values,
)
from .objectives import Clip, KLTerm, Objective
from .reference.policy import STATS, Settings, Tensors, total_loss
from .reference.ppo import AGG_MODES, accumulator_dtype

_OF_POLICY = (
    "tokens", "approx_kl", "approx_kl_k1", "approx_kl_k3", "clip_fraction", "clip_fraction_low", "clip_fraction_high",
    "dual_clip_fraction", "ratio_mean", "ratio_var", "ratio_max",
)  # fmt: skip
_OF_KL, _OF_ENTROPY, _OF_WEIGHTS = ("ref_kl",), ("entropy",), ("effective_sample_size", "filtered_fraction")
_OF_VALUES = ("tokens", "value_clip_fraction", "explained_variance", "value_mean", "return_mean")


class PolicyLoss(NamedTuple):
    """The loss, which backpropagates, and a dict of detached scalars on the device."""

    loss: Tensor
    metrics: dict[str, Tensor]


class ValueLoss(NamedTuple):
    """The loss, which backpropagates, and a dict of detached scalars on the device."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    objective: Objective = Clip(),
    ref_log_probs: Tensor | None = None,
    kl: KLTerm | None = None,
    weights: Tensor | None = None,
    log_ratio_clamp: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    loss_agg_mode: str = "token-mean",
    num_items_in_batch: int | float | Tensor | None = None,
    entropy_agg_mode: str = "token-mean",
    entropy_num_items_in_batch: int | float | Tensor | None = None,
) -> PolicyLoss:
    """Policy loss of a published objective: sum of w (weights objective + kl.coef KL) - entropy_coef sum of v entropy.

    w and v are the shares of each kept token under loss_agg_mode and entropy_agg_mode. What each objective is stands
    in its own docstring: `Clip`, `GSPO`, `CISPO`, `SAPO`, `GMPO`, `DPPO`, `GPG`, `Reinforce`, `RLOO`, `DRO`, `ClipCov`,
    `KLCov`.

    Args:
        log_probs: [B, T] fp32|bf16|fp16|fp64, +log p of the sampled tokens now; differentiated. Arithmetic in fp32
            (fp64 for fp64).
        old_log_probs: [B, T], +log p when the tokens were sampled.
        advantages: [B, T], or [B] or [B, 1]: one for each sequence.
        response_mask: [B, T] bool or integer, 1 = keep. What stands under a 0 may be NaN.
        objective: what is maximised, default Clip().
        ref_log_probs: [B, T], +log p under the reference; needed with kl, default None.
        kl: `KLTerm`, the KL to the reference inside the loss; None, the default, for none.
        weights: [B, T], [B] or [B, 1], factors >= 0 of the objective's terms (not of the KL), as `importance_weights`
            makes them; constants; default None. A weight of 0 leaves the token in the means.
        log_ratio_clamp: > 0, log_probs - old_log_probs is held within +- this, with no gradient beyond; None, the
            default, for no bound. verl and OpenRLHF: 20.
        entropy: [B, T] entropy of each token's distribution in nats, differentiated; None, the default: not in loss
            or metrics.
        entropy_coef: >= 0, weight of the entropy bonus, default 0.0; needs entropy.
        loss_agg_mode: how objective and KL are averaged, default "token-mean"; modes as in `ppo_loss`.
        num_items_in_batch: number or 0-d tensor: tokens (token-mean) or sequences (seq-*) of the whole batch, over all
            micro-batches and processes, instead of this call's count; default None.
        entropy_agg_mode: how the entropy bonus is averaged, default "token-mean" whatever loss_agg_mode is.
        entropy_num_items_in_batch: as num_items_in_batch, for the entropy bonus; default None.
    Returns:
        PolicyLoss(loss, metrics): 0-d, fp32 (fp64 for fp64). Metrics, detached: policy_loss, and with kl kl_loss,
        with entropy entropy_loss (aggregated, unscaled); plain means over kept tokens, NaN without any: tokens (their
        count), approx_kl_k1, approx_kl and approx_kl_k3 (of -log r, 1/2 (log r)^2 and r - 1 - log r), clip_fraction
        and its parts clip_fraction_low and clip_fraction_high (the token's gradient, or for CISPO its weight, is
        held), dual_clip_fraction (the upper bound where A < 0, or ratio_cap, holds), ratio_mean, ratio_var, ratio_max
        (of the sequence's ratio where the objective has that); with weights effective_sample_size, a share,
        (sum w)^2 / (tokens sum w^2), and filtered_fraction (w = 0); with kl ref_kl; with entropy entropy.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; an argument that another one needs is missing; a number out
            of range; unknown mode; num_items_in_batch with "token-sum".
    Cost:
        One pass with gradients in the forward, metrics included; two where the objective is of whole sequences. The
        backward is one product. No host sync. `ClipCov` and `KLCov` sort the tokens first.
    Example:
        >>> import torch
        >>> from rlhf_kernels import CISPO
        >>> new, old = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.tensor([[-1.0, -2.5]])
        >>> loss = policy_loss(new, old, torch.tensor([0.65]), torch.ones(1, 2).bool(), objective=CISPO(high=0.2))
        >>> loss.loss.backward()
        >>> new.grad  # -A clip(r) / 2: the clipped token keeps a gradient
        tensor([[-0.3250, -0.3900]])
    """
    mask = check_policy(log_probs, old_log_probs, response_mask)
    kl_numbers = check_kl(ref_log_probs, kl, log_probs, "log_probs")
    if weights is not None:
        weights = per_token("weights", weights, log_probs)
    check_entropy(log_probs, entropy, entropy_coef)
    tensors = Tensors(
        mask=mask,
        log_probs=log_probs,
        old_log_probs=old_log_probs,
        advantages=per_token("advantages", advantages, log_probs),
        ref_log_probs=None if kl is None else ref_log_probs,
        weights=weights,
        entropy=entropy,
        normalizer=normalizer_of("num_items_in_batch", num_items_in_batch, "loss_agg_mode", loss_agg_mode, log_probs),
        entropy_normalizer=normalizer_of(
            "entropy_num_items_in_batch", entropy_num_items_in_batch, "entropy_agg_mode", entropy_agg_mode, log_probs
        ),
    )
    check_same_device(
        response_mask=mask,
        log_probs=log_probs,
        old_log_probs=old_log_probs,
        advantages=advantages,
        ref_log_probs=ref_log_probs,
        weights=weights,
        entropy=entropy,
    )
    settings = policy_settings(objective, kl_numbers, log_ratio_clamp, entropy_coef, loss_agg_mode, entropy_agg_mode)
    chosen = with_selection(tensors, objective)
    loss, losses, *_, stats = _policy(
        _constant(mask),
        _differentiated(log_probs),
        _constant(old_log_probs),
        _constant(chosen.advantages),
        _constant(chosen.ref_log_probs),
        _constant(chosen.weights),
        _constant(chosen.coefficients),
        _differentiated(entropy),
        chosen.normalizer,
        chosen.entropy_normalizer,
        list(settings),
    )
    return PolicyLoss(loss, policy_metrics(losses, stats, weights is not None, kl is not None, entropy is not None))


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    response_mask: Tensor,
    *,
    cliprange_value: float | None = 0.2,
    loss_agg_mode: str = "token-mean",
    num_items_in_batch: int | float | Tensor | None = None,
) -> ValueLoss:
    """Clipped value loss 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), c = cliprange_value.

    Args:
        values: [B, T] fp32|bf16|fp16|fp64, value function now; differentiated.
        old_values: [B, T] values when the tokens were sampled; None where cliprange_value is None.
        returns: [B, T] targets of the values.
        response_mask: [B, T] bool or integer, 1 = keep. What stands under a 0 may be NaN.
        cliprange_value: > 0, in units of the score, default 0.2; None for no clipping.
        loss_agg_mode: default "token-mean"; modes as in `ppo_loss`.
        num_items_in_batch: number or 0-d tensor, as in `ppo_loss`, default None.
    Returns:
        ValueLoss(loss, metrics): 0-d, fp32 (fp64 for fp64). Metrics: tokens, value_clip_fraction, explained_variance,
        value_mean, return_mean, as in `ppo_loss`.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; old_values missing where they clip; a number out of range;
            unknown mode.
    Cost: one pass with the gradient in the forward; the backward is one product. No host sync.
    Example:
        >>> import torch
        >>> values, old = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[1.0, 1.0]])
        >>> value_loss(values, old, torch.tensor([[0.0, 3.0]]), torch.ones(1, 2).bool()).loss
        tensor(1.0600, grad_fn=...)
    """
    check_dtype("values", values, FLOATS)
    check_shape("values", values, (None, None), "[B, T]")
    check_targets(values, old_values, returns, cliprange_value)
    if cliprange_value is not None:
        check_range("cliprange_value", cliprange_value, 0, low_open=True)
    tensors = Tensors(
        mask=check_mask("response_mask", response_mask, values.shape),
        values=values,
        old_values=old_values,
        returns=returns,
        normalizer=normalizer_of("num_items_in_batch", num_items_in_batch, "loss_agg_mode", loss_agg_mode, values),
    )
    check_same_device(**tensors._asdict())
    settings = Settings(
        cliprange_value=math.inf if cliprange_value is None else float(cliprange_value),
        loss_agg_mode=float(AGG_MODES.index(loss_agg_mode)),
    )
    constants = (_constant(x) for x in (old_values, returns, tensors.normalizer))
    loss, _, stats = _value(_constant(tensors.mask), _differentiated(values), *constants, list(settings))
    metrics = dict(zip(STATS, stats.unbind(), strict=True))
    return ValueLoss(loss, {name: metrics[name] for name in _OF_VALUES})


def check_like(name, x, like, of):
    """Raise unless x is a floating tensor in the shape of `like`, the argument called `of`."""
    check_dtype(name, x, FLOATS)
    check_shape(name, x, like.shape, f"the shape of {of}")


def check_targets(values, old_values, returns, cliprange_value):
    """Check what the values are held against."""
    check_like("returns", returns, values, "values")
    if old_values is not None:
        check_like("old_values", old_values, values, "values")
    elif cliprange_value is not None:
        raise ValueError(
            f"old_values is None, but cliprange_value={cliprange_value!r} clips around them; "
            "give old_values, or cliprange_value=None"
        )


def check_policy(log_probs, old_log_probs, response_mask):
    """Check what every policy loss takes; return the mask as bool."""
    check_dtype("log_probs", log_probs, FLOATS)
    check_shape("log_probs", log_probs, (None, None), "[B, T]")
    check_like("old_log_probs", old_log_probs, log_probs, "log_probs")
    return check_mask("response_mask", response_mask, log_probs.shape)


def per_token(name, x, like):
    """A floating tensor [B, T], [B] or [B, 1] as [B, T], the shape of `like`; of packed tokens [N], [N]."""
    check_dtype(name, x, FLOATS)
    if x.shape == like.shape:
        return x
    if like.dim() != 2:
        check_shape(name, x, tuple(like.shape), "a number for each token")
        return x
    if x.dim() == 1:
        check_shape(name, x, tuple(like.shape[:1]), "[B], one for each sequence; or [B, T]")
        x = x.unsqueeze(1)
    if x.dim() != 2 or x.shape[0] != like.shape[0] or x.shape[1] not in (1, like.shape[1]):
        wanted = f"[B, T] = {list(like.shape)}, or [B] or [B, 1]"
        raise ValueError(f"{name} has shape {list(x.shape)}, expected {wanted}")
    return x.expand(like.shape)


def policy_settings(objective, kl_numbers, log_ratio_clamp, entropy_coef, loss_agg_mode, entropy_agg_mode) -> Settings:
    """The numbers of a policy loss, the objective and the clamp checked."""
    if not isinstance(objective, Objective):
        raise ValueError(f"objective must be an Objective such as Clip(), got {objective!r}")
    if log_ratio_clamp is not None:
        check_range("log_ratio_clamp", log_ratio_clamp, 0, low_open=True)
    return Settings(
        **objective.numbers(),
        **kl_numbers,
        log_ratio_clamp=math.inf if log_ratio_clamp is None else float(log_ratio_clamp),
        value_scale=0.0,  # there are no values
        entropy_scale=-float(entropy_coef),
        loss_agg_mode=float(AGG_MODES.index(loss_agg_mode)),
        entropy_agg_mode=float(AGG_MODES.index(entropy_agg_mode)),
    )


def check_kl(ref_log_probs, kl, like, of):
    """The numbers of the KL term; raise where it and the reference do not come together."""
    if kl is None:
        if ref_log_probs is not None:
            raise ValueError("ref_log_probs is given but kl is None; give both, or neither")
        return {}
    if not isinstance(kl, KLTerm):
        raise ValueError(f"kl must be a KLTerm or None, got {kl!r}")
    if ref_log_probs is None:
        raise ValueError(f"ref_log_probs is None, but kl={kl!r} needs [B, T] log-probs of the reference")
    check_like("ref_log_probs", ref_log_probs, like, of)
    return kl.numbers()


def check_entropy(log_probs, entropy, entropy_coef):
    """Raise unless the entropy is like log_probs, or None where its coefficient is 0."""
    check_range("entropy_coef", entropy_coef, 0)
    if entropy is not None:
        check_like("entropy", entropy, log_probs, "log_probs")
    elif entropy_coef:
        raise ValueError(f"entropy is None, but entropy_coef={entropy_coef!r} needs [B, T] entropies")


def normalizer_of(name, number, mode_name, mode, like):
    """A 0-d tensor that divides instead of the count of this call, or None."""
    check_in(mode_name, mode, AGG_MODES)
    if number is None:
        return None
    if mode == "token-sum":
        raise ValueError(f"{name} has no meaning with {mode_name}='token-sum', which divides by nothing")
    dtype = accumulator_dtype(like.dtype)
    if not isinstance(number, Tensor):
        check_range(name, number, 0, low_open=True)
        return torch.full((), number, dtype=dtype, device=like.device)
    check_shape(name, number, (), "a number or a 0-d tensor")
    return number.detach().to(like.device, dtype)


def with_selection(tensors: Tensors, objective: Objective) -> Tensors:
    """The tensors with what the objective chooses over the batch."""
    if not objective.selects:
        return tensors
    picked = objective.select(tensors.log_probs, tensors.old_log_probs, tensors.advantages, tensors.mask)
    factor, coefficients = picked
    if factor is not None and tensors.weights is not None:
        factor = factor * tensors.weights
    return tensors._replace(weights=tensors.weights if factor is None else factor, coefficients=coefficients)


def policy_metrics(losses, stats, weighted, with_kl, with_entropy):
    """The metrics of a policy loss as a dict; those of absent inputs are left out."""
    metrics = {"policy_loss": losses[0]}
    if with_kl:
        metrics["kl_loss"] = losses[1]
    if with_entropy:
        metrics["entropy_loss"] = losses[3]
    found = dict(zip(STATS, stats.unbind(), strict=True))
    names = (*_OF_POLICY, *_OF_KL * with_kl, *_OF_ENTROPY * with_entropy, *_OF_WEIGHTS * weighted)
    metrics.update((name, found[name]) for name in names)
    return metrics


def _constant(x):
    """A tensor as the operators take it, without its history."""
    return None if x is None else x.detach().contiguous()


def _differentiated(x):
    return None if x is None else x.contiguous()


def _with_total(tensors, settings, like):
    """The whole loss and the results of the backend's policy_fwd, in one go where the backend offers that."""
    backend = dispatch.pick("policy", like)
    if hasattr(backend, "policy_total_fwd"):
        return backend.policy_total_fwd(tensors, settings)
    losses, *more = backend.policy_fwd(tensors, settings)
    return total_loss(losses, settings), losses, *more


# Two operators on one walk, because PyTorch's time for a call grows with the square of the count of its arguments; the
# settings come as one argument.


@custom_op("policy_fwd")
def policy_fwd(
    mask: Tensor,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    weights: Tensor | None,
    coefficients: Tensor | None,
    entropy: Tensor | None,
    normalizer: Tensor | None,
    entropy_normalizer: Tensor | None,
    settings: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, its parts [4], gradients of the loss in log_probs and entropy, stats."""
    s = Settings(*settings)
    tensors = Tensors(
        mask, log_probs, old_log_probs, advantages, ref_log_probs, weights, coefficients, entropy=entropy,
        normalizer=normalizer, entropy_normalizer=entropy_normalizer,
    )  # fmt: skip
    total, losses, grad_log_probs, _, grad_entropy, stats = _with_total(tensors, s, log_probs)
    return total, losses, grad_log_probs, grad_entropy, stats


@custom_op("value_fwd")
def value_fwd(
    mask: Tensor,
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    normalizer: Tensor | None,
    settings: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The value loss, its gradient in values, stats."""
    s = Settings(*settings)
    tensors = Tensors(mask, values=values, old_values=old_values, returns=returns, normalizer=normalizer)
    total, _, _, grad_values, _, stats = _with_total(tensors, s, values)
    return total, grad_values, stats


@policy_fwd.register_fake
def _(mask, log_probs, *rest):
    dtype, entropy = accumulator_dtype(log_probs.dtype), rest[5]
    grads = (log_probs.new_empty((0,) if x is None else x.shape, dtype=dtype) for x in (log_probs, entropy))
    return (
        log_probs.new_empty((), dtype=dtype),
        log_probs.new_empty(4, dtype=dtype),
        *grads,
        log_probs.new_empty(len(STATS), dtype=dtype),
    )


@value_fwd.register_fake
def _(mask, values, *_):
    dtype = accumulator_dtype(values.dtype)
    return tuple(values.new_empty(shape, dtype=dtype) for shape in ((), values.shape, (len(STATS),)))


@custom_op("policy_bwd")
def policy_bwd(grad_loss: Tensor, grad: Tensor, grad_entropy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The saved gradients times the upstream gradient of the loss; of an absent one nothing."""
    absent = grad.new_empty(0)
    grads = grad, absent, absent if grad_entropy is None else grad_entropy
    product, _, product_entropy = dispatch.pick("policy", grad).policy_bwd(grad_loss, None, None, *grads, 1.0)
    return product, product_entropy


@policy_bwd.register_fake
def _(grad_loss, grad, grad_entropy=None):
    return torch.empty_like(grad), grad.new_empty(0) if grad_entropy is None else torch.empty_like(grad_entropy)


_policy_bwd = direct(policy_bwd)


def _derivative(places, saved):
    """(backward, setup_context) of an operator: outputs `saved` are the gradients of the arguments at `places`."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output[saved])
        ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in places]
        ctx.count = len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_loss, *_):
        grads = [None] * ctx.count
        if grad_loss is not None:
            products = ctx.saved_tensors
            if not (reads_values(grad_loss) and grad_loss.item() == 1):
                products = _policy_bwd(grad_loss, *products)
            for place, dtype, product in zip(places, ctx.dtypes, products, strict=False):
                grads[place] = None if dtype is None else product.to(dtype)
        return tuple(grads)

    return backward, setup_context


_policy = register(policy_fwd, *_derivative((1, 7), slice(2, 4)), log_probs=1, entropy=7)
_value = register(value_fwd, *_derivative((1,), slice(1, 2)), values=1)
