"""Log-probs over the tokens that a sampler kept: renormalised over a top-k or top-p set, with the cost of that set."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from ._autograd import custom_op, direct, register
from ._checks import check_cu_seqlens, check_index, check_range, check_same_device, check_shape, reads_values
from ._linear_checks import check_head, check_lora
from ._precision import exact_products
from .logprobs import check_logits, logprobs_and_entropy_from_logits, logprobs_from_logits
from .reference.logprobs import accumulator_dtype


def pad_kept(kept: Tensor, cu_kept: Tensor, *, max_kept: int | None = None) -> Tensor:
    """Kept tokens of each row as [N, K], padded with -1, from token ids after each other and where each row begins.

    Args:
        kept: [M] int64|int32, the tokens of row 0, then those of row 1, ...: as vLLM returns sampling masks.
        cu_kept: [N+1] int64|int32, row n keeps kept[cu_kept[n]] .. kept[cu_kept[n+1]-1].
        max_kept: >= 1, K, for which the device need not be asked; longer rows lose their end. None, the default: the
            longest row, at least 1.
    Returns:
        [N, K] int64.
    Raises:
        ValueError: shapes or dtypes do not fit; cu_kept is not ascending from 0 to M (read on the CPU, elsewhere with
            RLHF_KERNELS_CHECK=1); max_kept < 1.
    Cost: one gather; without max_kept one host sync on a GPU.
    Example:
        >>> import torch
        >>> pad_kept(torch.tensor([7, 2, 5]), torch.tensor([0, 2, 2, 3]))
        tensor([[ 7,  2],
                [-1, -1],
                [ 5, -1]])
    """
    kept = check_index("kept", kept)
    check_shape("kept", kept, (None,), "[M], token ids after each other")
    check_cu_seqlens("cu_kept", cu_kept, kept.shape[0])
    check_same_device(kept=kept, cu_kept=cu_kept)
    counts = cu_kept[1:] - cu_kept[:-1]
    if max_kept is None:
        max_kept = max(int(counts.max()), 1) if counts.numel() else 1
    check_range("max_kept", max_kept, 1)
    place = torch.arange(max_kept, dtype=torch.int64, device=kept.device)
    if kept.numel() == 0:
        return kept.new_full((counts.shape[0], max_kept), -1)
    at = (cu_kept[:-1].unsqueeze(1) + place).clamp(max=kept.shape[0] - 1)
    return torch.where(place < counts.unsqueeze(1), kept[at], -1)


def kept_logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    kept: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each label among the tokens that its row keeps: what a top-k or top-p sampler drew it from.

    log p = z_label - log(sum over the kept tokens of exp(z)), z as in `logprobs_from_logits`.

    Args:
        logits: [..., V] fp32, bf16, fp16 or fp64.
        labels: [...] int64|int32 in [0, V), or ignore_index.
        kept: [..., K] int64|int32, the distinct tokens that each row keeps, padded with -1; see `pad_kept`.
        temperature: > 0, default 1.0; or a tensor in the shape of labels.
        softcap: > 0, or None for no cap, the default.
        ignore_index: label of rows that do not count, default -100: 0, no gradient, logits may be NaN.
        return_entropy: return the entropy over the kept tokens too, default False.
    Returns:
        log-probs in the shape of labels, fp32 (fp64 for fp64), in nats; with return_entropy (log-probs, entropy).
        Differentiable in logits. A label that its row does not keep, and every label of a row that keeps nothing, has
        -inf and no gradient; to leave such rows out, or to take the whole vocabulary there, choose by
        `log_probs == -inf`.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; a number out of range; a kept token that is neither in [0, V)
            nor -1, checked on the CPU, and elsewhere only with RLHF_KERNELS_CHECK=1; without it the row becomes NaN.
    Cost: reads K logits a row; the backward writes [..., V]. No host sync.
    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0, 5.0]])
        >>> kept_logprobs_from_logits(logits, torch.tensor([1]), torch.tensor([[0, 1]]))
        tensor([-0.6931])
    """
    check_logits("logits", logits)
    labels, kept = _check_tokens(labels, kept, tuple(logits.shape[:-1]), logits.shape[-1], ignore_index)
    check_same_device(logits=logits, labels=labels, kept=kept)
    present, outside = kept != -1, (kept < -1) | (kept >= logits.shape[-1])
    x = logits.gather(-1, torch.where(present & ~outside, kept, 0))
    x = torch.where(present, torch.where(outside, torch.nan, x), -torch.inf)
    return _of_kept(x, labels, kept, temperature, softcap, ignore_index, return_entropy)


