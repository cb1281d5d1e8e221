"""The walk over chunks of logits that computes the op linear, given a backend's chunk kernels.

A matrix product fills a workspace [n, v], n tokens and v columns of the vocabulary, that is used again and again; then

    kernels.fold(chunk, state)                   adds it to the rows' running (max, sum of the others, weighted sum,
                                                 label's logit), and to their extras if the state has any
    kernels.gradient(chunk, upstream, results)   turns it into d/dlogits

    kernels.row_sums(chunk, total, count)        adds its entries that are not -inf, after fold, and their number

and, for the KL between two heads, kernels.divergence and kernels.divergence_gradient of two chunks. Sizes of chunks and
the matrix products are the backend's too: class Kernels.

Where the gradient comes later (log-probs), the columns are walked in narrow chunks, forward and again in the backward,
and each row of d weight is written once for each chunk of tokens. Where the loss is known (cross-entropy, PPO), a chunk
spans the whole vocabulary of fewer tokens, because a row's gradient needs its whole sum; three products then do for
forward and backward. So do log-probs and KL for a head that is not trained: their slopes take two products. The KL
between two heads takes such chunks too. Statistics and sums of gradients are in fp32 or
fp64 whatever the inputs' dtype. _linear_backend.py makes a backend's functions of it.

With a LoRA layer on the head, each chunk's logits get low up^T in fp32, and d low and d up are products of d/dlogits as
d hidden and d weight are, in the same dtype of factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ._linear_gradients import Gradients, Inputs
from .reference._head import Head, Rows
from .reference.kl import merge_divergence
from .reference.linear import _saved_dtype, gaps
from .reference.logprobs import Upstream, finish_extras, finish_statistics, raised, whole_rest

NARROW = 4096  # columns of a chunk when all its columns are not needed at once
TOKENS = 2048  # tokens of such a chunk
NOWHERE = -(1 << 62)  # the label of rows that do not count
WIDE_BYTES = 128 << 20  # size of a chunk that spans the vocabulary


@dataclass
class Chunk:
    """Logits [n, v] without bias, and what turns them into z."""

    logits: Tensor
    first: int  # the vocabulary's entry in column 0
    bias: Tensor | None  # [v]
    temperatures: Tensor | None  # [n]
    temperature: float
    softcap: float | None
    labels: Tensor  # [n]
    kept: Tensor  # [n]
    has_bias_in: bool = False

    def part(self, columns):
        """Some of its columns; the same storage."""
        bias = None if self.bias is None else self.bias[columns]
        return replace(self, logits=self.logits[:, columns], first=self.first + columns.start, bias=bias)


@dataclass
class State:
    """Running statistics of n rows."""

    max: Tensor
    rest: Tensor
    weighted: Tensor | None
    label_logit: Tensor
    here: Tensor
    extras: tuple[Tensor, ...] | None = None  # `partial_extras`; the last as columns of this rank's head

    @classmethod
    def start(cls, count, with_entropy, device, with_extras=False):
        def zeros(dtype):
            return torch.zeros(count, dtype=dtype, device=device)

        weighted = zeros(torch.float64) if with_entropy else None
        lowest = torch.full((count,), float("-inf"), dtype=torch.float32, device=device)
        extras = None
        if with_extras:
            extras = (*(zeros(torch.float64) for _ in range(3)), zeros(torch.int64) - 1)
        return cls(lowest, zeros(torch.float64), weighted, zeros(torch.float32), zeros(torch.bool), extras)

    def rows(self, part):
        """The same storage, some rows of it."""
        weighted = None if self.weighted is None else self.weighted[part]
        extras = None if self.extras is None else tuple(x[part] for x in self.extras)
        return State(self.max[part], self.rest[part], weighted, self.label_logit[part], self.here[part], extras)

    def results(self, kept, astray, group):
        """`Rows` fp32 without sums; 0 where not kept, NaN where the label or row is nowhere."""
        return self._rows(self._merged(group), kept, astray)

    @staticmethod
    def _rows(merged, kept, astray):
        row_max, rest, weighted, label_logit, here = merged
        row_max = row_max.double()
        logprob, entropy, log_sum = finish_statistics(row_max, rest, weighted, label_logit.double())
        found, nothing = kept & here & ~astray, torch.where(kept, float("nan"), 0.0).double()
        rows = (logprob, entropy, row_max, log_sum)
        return Rows(*(None if x is None else torch.where(found, x, nothing).float() for x in rows))

    def statistics(self, labels, kept, astray, group=None, vocab_start=0):
        """(`Rows` without sums, log sum p^2, mean of the entries that are not -inf, whether the label is the first)."""
        merged = self._merged(group)
        highest, rest, here = merged[0], merged[1], merged[4]
        squares, total, count, first = self.extras
        if group is not None:
            joined, top, _ = raised(self.max.double(), squares, highest.double(), 2.0)
            sums = torch.stack([joined, top, total, count])
            dist.all_reduce(sums, group=group)
            squares, total, count = whole_rest(sums[0], sums[1]), *sums[2:].unbind()
            first = torch.where(top > 0.0, first + vocab_start, torch.iinfo(torch.int64).max)
            dist.all_reduce(first, op=dist.ReduceOp.MIN, group=group)
            first -= vocab_start
        lost = kept & (~here | astray)
        more = (x.float() for x in finish_extras(highest.double(), rest, squares, total, count))
        more = (torch.where(kept, x, 0.0).masked_fill(lost, float("nan")) for x in more)
        top = kept & ~lost & (first == labels) & (highest > float("-inf"))
        return self._rows(merged, kept, astray), *more, top

    def _merged(self, group):
        if group is None:
            return self.max, self.rest, self.weighted, self.label_logit, self.here
        highest = self.max.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        joined, top, fall = raised(self.max.double(), self.rest, highest.double())
        sums = [joined, top, self.label_logit.double(), self.here.double()]
        if self.weighted is not None:
            sums.append(torch.exp(fall) * (self.weighted + (1.0 + self.rest) * fall))
        sums = torch.stack(sums)
        dist.all_reduce(sums, group=group)
        weighted = None if self.weighted is None else sums[4]
        return highest, whole_rest(sums[0], sums[1]), weighted, sums[2], sums[3] > 0


class Kernels:
    """What the walk asks of a backend beside `fold`, `gradient`, `divergence` and `divergence_gradient`; for a CPU.

    A chunk of narrow columns stays in the cache, and matrix products are in fp32.
    """

    @staticmethod
    def workspace(size, device):
        """Memory [size] fp32 for the logits of chunks."""
        return torch.empty(size, dtype=torch.float32, device=device)

    @staticmethod
    def fresh(shape, device):
        """An uninitialised fp32 result."""
        return torch.empty(shape, dtype=torch.float32, device=device)

    @staticmethod
    def tokens(count):
        """Tokens of a chunk of narrow columns."""
        return TOKENS

    @staticmethod
    def columns(vocab):
        """Columns of such a chunk in a forward."""
        return NARROW

    @staticmethod
    def backward_columns(vocab):
        """Columns of such a chunk in a backward, which reads and writes d hidden once for each."""
        return NARROW

    @staticmethod
    def wide_tokens(count, vocab, group):
        """Tokens of a chunk that spans the vocabulary; ranks with shards of other sizes must agree."""
        return TOKENS if group is not None else max(64, WIDE_BYTES // (4 * vocab) // 64 * 64)

    @staticmethod
    def gradient_columns(vocab):
        """Columns of a chunk that are turned into gradients at a time."""
        return vocab

    @staticmethod
    def row_stride(columns):
        """Entries between the rows of a chunk of so many columns."""
        return columns

    @staticmethod
    def inputs(head, part, kept):
        """Hidden states [n, H] of a slice of labels, 0 where not kept, as the products take them."""
        return head.inputs(part, kept)

    @staticmethod
    def blocks(weight, columns, dtype=torch.float32):
        """The head's rows of these columns in the products' dtype: itself, or, cast, a few at a time."""
        if weight.dtype == dtype:
            yield columns, weight[columns]
            return
        for start in range(columns.start, columns.stop, NARROW):
            block = slice(start, min(start + NARROW, columns.stop))
            yield block, weight[block].to(dtype)

    @staticmethod
    def product(a, b, out, add=False, unit=None):
        """out = a b in fp32, or out + a b; `unit` is what `gradient` returned beside one of the factors."""
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)

    @staticmethod
    def whole_rows(chunk, with_entropy):
        """`Rows` without sums of a chunk that spans the vocabulary, bias added to it; or None: then `fold` does it."""
        return None

    @staticmethod
    def common_unit(walk, upstream):
        """The unit of every d/dlogits of a backward, in which its sums are kept; None if `gradient` returns none."""
        return None

    @staticmethod
    def capped(logits, bias, softcap):
        """softcap(logits + bias), in place if that is as good."""
        if bias is not None:
            logits += bias
        return logits if softcap is None else cap(logits, softcap)


def cap(x, softcap):
    """softcap * tanh(x / softcap); -inf stays -inf."""
    return torch.where(x == float("-inf"), x, softcap * torch.tanh(x / softcap))


class Walk:
    """One call: the head, the labels, and the chunks they are cut into."""

    def __init__(self, kernels: Kernels, head: Head, labels: Tensor, kept: Tensor, vocab_start: int):
        self.kernels, self.head, self.kept, self.vocab_start = kernels, head, kept.contiguous(), vocab_start
        columns = labels - vocab_start if vocab_start else labels  # of this rank's head, or beyond it
        self.labels = torch.where(self.kept, columns, NOWHERE).contiguous()
        self.bias = None if head.bias is None else head.bias.to(torch.float32).contiguous()
        self.temperatures = None if head.temperatures is None else head.temperatures.to(torch.float32).contiguous()
        self.buffer = None

    def parts(self, size):
        """Slices of at most `size` tokens."""
        return [slice(i, min(i + size, self.head.count)) for i in range(0, self.head.count, size)]

    def columns(self, size):
        """Slices of the vocabulary of at most `size` columns."""
        return [slice(i, min(i + size, self.head.vocab)) for i in range(0, self.head.vocab, size)]

    def inputs(self, part):
        kept = self.kept[part]
        return Inputs(self.kernels.inputs(self.head, part, kept), self.head.low_inputs(part, kept))

    def chunk(self, part, inputs, columns):
        """The inputs times the head's rows of these columns, in the workspace."""
        h, low = inputs
        n, v = h.shape[0], columns.stop - columns.start
        stride = self.kernels.row_stride(v)
        if self.buffer is None or self.buffer.numel() < n * stride:
            self.buffer = self.kernels.workspace(n * stride, h.device)
        logits, head = self.buffer[: n * stride].view(n, stride)[:, :v], self.head
        for block, weight in self.kernels.blocks(head.weight, columns):
            part_of_logits = logits[:, block.start - columns.start : block.stop - columns.start]
            self.kernels.product(h, weight.t(), part_of_logits)
        if low is not None:
            logits.addmm_(low, head.up[columns].to(torch.float32).t())
        temperatures = None if self.temperatures is None else self.temperatures[part]
        bias = None if self.bias is None else self.bias[columns]
        options = (temperatures, head.temperature, head.softcap, self.labels[part], self.kept[part])
        return Chunk(logits, columns.start, bias, *options)


