"""Attention over `[prompt | response_1 | ... | response_K]` in parts that need no mask: tensors in, tensors out.

A part is a stretch of queries and the stretch of keys that it sees, all of them or each up to itself. The softmax over
a query's keys falls apart over its parts: if part i alone gives the output O_i and the log-sum-exp L_i of its scores,

    L = log sum_i exp(L_i),    O = sum_i exp(L_i - L) O_i.

The backward is P = exp(S - L), dS = P (dP - rowsum(dO O)): of the other parts it reads L and O only. So the part's own
backward kernel, given the merged L and O in place of its own, returns exactly its share of dQ, dK and dV.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference.packing import PADDING

PAIRS_A_CALL = 4096  # a call of the kernel takes as long as so many pairs of a query and a key; docs/ops/packing.md
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FORWARD, _BACKWARD = (
    getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}", None) for end in ("", "_backward")
)


class Part(NamedTuple):
    """Queries first .. last-1 of a row see keys key_first .. key_last-1, if causal each query those up to itself.

    Merged: the same queries have an earlier part.
    """

    row: int
    first: int
    last: int
    key_first: int
    key_last: int
    causal: bool
    merged: bool

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that are computed."""
        size = self.last - self.first
        return size * (size + 1) // 2 if self.causal else size * (self.key_last - self.key_first)


def segment_runs(layout: Tensor) -> list[list[tuple[int, int, int, int]]]:
    """For each row of the layout [B, 1, 2, L], in order: (block, segment, first token, last token + 1)."""
    rows = []
    for row in layout[:, 0].cpu().unbind():
        edges = ((row[:, 1:] != row[:, :-1]).any(0).nonzero().flatten() + 1).tolist()
        starts = [0, *edges] if row.shape[1] else []
        ids = row[:, starts].T.tolist()
        rows.append([(*pair, *ends) for pair, ends in zip(ids, zip(starts, [*edges, row.shape[1]]))])
    return rows


def attention_parts(layout: Tensor) -> list[Part]:
    """The parts of a layout [B, 1, 2, L]. The first response goes on behind its prompt as one causal text.

    Raises:
        ValueError: the tokens of a block do not begin with its prompt.
    """
    parts = []
    for row, runs in enumerate(segment_runs(layout)):
        for block, group in itertools.groupby(runs, key=lambda run: run[0]):
            if block == PADDING:
                continue
            (_, segment, start, prompt_end), *responses = group
            if segment != 0:
                raise ValueError(
                    f"layout: in row {row} the responses of block {block} stand without their prompt before them"
                )
            text_end = responses[0][3] if responses else prompt_end
            parts.append(Part(row, start, text_end, start, text_end, True, False))
            if len(responses) > 1:
                parts.append(Part(row, text_end, responses[-1][3], start, prompt_end, False, False))
                parts += [Part(row, first, last, first, last, True, True) for _, _, first, last in responses[1:]]
    return parts


def longest_text(layout: Tensor) -> int:
    """Tokens of the longest prompt with its response."""
    longest = prompt = 0
    for part in attention_parts(layout):
        if part.causal:
            longest = max(longest, part.last - part.first + (prompt if part.merged else 0))
        else:
            prompt = part.key_last - part.key_first
    return longest


def two_part_is_faster(layout: Tensor) -> bool:
    """Whether the parts take less time than all L^2 pairs of each row under the dense mask. By tokens alone."""
    parts, (rows, _, _, length) = attention_parts(layout), layout.shape
    return sum(part.pairs + PAIRS_A_CALL for part in parts) < rows * (length * length + PAIRS_A_CALL)


def why_not_two_part(query: Tensor, value: Tensor) -> str | None:
    """What stands against the kernel of one part with these tensors; None: nothing."""
    if _FORWARD is None or _BACKWARD is None:
        return f"torch {torch.__version__} has no flash attention for the CPU"
    if query.device.type != "cpu":
        return f"the tensors are on {query.device}; the kernel of a part is for the CPU"
    if query.dtype not in DTYPES:
        return f"the kernel of a part does not take {query.dtype}"
    if query.shape[-1] != value.shape[-1]:
        return f"the heads of query and value differ in size ({query.shape[-1]} and {value.shape[-1]})"
    return None