def linear_kept_logprobs(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    kept: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`kept_logprobs_from_logits` from hidden states and the LM head, of which only the kept rows are read.

    logits[n, k] = hidden_states[n] . weight[kept[n, k]] + bias[kept[n, k]]; the [N, V] logits never exist.

    Args:
        hidden_states: [..., H] fp32, bf16, fp16 or fp64.
        weight: [V, H], the LM head, dtypes as in `linear_logprobs`.
        labels: [...] int64|int32 in [0, V), or ignore_index.
        kept: [..., K] int64|int32, the distinct tokens that each row keeps, padded with -1; see `pad_kept`.
        bias: [V], or None, the default.
        temperature: > 0, default 1.0; or a tensor in the shape of labels.
        softcap: > 0, or None for no cap, the default.
        ignore_index: label of rows that do not count, default -100: 0, no gradient, hidden states may be NaN.
        return_entropy: return the entropy over the kept tokens too, default False.
        lora: (A [r, H], B [V, r], scaling) of a LoRA layer on the head, as in `linear_logprobs`, default None.
    Returns:
        log-probs in the shape of labels, fp32 (fp64 for fp64), in nats; with return_entropy (log-probs, entropy).
        Differentiable in hidden_states, weight, bias, A and B; sums in fp32, always in the same order. A label that is
        not kept has -inf and no gradient.
    Raises:
        ValueError: as `linear_logprobs` and `kept_logprobs_from_logits`.
    Cost: 2NKH floating-point operations forward and 4NKH backward instead of V for K, and a copy of the kept rows of
        the head, some 16 MiB of them at a time; if the head is trained, a [V, H] fp32 sum. No host sync.
    Example:
        >>> import torch
        >>> hidden, head = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0], [0.0, 1.0], [9.0, 0.0]])
        >>> linear_kept_logprobs(hidden, head, torch.tensor([1]), torch.tensor([[0, 1]]))
        tensor([-0.6931])
    """
    shape = tuple(hidden_states.shape[:-1])
    hidden, weight, bias = check_head(hidden_states, weight, bias)
    labels, kept = _check_tokens(labels, kept, shape, weight.shape[0], ignore_index)
    check_same_device(hidden_states=hidden, labels=labels, kept=kept)
    counts = torch.where((labels != ignore_index).unsqueeze(-1), kept, -1).reshape(-1, kept.shape[-1])
    x = kept_logits(hidden, weight, counts, bias)
    low, up = check_lora(lora, hidden, weight, (counts != -1).any(-1), None)
    if low is not None:
        x = x + kept_logits(low, up, counts, None)
    return _of_kept(x.view(kept.shape), labels, kept, temperature, softcap, ignore_index, return_entropy)


def _check_tokens(labels, kept, shape, vocab, ignore_index):
    labels, kept = check_index("labels", labels), check_index("kept", kept)
    check_shape("labels", labels, shape, "one label for each row")
    check_shape("kept", kept, (*shape, None), "[..., K], the kept tokens of each row, padded with -1")
    if kept.shape[-1] < 1:
        raise ValueError(f"kept has shape {list(kept.shape)}, expected [..., K] with K >= 1")
    check_tokens("kept", kept, -1, vocab, " or -1 for none")
    return labels, kept


def check_tokens(name, tokens, least, vocab, also=""):
    """Raise if a token is below `least` or not below vocab, where values may be read."""
    if not reads_values(tokens):
        return
    outside = (tokens < least) | (tokens >= vocab)
    if bool(outside.any()):
        place = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"{name} holds {int(tokens[place])} at position {list(place)}, expected values in [0, {vocab}){also}"
        )


def _of_kept(x, labels, kept, temperature, softcap, ignore_index, return_entropy):
    """Log-probs (and entropy) of rows of K logits, those of the labels' places in them."""
    same = (kept == labels.unsqueeze(-1)) & (kept != -1)
    place = torch.where(labels == ignore_index, ignore_index, same.to(torch.int8).argmax(-1))
    absent = ~same.any(-1) & (labels != ignore_index)
    options = {"temperature": temperature, "softcap": softcap, "ignore_index": ignore_index}
    if not return_entropy:
        return torch.where(absent, -torch.inf, logprobs_from_logits(x, place, **options))
    log_probs, entropy = logprobs_and_entropy_from_logits(x, place, **options)
    return torch.where(absent, -torch.inf, log_probs), entropy


@custom_op("kept_logits_fwd")
def kept_logits_fwd(hidden: Tensor, weight: Tensor, kept: Tensor, bias: Tensor | None) -> Tensor:
    with exact_products(hidden.device):
        return dispatch.pick("kept", hidden).kept_logits_fwd(hidden, weight, kept, bias)


@kept_logits_fwd.register_fake
def _(hidden, weight, kept, bias):
    return hidden.new_empty(kept.shape, dtype=accumulator_dtype(hidden))


@custom_op("kept_logits_bwd")
def kept_logits_bwd(
    grad: Tensor, hidden: Tensor, weight: Tensor, kept: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with exact_products(hidden.device):
        backend = dispatch.pick("kept", hidden)
        return backend.kept_logits_bwd(grad, hidden, weight, kept, need_hidden, need_weight, need_bias)


@kept_logits_bwd.register_fake
def _(grad, hidden, weight, kept, need_hidden, need_weight, need_bias):
    dtype = accumulator_dtype(hidden)
    shapes = (hidden.shape if need_hidden else 0, weight.shape if need_weight else 0, weight.shape[0] * need_bias)
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


_kept_logits_bwd = direct(kept_logits_bwd)


def _setup_context(ctx, inputs, output):
    hidden, weight, kept, bias = inputs
    ctx.save_for_backward(hidden, weight, kept)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    hidden, weight, kept = ctx.saved_tensors
    needs = [ctx.needs_input_grad[place] for place in (0, 1, 3)]
    found = _kept_logits_bwd(grad, hidden, weight, kept, *needs)
    dtypes = (hidden.dtype, weight.dtype, ctx.bias_dtype)
    grads = [x.to(dtype) if need else None for x, dtype, need in zip(found, dtypes, needs, strict=True)]
    return grads[0], grads[1], None, grads[2]


kept_logits = register(kept_logits_fwd, _backward, _setup_context, keeps_inputs=True, hidden_states=0, weight=1, bias=3)