def logprobs_fwd(walk: Walk, with_entropy, chunk_size, group, with_sums=False):
    """`Rows`, each [M]; ranks merge once, for all tokens."""
    head, kernels, device = walk.head, walk.kernels, walk.head.hidden.device
    parts = walk.parts(chunk_size or kernels.tokens(head.count))
    one = len(parts) == 1 and head.vocab <= kernels.columns(head.vocab)
    if one and group is None and head.rows is None and not with_sums:
        chunk = walk.chunk(parts[0], walk.inputs(parts[0]), slice(0, head.vocab))
        if (rows := kernels.whole_rows(chunk, with_entropy)) is not None:
            return rows
    state, sums = State.start(head.count, with_entropy, device), _sums(head.count, with_sums, device)
    for part in parts:
        inputs = walk.inputs(part)
        for columns in walk.columns(kernels.columns(head.vocab)):
            chunk = walk.chunk(part, inputs, columns)
            kernels.fold(chunk, state.rows(part))
            if with_sums:
                kernels.row_sums(chunk, *sums[:, part])
    return _results(state, sums, walk.kept, head.astray(slice(0, head.count)), group)


def token_statistics_fwd(walk: Walk, chunk_size, group):
    """As `State.statistics`."""
    head, kernels = walk.head, walk.kernels
    state = State.start(head.count, True, head.hidden.device, with_extras=True)
    for part in walk.parts(chunk_size or kernels.tokens(head.count)):
        inputs = walk.inputs(part)
        for columns in walk.columns(kernels.columns(head.vocab)):
            kernels.fold(walk.chunk(part, inputs, columns), state.rows(part))
    return state.statistics(walk.labels, walk.kept, head.astray(slice(0, head.count)), group, walk.vocab_start)