def _queries(tensor: Tensor, part: Part, groups: int) -> Tensor:
    """The part's queries of [B, H, L, ...] as a view [H / groups, groups, n, ...]."""
    return tensor[part.row, :, part.first : part.last].unflatten(0, (groups, -1)).transpose(0, 1)


def _keys(tensor: Tensor, part: Part, repeats: int) -> Tensor:
    """The part's keys of [B, groups, L, D] as a view [repeats, groups, m, D]."""
    return tensor[part.row, :, part.key_first : part.key_last].expand(repeats, -1, -1, -1)


def _readable(tensor: Tensor) -> Tensor:
    """The kernel takes the last dimension for contiguous without a look."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class TwoPartAttention(torch.autograd.Function):
    """query [B, H, L, D], key and value [B, G, L, D], parts, padding, scale -> [B, H, L, D].

    Each of the G heads of keys serves H / G heads of queries. Padding, the indices (rows, tokens), sees itself: its
    output is its value.
    """

    @staticmethod
    def forward(ctx, query, key, value, parts, padding, scale):
        query, key, value = map(_readable, (query, key, value))
        batch, heads, length, size = query.shape
        groups, repeats = key.shape[1], heads // key.shape[1]
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = query.new_empty(batch, length, heads, size).transpose(1, 2)
        lse = query.new_zeros(batch, length, heads, dtype=exact).transpose(1, 2)
        for part in parts:
            queries, keys, values = (
                _queries(query, part, groups),
                _keys(key, part, repeats),
                _keys(value, part, repeats),
            )
            part_out, part_lse = _FORWARD(queries, keys, values, 0.0, part.causal, scale=scale)
            whole_out, whole_lse = _queries(out, part, groups), _queries(lse, part, groups)
            if part.merged:
                share = torch.sigmoid(part_lse - whole_lse)[..., None]  # exp(L_i - L)
                part_out = torch.lerp(whole_out.to(exact), part_out.to(exact), share)
                part_lse = torch.logaddexp(part_lse, whole_lse)
            whole_out.copy_(part_out)
            whole_lse.copy_(part_lse)
        rows, tokens = padding
        out[rows, :, tokens] = value[rows, :, tokens].repeat_interleave(repeats, 1)
        ctx.save_for_backward(query, key, value, out, lse, rows, tokens)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, out, lse, rows, tokens = ctx.saved_tensors
        grad_out = _readable(grad_out)
        groups, repeats = key.shape[1], query.shape[1] // key.shape[1]
        grads = [torch.zeros_like(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value)]
        for part in ctx.parts:
            upstream, queries, whole_out, whole_lse = (_queries(x, part, groups) for x in (grad_out, query, out, lse))
            keys, values = (_keys(x, part, repeats) for x in (key, value))
            grad_queries, *grad_keys = _BACKWARD(
                upstream, queries, keys, values, whole_out, whole_lse, 0.0, part.causal, scale=ctx.scale
            )
            _queries(grads[0], part, groups).add_(grad_queries)
            for grad, grad_key in zip(grads[1:], grad_keys):
                grad[part.row, :, part.key_first : part.key_last].add_(grad_key.sum(0))
        grads[2][rows, :, tokens] = grad_out[rows, :, tokens].unflatten(1, (groups, repeats)).sum(2)
        return (*grads, None, None, None)


@torch.compiler.disable
def two_part_attention(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float | None) -> Tensor:
    """[B, H, L, D]: attention under the mask of the layout [B, 1, 2, L], which is never made."""
    padding = (layout[:, 0, 0] == PADDING).nonzero(as_tuple=True)
    return TwoPartAttention.apply(query, key, value, attention_parts(layout), padding, scale)
