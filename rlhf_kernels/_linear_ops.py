"""The opaque operators of the op linear: registration, fake results and autograd; the contract is reference/linear.py.

All tensors arrive flat: hidden [N, H], weight [V, H], labels, rows, temperatures [M] (PPO: [B, T] or [M] beside the
labels). low [N, r] and up [V, r] are a LoRA layer's: low[rows] up^T is added to the logits. chunk_size 0 means the
backend's default, group_name "" means no process group. `needs` says which gradients are wanted: of hidden, weight,
bias, low and up. With slopes, a forward returns
d output_i / d hidden row [M, H] beside its output, and its backward has only to multiply them: for a head that is not
trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from ._autograd import custom_op, direct, register
from ._checks import reads_values
from ._precision import exact_products
from .logprobs import check_labels, check_temperatures
from .reference.linear import spread_slopes
from .reference.policy import STATS as POLICY_STATS
from .reference.policy import Settings, Tensors
from .reference.ppo import STATS

# where log-probs, cross-entropy and PPO have them: of a LoRA layer, what A makes of the hidden states, and B
DIFFERENTIABLE = {"hidden_states": 0, "weight": 1, "bias": 4, "lora[0]": 6, "lora[1]": 7}
PLACES = tuple(DIFFERENTIABLE.values())


def group_of(group_name: str):
    if not group_name:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group_name)


class backend_of:
    """The backend, with exact products: they must not be rounded behind its back."""

    def __init__(self, hidden: Tensor, op: str = "linear"):
        self.hidden, self.op, self.outside = hidden, op, exact_products(hidden.device)

    def __enter__(self):
        backend = dispatch.pick(self.op, self.hidden)
        self.outside.__enter__()
        return backend

    def __exit__(self, *error):
        self.outside.__exit__(*error)


def _check_rows(rows, hidden):
    if rows is not None and reads_values(rows) and bool(((rows < 0) | (rows >= hidden.shape[0])).any()):
        raise ValueError(f"rows holds values outside [0, {hidden.shape[0]}), the rows of hidden_states")


def check_values(hidden, weight, labels, rows, temperatures, ignore_index, group_name, mask=None):
    """The checks that read values: labels, rows and temperatures."""
    if not reads_values(labels):
        return
    vocab = weight.shape[0]
    if group_name:
        total = torch.tensor(vocab, dtype=torch.int64, device=labels.device)
        torch.distributed.all_reduce(total, group=group_of(group_name))
        vocab = int(total)
    counted = labels if mask is None else torch.where(mask, labels, ignore_index)
    check_labels(counted, vocab, ignore_index)
    _check_rows(rows, hidden)
    check_temperatures(temperatures, counted, ignore_index)


def _row_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def fake_gradients(tensors, needs, saved=False):
    """What a backend returns for hidden, weight, bias, low and up; `saved` as made in a forward: fp16 stays wide."""
    hidden, weight = tensors[:2]
    dtypes = [_row_dtype(hidden) if x is None else x.dtype for x in tensors]
    if saved:
        dtypes = [_row_dtype(hidden) if d == torch.float16 else d for d in dtypes]
    shapes = [weight.shape[:1] if x is None else x.shape for x in tensors]
    return tuple(hidden.new_empty(s if need else 0, dtype=d) for s, d, need in zip(shapes, dtypes, needs))


def placed(ctx, found):
    """The gradients of all arguments, of which those at PLACES are found."""
    grads = [None] * ctx.count
    for place, x in zip(PLACES, found):
        if ctx.needs_input_grad[place]:
            grads[place] = x
    return tuple(grads)


@custom_op("linear_logprobs_fwd")
def linear_logprobs_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, bias: Tensor | None,
    temperatures: Tensor | None, low: Tensor | None, up: Tensor | None, temperature: float, softcap: float | None,
    ignore_index: int, with_entropy: bool, with_slopes: bool, chunk_size: int, fast: bool, group_name: str,
    vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_values(hidden, weight, labels, rows, temperatures, ignore_index, group_name)
    with backend_of(hidden) as backend:
        return backend.linear_logprobs_fwd(
            hidden, weight, labels, rows, bias, temperatures, low, up, temperature, softcap, ignore_index,
            with_entropy, with_slopes, chunk_size, fast, group_of(group_name), vocab_start,
        )  # fmt: skip


@linear_logprobs_fwd.register_fake
def _(
    hidden, weight, labels, rows, bias, temperatures, low, up, temperature, softcap, ignore_index, with_entropy,
    with_slopes, *rest,
):  # fmt: skip
    def new(wanted, *shape):
        return hidden.new_empty(shape if wanted else 0, dtype=_row_dtype(hidden))

    count, saved = labels.shape[0], not with_slopes
    rows_of_slopes = new(with_slopes, count, hidden.shape[1])
    return new(True, count), new(with_entropy, count), new(saved, count), new(saved, count), rows_of_slopes


@custom_op("linear_logprobs_bwd")
def linear_logprobs_bwd(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, labels: Tensor,
    rows: Tensor | None, bias: Tensor | None, temperatures: Tensor | None, low: Tensor | None, up: Tensor | None,
    logprobs: Tensor, entropy: Tensor, row_max: Tensor, log_sum: Tensor, temperature: float, softcap: float | None,
    ignore_index: int, chunk_size: int, fast: bool, group_name: str, vocab_start: int, needs: list[bool],
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """wide: the gradients are fp32 (fp64 for fp64) instead of their inputs' dtypes."""
    dtypes = (_row_dtype(hidden),) * len(PLACES) if wide else None
    with backend_of(hidden) as backend:
        return backend.linear_logprobs_bwd(
            grad_logprobs, grad_entropy, hidden, weight, labels, rows, bias, temperatures, low, up, logprobs, entropy,
            row_max, log_sum, temperature, softcap, ignore_index, chunk_size, fast, group_of(group_name), vocab_start,
            needs, dtypes=dtypes,
        )  # fmt: skip