def _sums(count, wanted, device):
    """Totals and numbers of entries of rows, for `Kernels.row_sums`; or None."""
    return torch.zeros(2, count, dtype=torch.float64, device=device) if wanted else None


def _results(state, sums, kept, astray, group):
    """`Rows`, with what comes from the sums if there are any."""
    rows = state.results(kept, astray, group)
    return rows if sums is None else Rows(*rows[:4], *gaps(rows.max, *sums, group))


def logprobs_bwd(walk: Walk, upstream, results, needs, chunk_size, group, dtypes):
    """The gradients of `Gradients`: the chunks of the forward again, turned into them."""
    head, kernels = walk.head, walk.kernels
    gradients = Gradients(walk, *needs, unit=kernels.common_unit(walk, upstream))
    for part in walk.parts(chunk_size or kernels.tokens(head.count)):
        inputs = walk.inputs(part)
        sums = gradients.start_part(part, inputs)
        some = Upstream(*(None if g is None else g[part] for g in upstream))
        rows = Rows(*(None if x is None else x[part] for x in results))
        for columns in walk.columns(kernels.backward_columns(head.vocab)):
            dlogits, unit = kernels.gradient(walk.chunk(part, inputs, columns), some, rows)
            gradients.add(dlogits, unit, columns, inputs, sums, part.start == 0)
        gradients.finish_part(part, sums)
    return gradients.finish(dtypes, group)


