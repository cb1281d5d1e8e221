"""Divergences between two models' next-token distributions, from hidden states and LM heads, without logits."""

from __future__ import annotations

from torch import Tensor

from . import _linear_ops as ops
from ._checks import check_in, check_index, check_same_device, check_shape
from ._linear_checks import check_execution, check_head, check_scale, wants_slopes
from .kl import DIRECTIONS


def linear_kl(
    hidden_states: Tensor,
    weight: Tensor,
    ref_hidden_states: Tensor,
    ref_weight: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    direction: str = "reverse",
    chunk_size: int | None = None,
    precision: str = "exact",
    process_group=None,
) -> Tensor:
    """Exact KL divergence between two models' next-token distributions, from hidden states and LM heads.

    `kl_from_logits` of hidden_states weight^T + bias and ref_hidden_states ref_weight^T + ref_bias, both scaled by
    softcap and temperature as in `linear_logprobs`; neither [N, V] tensor ever exists. The reference is a constant.

    Args:
        hidden_states: [..., H] fp32, bf16, fp16 or fp64, the policy's; [N, H] with rows.
        weight: [V, H], dtypes as in `linear_logprobs`.
        ref_hidden_states: [..., H2], the reference's, with the same leading dimensions; H2 may differ from H.
        ref_weight: [V, H2]; may be the policy's own head.
        rows: [M] int64|int32 in [0, N), the rows of both hidden states to compare; None, the default: all.
        bias: [V], or None, the default.
        ref_bias: [V], or None, the default.
        temperature: > 0, divides both, default 1.0.
        softcap: > 0, applied to both, or None for no cap, the default.
        direction: "reverse", the default: KL(policy || reference); "forward": KL(reference || policy).
        chunk_size: tokens handled at a time; default None: the backend chooses.
        precision: "exact", the default, or "fast", as in `linear_logprobs`.
        process_group: ranks that hold the vocabulary's columns of both heads, cut at the same places, default None.
    Returns:
        [...], or [M] with rows, fp32 (fp64 for fp64 hidden_states), in nats, >= 0; +inf where a bias of -inf makes it
        so. Differentiable in hidden_states, weight and bias; nothing flows to the reference.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; a DTensor; a number out of range; a row out of range (as a
            label in `linear_logprobs`); unknown direction.
    Cost: 2NV(H + H2) floating-point operations forward, 2NV(H + H2) + 4NVH backward; two chunks of logits in fp32.
        Where only hidden_states need a gradient: 2NVH more forward, none backward. No host sync.
    Example:
        >>> import torch
        >>> hidden, head = torch.ones(1, 1), torch.tensor([[0.0], [0.0]])
        >>> linear_kl(hidden, head, hidden, torch.log(torch.tensor([[0.25], [0.75]])))
        tensor([0.1438])
    """
    hidden, weight, bias = check_head(hidden_states, weight, bias)
    ref_hidden, ref_weight, ref_bias = check_head(ref_hidden_states, ref_weight, ref_bias, "ref_")
    shape = hidden_states.shape[:-1]
    check_shape(
        "ref_hidden_states", ref_hidden_states, (*shape, ref_hidden.shape[-1]), "leading dimensions of hidden_states"
    )
    check_shape("ref_weight", ref_weight, (weight.shape[0], None), "[V, H2], V as in weight")
    if rows is not None:
        rows = check_index("rows", rows)
        check_shape("rows", rows, (None,), "[M]")
        if hidden_states.dim() != 2:
            raise ValueError(f"hidden_states has shape {list(hidden_states.shape)}, expected [N, H] to go with rows")
        shape = rows.shape
    check_same_device(hidden_states=hidden, ref_hidden_states=ref_hidden, rows=rows)
    _, temperature, softcap = check_scale(temperature, softcap, None)
    check_in("direction", direction, DIRECTIONS)
    execution = check_execution(chunk_size, precision, process_group, 0)[:3]
    return ops.kl(
        hidden, weight, ref_hidden.detach(), ref_weight.detach(), rows, bias,
        None if ref_bias is None else ref_bias.detach(), temperature, softcap, direction == "reverse",
        wants_slopes(hidden, weight, bias), *execution,
    )[0].view(shape)  # fmt: skip