@linear_logprobs_bwd.register_fake
def _(
    grad_logprobs, grad_entropy, hidden, weight, labels, rows, bias, temperatures, low, up, logprobs, entropy, row_max,
    log_sum, temperature, softcap, ignore_index, chunk_size, fast, group_name, vocab_start, needs, wide=False,
):  # fmt: skip
    found = fake_gradients((hidden, weight, bias, low, up), needs)
    return tuple(x.to(_row_dtype(hidden)) for x in found) if wide else found


logprobs_bwd = direct(linear_logprobs_bwd)


def _logprobs_setup(ctx, inputs, output):
    *tensors, temperature, softcap, ignore_index, ctx.with_entropy, ctx.with_slopes, chunk, fast, group, start = inputs
    ctx.options, ctx.count = (temperature, softcap, ignore_index, chunk, fast, group, start), len(inputs)
    hidden, _, labels, rows = tensors[:4]
    if ctx.with_slopes:
        ctx.save_for_backward(output[4], labels != ignore_index, rows)
        ctx.hidden = hidden.shape, hidden.dtype
    else:
        results = (x.clone() for x in output[:2])  # the caller may write over them
        ctx.save_for_backward(*tensors, *results, *output[2:4])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _logprobs_backward(ctx, grad_logprobs, grad_entropy, *_):
    grad_entropy = grad_entropy if ctx.with_entropy else None
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * ctx.count
    if ctx.with_slopes:
        return placed(ctx, [spread_slopes(grad_logprobs, *ctx.saved_tensors, *ctx.hidden)])
    needs = [ctx.needs_input_grad[place] for place in PLACES]
    return placed(ctx, logprobs_bwd(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.options, needs))


logprobs = register(linear_logprobs_fwd, _logprobs_backward, _logprobs_setup, **DIFFERENTIABLE)


@custom_op("linear_ppo_fwd")
def linear_ppo_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, bias: Tensor | None,
    temperatures: Tensor | None, low: Tensor | None, up: Tensor | None, old_log_probs: Tensor, advantages: Tensor,
    mask: Tensor, normalizer: Tensor | None, temperature: float, softcap: float | None, cliprange: float,
    cliprange_high: float, dual_clip: float | None, entropy_coef: float, loss_agg_mode: str, chunk_size: int,
    fast: bool, group_name: str, vocab_start: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_values(hidden, weight, labels, rows, temperatures, 0, group_name, mask)
    with backend_of(hidden) as backend:
        return backend.linear_ppo_fwd(
            hidden, weight, labels, rows, bias, temperatures, low, up, old_log_probs, advantages, mask, normalizer,
            temperature, softcap, cliprange, cliprange_high, dual_clip, entropy_coef, loss_agg_mode, chunk_size, fast,
            group_of(group_name), vocab_start, needs,
        )  # fmt: skip


@linear_ppo_fwd.register_fake
def _(hidden, weight, labels, rows, bias, temperatures, low, up, *rest):
    def new(shape):
        return hidden.new_empty(shape, dtype=_row_dtype(hidden))

    gradients = fake_gradients((hidden, weight, bias, low, up), rest[-1], saved=True)
    return new(()), new(()), new(len(STATS)), *gradients


