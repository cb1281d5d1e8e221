"""Distillation from hidden states: generalised JSD between two heads, and divergence from a teacher's top tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from ._autograd import custom_op, direct, register
from ._checks import FLOATS, check_dtype, check_in, check_index, check_range, check_same_device, check_shape
from ._linear_checks import check_execution, check_head, check_scale
from ._precision import exact_products
from .kept import check_tokens, kept_logits
from .linear import linear_logprobs
from .reference.logprobs import accumulator_dtype

TAILS = ("bucket", "drop", "renormalize")


def linear_jsd(
    hidden_states: Tensor,
    weight: Tensor,
    teacher_hidden_states: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float = 0.5,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence between a student and a teacher, from hidden states and LM heads.

    beta KL(t || m) + (1 - beta) KL(s || m), m = (1 - beta) s + beta t, Agarwal et al. 2024 (GKD), with TRL's beta: 0 is
    KL(t || s), the forward KL, and 1 is KL(s || t), the reverse one. Neither [N, V] tensor exists as a whole.

    Args:
        hidden_states: [..., H] fp32, bf16, fp16 or fp64, the student's.
        weight: [V, H], the student's LM head, dtypes as in `linear_logprobs`.
        teacher_hidden_states: [..., H2], the teacher's, with the same leading dimensions; H2 may differ from H.
        teacher_weight: [V, H2].
        beta: in [0, 1], default 0.5.
        bias: [V], or None, the default; entries of -inf ban tokens.
        teacher_bias: [V], or None, the default.
        temperature: > 0, divides both, default 1.0.
        softcap: > 0, applied to both, or None for no cap, the default.
        chunk_size: rows handled at a time; default None: the backend chooses.
    Returns:
        [...] fp32 (fp64 for fp64), in nats, >= 0; with 0 < beta < 1 at most log 2, and at beta 0 or 1 infinite where
        one side bans what the other one does not. Differentiable in hidden_states, weight and bias; nothing flows to
        the teacher.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; a DTensor; a number out of range.
    Cost: 2NV(H + H2) floating-point operations forward, 2NV(H + H2) + 4NVH backward, which makes both chunks of logits
        again. No host sync.
    Example:
        >>> import torch
        >>> hidden, student, teacher = torch.ones(1, 1), torch.tensor([[0.0], [0.0]]), torch.tensor([[0.25], [0.75]])
        >>> linear_jsd(hidden, student, hidden, teacher.log(), beta=0.0)
        tensor([0.1308])
    """
    hidden, weight, bias = check_head(hidden_states, weight, bias)
    names = "teacher_"
    teacher, teacher_weight, teacher_bias = check_head(teacher_hidden_states, teacher_weight, teacher_bias, names)
    shape = tuple(hidden_states.shape[:-1])
    check_shape(
        "teacher_hidden_states", teacher_hidden_states, (*shape, None), "[..., H2], leading dimensions of hidden_states"
    )
    check_shape("teacher_weight", teacher_weight, (weight.shape[0], None), "[V, H2], V as in weight")
    check_same_device(hidden_states=hidden, teacher_hidden_states=teacher)
    check_range("beta", beta, 0, 1)
    _, temperature, softcap = check_scale(temperature, softcap, None)
    chunk = check_execution(chunk_size, "exact", None, 0)[0]
    constants = (None if x is None else x.detach() for x in (teacher, teacher_weight, teacher_bias))
    return _jsd(hidden, weight, bias, *constants, float(beta), temperature, softcap, chunk).view(shape)