def with_gradients(walk: Walk, token_gradients, needs, chunk_size, group, with_entropy, apart=False, with_sums=False):
    """One pass: log-probs and entropy [M], and the gradients of token_gradients(part, `Rows`), an `Upstream`."""
    head, kernels, gradients = walk.head, walk.kernels, Gradients(walk, *needs, apart=apart)
    logprobs, entropy = (torch.zeros(head.count, dtype=torch.float32, device=head.hidden.device) for _ in range(2))
    for part in walk.parts(chunk_size or kernels.wide_tokens(head.count, head.vocab, group)):
        inputs = walk.inputs(part)
        chunk = walk.chunk(part, inputs, slice(0, head.vocab))
        whole = group is None and head.rows is None and not with_sums  # `rows` may lead astray
        rows = kernels.whole_rows(chunk, with_entropy) if whole else None
        if rows is None:
            count, device = part.stop - part.start, head.hidden.device
            state, totals = State.start(count, with_entropy, device), _sums(count, with_sums, device)
            kernels.fold(chunk, state)
            if with_sums:
                kernels.row_sums(chunk, *totals)
            rows = _results(state, totals, walk.kept[part], head.astray(part), group)
        logprobs[part] = rows.log_prob
        if with_entropy:
            entropy[part] = rows.entropy
        upstream = token_gradients(part, rows)
        if any(needs):
            chunk.has_bias_in = True
            sums = gradients.start_part(part, inputs)
            for columns in walk.columns(kernels.gradient_columns(head.vocab)):
                dlogits, unit = kernels.gradient(chunk.part(columns), upstream, rows)
                gradients.add(dlogits, unit, columns, inputs, sums, part.start == 0)
            gradients.finish_part(part, sums)
    tensors = (head.hidden, head.weight, head.bias, head.low, head.up)
    dtypes = [head.dtype if apart else _saved_dtype(x, head) for x in tensors]
    return logprobs, entropy, gradients.finish(dtypes, group)


@dataclass
class Divergence:
    """KL between the distributions of two heads, chunk by chunk."""

    walk: Walk
    ref: Walk
    reverse: bool
    chunk_size: int
    group: object

    def chunks(self):
        """(part, policy's inputs, logits of both, results of `kernels.divergence` over all ranks' columns)."""
        head, kernels = self.walk.head, self.walk.kernels
        for part in self.walk.parts(self.chunk_size or kernels.wide_tokens(head.count, 2 * head.vocab, self.group)):
            sides, inputs = [], []
            for walk in (self.walk, self.ref):
                inputs.append(walk.inputs(part))
                logits = walk.chunk(part, inputs[-1], slice(0, head.vocab)).logits
                sides.append(kernels.capped(logits, walk.bias, head.softcap))
            results = kernels.divergence(*sides, head.temperature, self.reverse)
            results = merge_divergence(results, self.group, head.temperature)
            yield part, inputs[0], sides, [results[0].masked_fill(head.astray(part), float("nan")), *results[1:]]

    def add(self, gradients, part, inputs, sides, results, upstream):
        """Fold in the gradients of upstream [n] * KL."""
        head, kernels = self.walk.head, self.walk.kernels
        sums = gradients.start_part(part, inputs)
        upstream = upstream.masked_fill(head.astray(part), float("nan"))
        for columns in self.walk.columns(kernels.gradient_columns(head.vocab)):
            some = [side[:, columns] for side in sides]
            dlogits, unit = kernels.divergence_gradient(upstream, *some, results, head, self.reverse)
            gradients.add(dlogits, unit, columns, inputs, sums, part.start == 0)
        gradients.finish_part(part, sums)


def kl_fwd(divergence: Divergence, with_slopes):
    """KL [M], and slopes [M, H] or [0]."""
    head = divergence.walk.head
    gradients = Gradients(divergence.walk, with_slopes, False, False, apart=True)
    out = torch.empty(head.count, dtype=torch.float32, device=head.hidden.device)
    for part, inputs, sides, results in divergence.chunks():
        out[part] = results[0]
        if with_slopes:
            divergence.add(gradients, part, inputs, sides, results, torch.ones_like(out[part]))
    return out, gradients.finish((head.dtype,) * 3, divergence.group)[0]


def kl_bwd(grad, divergence: Divergence, needs, dtypes):
    """(d hidden, d weight, d bias) of the policy: both sides' logits again, and the first side's gradient."""
    gradients = Gradients(divergence.walk, *needs)
    for part, inputs, sides, results in divergence.chunks():
        divergence.add(gradients, part, inputs, sides, results, grad[part])
    return gradients.finish(dtypes, divergence.group)
