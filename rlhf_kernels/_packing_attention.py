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

from ._autograd import check_reverse_mode, differentiated_last
from .reference.packing import PADDING

CALL_COST = 2**21  # a call of the kernel takes as long as so many multiplications of a query with a key
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
    def queries(self) -> tuple:
        """Index into [B, H / G, G, L, ...]."""
        return self.row, slice(None), slice(None), slice(self.first, self.last)

    @property
    def keys(self) -> tuple:
        """Index into [B, H / G, G, L, D]."""
        return self.row, slice(None), slice(None), slice(self.key_first, self.key_last)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that are computed: the kernel goes by blocks, which causality seldom spares."""
        return (self.last - self.first) * (self.key_last - self.key_first)


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


def two_part_is_faster(layout: Tensor, hidden_size: int) -> bool:
    """Whether the parts take less time than all L^2 pairs of each row under the dense mask."""
    parts, (rows, _, _, length) = attention_parts(layout), layout.shape
    saved = rows * length * length - sum(part.pairs for part in parts)
    return saved * hidden_size > CALL_COST * (len(parts) - 1)


def why_not_two_part(query: Tensor, value: Tensor) -> str | None:
    """What stands against the kernel of one part with these tensors; None: nothing."""
    if _FORWARD is None or _BACKWARD is None:
        return f"torch {torch.__version__} has no flash attention for the CPU"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is at work, which the kernel of a part does not know"
    if query.device.type != "cpu":
        return f"the tensors are on {query.device}; the kernel of a part is for the CPU"
    if query.dtype not in DTYPES:
        return f"the kernel of a part does not take {query.dtype}"
    if query.shape[-1] != value.shape[-1]:
        return f"the heads of query and value differ in size ({query.shape[-1]} and {value.shape[-1]})"
    return None


def _readable(tensor: Tensor) -> Tensor:
    """The kernel takes the last dimension for contiguous without a look."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """[B, H, L, ...] -> the view [B, H / groups, groups, L, ...]: the heads that share keys lie along one dimension."""
    return tensor.unflatten(1, (groups, -1)).transpose(1, 2)


def _repeated(tensor: Tensor, repeats: int) -> Tensor:
    """[B, groups, L, D] -> the view [B, repeats, groups, L, D]."""
    return tensor[:, None].expand(-1, repeats, -1, -1, -1)


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
        queries, outs, lses = (_grouped(x, groups) for x in (query, out, lse))
        keys, values = (_repeated(x, repeats) for x in (key, value))
        for part in parts:
            at, seen = part.queries, part.keys
            found, found_lse = _FORWARD(queries[at], keys[seen], values[seen], 0.0, part.causal, scale=scale)
            if part.merged:
                share = torch.sigmoid(found_lse - lses[at])[..., None]  # exp(L_i - L)
                found = torch.lerp(outs[at].to(exact), found.to(exact), share)
                found_lse = torch.logaddexp(found_lse, lses[at])
            outs[at].copy_(found)
            lses[at].copy_(found_lse)
        rows, tokens = padding
        out[rows, :, tokens] = value[rows, :, tokens].repeat_interleave(repeats, 1)
        ctx.save_for_backward(query, key, value, out, lse, rows, tokens)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        with torch.no_grad():
            gradients = TwoPartAttention.gradients(ctx, grad_out)
        if torch.is_grad_enabled():
            gradients = differentiated_last("shared_prefix_attention", gradients, (*ctx.saved_tensors[:3], grad_out))
        return *gradients, None, None, None

    @staticmethod
    def gradients(ctx, grad_out):
        """Those of query, key and value."""
        query, key, value, out, lse, rows, tokens = ctx.saved_tensors
        grad_out = _readable(grad_out)
        groups, repeats = key.shape[1], query.shape[1] // key.shape[1]
        grad_query, grad_key, grad_value = (
            torch.zeros_like(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value)
        )
        upstream, queries, outs, lses = (_grouped(x, groups) for x in (grad_out, query, out, lse))
        keys, values = (_repeated(x, repeats) for x in (key, value))
        grad_queries = _grouped(grad_query, groups)
        for part in ctx.parts:
            at, seen = part.queries, part.keys
            tensors = (upstream[at], queries[at], keys[seen], values[seen], outs[at], lses[at])
            shares = _BACKWARD(*tensors, 0.0, part.causal, scale=ctx.scale)
            grad_queries[at].add_(shares[0])
            for grad, share in zip((grad_key, grad_value), shares[1:]):
                share = share.sum(0) if repeats > 1 else share[0]
                grad[part.row, :, part.key_first : part.key_last].add_(share)
        grad_value[rows, :, tokens] = grad_out[rows, :, tokens].unflatten(1, (groups, repeats)).sum(2)
        return grad_query, grad_key, grad_value


def two_part_attention(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float | None) -> Tensor:
    """[B, H, L, D]: attention under the mask of the layout [B, 1, 2, L], which is never made.

    The parts are read on the host: compiled programs leave it as it is. Decorating it would import the compiler with
    this module, which takes longer than torch itself.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.disable(_two_part_attention)(query, key, value, layout, scale)
    check_reverse_mode(("query", "key", "value"), (query, key, value))
    return _two_part_attention(query, key, value, layout, scale)


def _two_part_attention(query, key, value, layout, scale):
    padding = (layout[:, 0, 0] == PADDING).nonzero(as_tuple=True)
    return TwoPartAttention.apply(query, key, value, attention_parts(layout), padding, scale)