def linear_topk_kl(
    hidden_states: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    *,
    tail: str = "bucket",
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Forward KL from a teacher that is known by its top tokens and their log-probs, from the student's hidden states.

    With t and s the probabilities of the K tokens under teacher and student: "bucket": sum t log(t / s) +
    (1 - sum t) log((1 - sum t) / (1 - sum s)), all other tokens counted as one. "drop": the first sum alone.
    "renormalize": the first sum of t / sum t and s / sum s.

    Args:
        hidden_states: [..., H] fp32, bf16, fp16 or fp64.
        weight: [V, H], the LM head, dtypes as in `linear_logprobs`.
        teacher_ids: [..., K] int64|int32, distinct tokens in [0, V).
        teacher_log_probs: [..., K], +log p of them under the teacher over the whole vocabulary, in nats; a constant.
        tail: what becomes of the other tokens: "bucket", the default, "drop" or "renormalize".
        bias: [V], or None, the default.
        temperature: > 0, of the student, default 1.0.
        softcap: > 0, or None for no cap, the default.
    Returns:
        [...] fp32 (fp64 for fp64), in nats; >= 0 but for "drop". Differentiable in hidden_states, weight and bias.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; a number out of range; unknown tail; a token outside [0, V),
            checked on the CPU, and elsewhere only with RLHF_KERNELS_CHECK=1; without it the row becomes NaN.
    Cost: as `linear_logprobs`, and 6NKH for the K tokens' logits; only those rows of the head are gathered.
    Example:
        >>> import torch
        >>> hidden, head = torch.ones(1, 1), torch.zeros(4, 1)
        >>> linear_topk_kl(hidden, head, torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.25]]).log())
        tensor([0.1733])
    """
    check_in("tail", tail, TAILS)
    flat, weight, bias = check_head(hidden_states, weight, bias)
    ids, shape = check_index("teacher_ids", teacher_ids), tuple(hidden_states.shape[:-1])
    check_shape("teacher_ids", ids, (*shape, None), "[..., K], the teacher's tokens")
    if ids.shape[-1] < 1:
        raise ValueError(f"teacher_ids has shape {list(ids.shape)}, expected [..., K] with K >= 1")
    check_tokens("teacher_ids", ids, 0, weight.shape[0])
    check_dtype("teacher_log_probs", teacher_log_probs, FLOATS)
    check_shape("teacher_log_probs", teacher_log_probs, tuple(ids.shape), "the shape of teacher_ids")
    check_same_device(hidden_states=flat, teacher_ids=ids, teacher_log_probs=teacher_log_probs)
    _, temperature, softcap = check_scale(temperature, softcap, None)
    options = {"bias": bias, "temperature": temperature, "softcap": softcap}
    ids = ids.reshape(-1, ids.shape[-1])
    z = kept_logits(flat, weight, ids, bias)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    best = z.argmax(-1, keepdim=True)
    top = linear_logprobs(flat, weight, ids.gather(1, best).squeeze(1), **options)
    log_s = top.unsqueeze(1) - (z.gather(1, best) - z)  # log p of the likeliest, less how far each lies below it
    log_t = teacher_log_probs.detach().to(log_s.dtype).reshape(log_s.shape)
    if tail == "renormalize":
        log_s, log_t = log_s - log_s.logsumexp(1, keepdim=True), log_t - log_t.logsumexp(1, keepdim=True)
    t = log_t.exp()
    found = torch.where(t == 0, 0.0, t * (log_t - log_s)).sum(1)
    if tail == "bucket":
        rest_t, rest_s = (_log_rest(x) for x in (log_t, log_s))
        found = found + torch.where(rest_t == -torch.inf, 0.0, rest_t.exp() * (rest_t - rest_s))
    return found.view(shape)


def _log_rest(log_p):
    """log(1 - sum p) of rows of log-probs, at least log of the dtype's epsilon, or -inf where nothing can be left."""
    total = log_p.logsumexp(1).clamp(max=0.0)
    rest = -torch.expm1(total)
    smallest = torch.finfo(log_p.dtype).eps
    return torch.where(rest < smallest, torch.full_like(rest, -torch.inf), rest.clamp(min=smallest).log())


@custom_op("jsd_fwd")
def jsd_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor, teacher_weight: Tensor,
    teacher_bias: Tensor | None, beta: float, temperature: float, softcap: float | None, chunk_size: int,
) -> Tensor:  # fmt: skip
    with exact_products(hidden.device):
        return dispatch.pick("distillation", hidden).jsd_fwd(
            hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, beta, temperature, softcap, chunk_size
        )


@jsd_fwd.register_fake
def _(hidden, *rest):
    return hidden.new_empty(hidden.shape[0], dtype=accumulator_dtype(hidden))


@custom_op("jsd_bwd")
def jsd_bwd(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor, teacher_weight: Tensor,
    teacher_bias: Tensor | None, beta: float, temperature: float, softcap: float | None, chunk_size: int,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with exact_products(hidden.device):
        return dispatch.pick("distillation", hidden).jsd_bwd(
            grad, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, beta, temperature, softcap,
            chunk_size, need_hidden, need_weight, need_bias,
        )  # fmt: skip


@jsd_bwd.register_fake
def _(grad, hidden, weight, bias, *rest):
    shapes = [x.shape if need else (0,) for x, need in zip((hidden, weight), rest[-3:-1], strict=True)]
    dtype = accumulator_dtype(hidden) if bias is None else bias.dtype
    bias_grad = hidden.new_empty(weight.shape[0] if rest[-1] else 0, dtype=dtype)
    return hidden.new_empty(shapes[0]), weight.new_empty(shapes[1]), bias_grad


_jsd_bwd = direct(jsd_bwd)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _backward(ctx, grad):
    needs = ctx.needs_input_grad[:3]
    found = _jsd_bwd(grad, *ctx.saved_tensors, *ctx.options, *needs)
    return *(x if need else None for x, need in zip(found, needs, strict=True)), *(None,) * 7


_jsd = register(jsd_fwd, _backward, _setup_context, keeps_inputs=True, hidden_states=0, weight=1, bias=2)