@custom_op("linear_policy_fwd")
def linear_policy_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, bias: Tensor | None,
    temperatures: Tensor | None, low: Tensor | None, up: Tensor | None, mask: Tensor, old_log_probs: Tensor,
    advantages: Tensor, ref_log_probs: Tensor | None, weights: Tensor | None, coefficients: Tensor | None,
    normalizer: Tensor | None, entropy_normalizer: Tensor | None, settings: list[float], temperature: float,
    softcap: float | None, chunk_size: int, fast: bool, group_name: str, vocab_start: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, its parts [4], stats, d hidden, d weight, d bias, d low, d up."""
    check_values(hidden, weight, labels, rows, temperatures, 0, group_name, mask)
    tensors = Tensors(
        mask, None, old_log_probs, advantages, ref_log_probs, weights, coefficients, normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
    )  # fmt: skip
    with backend_of(hidden) as backend:
        return backend.linear_policy_fwd(
            hidden, weight, labels, rows, bias, temperatures, low, up, tensors, Settings(*settings), temperature,
            softcap, chunk_size, fast, group_of(group_name), vocab_start, needs,
        )  # fmt: skip


@linear_policy_fwd.register_fake
def _(hidden, weight, labels, rows, bias, temperatures, low, up, *rest):
    def new(shape):
        return hidden.new_empty(shape, dtype=_row_dtype(hidden))

    gradients = fake_gradients((hidden, weight, bias, low, up), rest[-1], saved=True)
    return new(()), new(4), new(len(POLICY_STATS)), *gradients


def fused_setup(ctx, inputs, output):
    """The loss is output 0, its gradients are the last five; everything but the loss is for reading only."""
    ctx.save_for_backward(*output[-len(PLACES) :])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in PLACES]
    ctx.count = len(inputs)


def fused_backward(ctx, grad, *_):
    grads = [None] * ctx.count
    if grad is not None:
        for i, dtype, saved in zip(PLACES, ctx.dtypes, ctx.saved_tensors):
            if ctx.needs_input_grad[i]:
                grads[i] = (saved * grad).to(dtype)
    return tuple(grads)


policy_loss = register(linear_policy_fwd, fused_backward, fused_setup, **DIFFERENTIABLE)
ppo_loss = register(linear_ppo_fwd, fused_backward, fused_setup, **DIFFERENTIABLE)


@custom_op("linear_kl_fwd")
def linear_kl_fwd(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, rows: Tensor | None, bias: Tensor | None,
    ref_bias: Tensor | None, temperature: float, softcap: float | None, reverse: bool, with_slopes: bool,
    chunk_size: int, fast: bool, group_name: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_rows(rows, hidden)
    with backend_of(hidden) as backend:
        return backend.linear_kl_fwd(
            hidden, weight, ref_hidden, ref_weight, rows, bias, ref_bias, temperature, softcap, reverse, with_slopes,
            chunk_size, fast, group_of(group_name),
        )  # fmt: skip


@linear_kl_fwd.register_fake
def _(hidden, weight, ref_hidden, ref_weight, rows, bias, ref_bias, temperature, softcap, reverse, with_slopes, *rest):
    count = hidden.shape[0] if rows is None else rows.shape[0]
    slopes = (count, hidden.shape[1]) if with_slopes else 0
    return tuple(hidden.new_empty(shape, dtype=_row_dtype(hidden)) for shape in (count, slopes))


@custom_op("linear_kl_bwd")
def linear_kl_bwd(
    grad: Tensor, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, rows: Tensor | None,
    bias: Tensor | None, ref_bias: Tensor | None, temperature: float, softcap: float | None, reverse: bool,
    chunk_size: int, fast: bool, group_name: str, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with backend_of(hidden) as backend:
        return backend.linear_kl_bwd(
            grad, hidden, weight, ref_hidden, ref_weight, rows, bias, ref_bias, temperature, softcap, reverse,
            chunk_size, fast, group_of(group_name), need_hidden, need_weight, need_bias,
        )  # fmt: skip


@linear_kl_bwd.register_fake
def _(grad, hidden, weight, ref_hidden, ref_weight, rows, bias, *rest):
    return fake_gradients((hidden, weight, bias), rest[-3:])


_linear_kl_bwd = direct(linear_kl_bwd)


def _kl_setup(ctx, inputs, output):
    *tensors, temperature, softcap, reverse, ctx.with_slopes, chunk_size, fast, group = inputs
    ctx.options = (temperature, softcap, reverse, chunk_size, fast, group)
    hidden, rows = tensors[0], tensors[4]
    if ctx.with_slopes:
        ctx.save_for_backward(output[1], torch.ones_like(output[0], dtype=torch.bool), rows)
        ctx.hidden = hidden.shape, hidden.dtype
    else:
        ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _kl_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 14
    if ctx.with_slopes:
        return spread_slopes(grad, *ctx.saved_tensors, *ctx.hidden), *(None,) * 13
    need_hidden, need_weight, _, _, _, need_bias = ctx.needs_input_grad[:6]
    d_hidden, d_weight, d_bias = _linear_kl_bwd(
        grad, *ctx.saved_tensors, *ctx.options, need_hidden, need_weight, need_bias
    )
    grads = (d_hidden if need_hidden else None, d_weight if need_weight else None)
    return *grads, None, None, None, d_bias if need_bias else None, *(None,) * 8


kl = register(linear_kl_fwd, _kl_backward, _kl_setup, hidden_states=0, weight=1, bias=5)
