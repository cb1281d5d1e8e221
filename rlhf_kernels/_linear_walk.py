"""The walk over chunks of logits that computes linear.py's ops, given a backend's chunk kernels.

A matrix product fills a workspace [n, v], n tokens and v columns of the vocabulary, that is used again and again; then

    kernels.fold(chunk, state)                   adds it to the rows' running (max, sum, weighted sum, label's logit)
    kernels.gradient(chunk, upstream, results)   turns it in place into d/dlogits

and, for the KL between two heads, kernels.divergence and kernels.divergence_gradient of two chunks.

Where the gradient comes later (log-probs), the columns are walked in narrow chunks that stay in the cache, forward and
again in the backward, and each row of d weight is written once. Where the loss is known (cross-entropy, PPO), a chunk
spans the whole vocabulary of fewer tokens, because a row's gradient needs its whole sum; three products then do for
forward and backward; the KL between two heads takes such chunks too. Statistics and gradients are in fp32 (sums in
fp64) whatever the inputs' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .reference.linear import Head, _saved_dtype
from .reference.logprobs import finish_statistics
from .reference.ppo import aggregation_weights, ppo_token_loss

NARROW = 4096  # columns of a chunk when all its columns are not needed at once
TOKENS = 2048  # tokens of such a chunk
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


@dataclass
class State:
    """Running statistics of n rows."""

    max: Tensor
    sum: Tensor
    weighted: Tensor | None
    label_logit: Tensor
    here: Tensor

    @classmethod
    def start(cls, count, with_entropy, device):
        def zeros(dtype):
            return torch.zeros(count, dtype=dtype, device=device)

        weighted = zeros(torch.float64) if with_entropy else None
        lowest = torch.full((count,), float("-inf"), device=device)
        return cls(lowest, zeros(torch.float64), weighted, zeros(torch.float32), zeros(torch.bool))

    def rows(self, part):
        """The same storage, some rows of it."""
        weighted = None if self.weighted is None else self.weighted[part]
        return State(self.max[part], self.sum[part], weighted, self.label_logit[part], self.here[part])

    def results(self, kept, astray, group):
        """(log-prob, entropy, max, log sum) fp32 over the columns of all ranks; 0 where not kept, NaN where astray."""
        row_max, total, weighted, label_logit, here = self._merged(group)
        found = finish_statistics(row_max.double(), total, weighted, label_logit.double())
        logprob, entropy, log_sum = found
        lost = kept & (~here | astray)
        return tuple(
            None if x is None else torch.where(kept, x, 0.0).masked_fill(lost, float("nan")).float()
            for x in (logprob, entropy, row_max, log_sum)
        )

    def _merged(self, group):
        if group is None:
            return self.max, self.sum, self.weighted, self.label_logit, self.here
        highest = self.max.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        shift = torch.where(self.max == float("-inf"), 0.0, self.max.double() - highest)
        factor = torch.where(self.max == float("-inf"), 0.0, torch.exp(shift))
        sums = [self.sum * factor, self.label_logit.double(), self.here.double()]
        if self.weighted is not None:
            sums.append(factor * (self.weighted + self.sum * shift))
        sums = torch.stack(sums)
        dist.all_reduce(sums, group=group)
        return highest, sums[0], sums[3] if len(sums) > 3 else None, sums[1], sums[2] > 0


class Walk:
    """One call: the head, the labels, and the chunks they are cut into."""

    def __init__(self, kernels, head: Head, labels: Tensor, kept: Tensor, vocab_start: int):
        self.kernels, self.head, self.kept = kernels, head, kept.contiguous()
        self.labels = torch.where(
            self.kept, labels - vocab_start, -1
        ).contiguous()  # columns of this rank's head, or beyond it
        self.bias = None if head.bias is None else head.bias.to(torch.float32).contiguous()
        self.temperatures = None if head.temperatures is None else head.temperatures.to(torch.float32).contiguous()
        self.buffer = None

    def parts(self, size):
        """Slices of at most `size` tokens."""
        return [slice(i, min(i + size, self.head.count)) for i in range(0, self.head.count, size)]

    def columns(self):
        """Narrow slices of the vocabulary."""
        return [slice(i, min(i + NARROW, self.head.vocab)) for i in range(0, self.head.vocab, NARROW)]

    def chunk(self, part, h, columns):
        """h [n, H] times the head's rows of these columns, in the workspace."""
        n, v = h.shape[0], columns.stop - columns.start
        if self.buffer is None or self.buffer.numel() < n * v:
            self.buffer = self.kernels.workspace(n * v, h.device)
        logits, head = self.buffer[: n * v].view(n, v), self.head
        for block, weight in self.blocks(columns):
            torch.mm(h, weight.t(), out=logits[:, block.start - columns.start : block.stop - columns.start])
        temperatures = None if self.temperatures is None else self.temperatures[part]
        bias = None if self.bias is None else self.bias[columns]
        options = (temperatures, head.temperature, head.softcap, self.labels[part], self.kept[part])
        return Chunk(logits, columns.start, bias, *options)

    def blocks(self, columns):
        """The head's rows of these columns in fp32: itself, or, if they must be widened, a few at a time."""
        if self.head.weight.dtype == torch.float32:
            yield columns, self.head.weight[columns]
            return
        for start in range(columns.start, columns.stop, NARROW):
            block = slice(start, min(start + NARROW, columns.stop))
            yield block, self.head.weight[block].to(torch.float32)


class Gradients:
    """fp32 sums of d hidden, d weight and d bias; those not needed stay empty."""

    def __init__(self, walk, need_hidden, need_weight, need_bias):
        head, make = walk.head, walk.kernels.fresh
        self.walk, self.head = walk, head
        self.need_hidden, self.need_weight, self.need_bias = need_hidden, need_weight, need_bias
        zeros = head.hidden.new_zeros
        if need_hidden and head.rows is None:
            self.hidden = make(*head.hidden.shape)  # every row is written
        else:
            self.hidden = zeros(head.hidden.shape if need_hidden else 0, dtype=torch.float32)
        self.weight = make(*head.weight.shape) if need_weight else zeros(0, dtype=torch.float32)
        self.bias = zeros(head.vocab if need_bias else 0, dtype=torch.float32)
        if head.count == 0:
            self.weight.zero_()

    def add(self, dlogits, columns, h, dh, first_part):
        """Fold in d/dlogits [n, v] of these columns."""
        for block, weight in self.walk.blocks(columns):
            part = dlogits[:, block.start - columns.start : block.stop - columns.start]
            if dh is not None:
                torch.mm(part, weight, out=dh) if block.start == 0 else dh.addmm_(part, weight)
            if self.need_weight and first_part:
                torch.mm(part.t(), h, out=self.weight[block])
            elif self.need_weight:
                self.weight[block].addmm_(part.t(), h)
        if self.need_bias:
            self.bias[columns] += dlogits.sum(0)

    def hidden_part(self, part, h):
        """Where d hidden of this part is summed: in its place, or, with `rows`, in a tensor of its own."""
        if not self.need_hidden:
            return None
        return self.hidden[part] if self.head.rows is None else torch.empty_like(h)

    def finish_part(self, part, dh):
        """Spread d hidden over the rows that the labels read."""
        if dh is None or self.head.rows is None:
            return
        if dh.device.type == "cpu":
            self.hidden.index_add_(0, self.head.safe_rows(part), dh)
        else:  # index_add_ uses atomics on a GPU, index_put_ sorts: the same bits on every run
            self.hidden.index_put_((self.head.safe_rows(part),), dh, accumulate=True)

    def finish(self, dtypes, group):
        """(d hidden, d weight, d bias) in these dtypes; d hidden summed over the group."""
        if group is not None and self.need_hidden:
            dist.all_reduce(self.hidden, group=group)
        return tuple(g.to(dtype) for g, dtype in zip((self.hidden, self.weight, self.bias), dtypes))


def logprobs_fwd(walk: Walk, with_entropy, chunk_size, group):
    """(log-probs, entropy or None, row maximum, log of the row's sum), each [M]; ranks merge once, for all tokens."""
    head = walk.head
    state = State.start(head.count, with_entropy, head.hidden.device)
    for part in walk.parts(chunk_size or TOKENS):
        h = head.inputs(part, walk.kept[part])
        for columns in walk.columns():
            walk.kernels.fold(walk.chunk(part, h, columns), state.rows(part))
    return state.results(walk.kept, head.astray(slice(0, head.count)), group)


def logprobs_bwd(walk: Walk, upstream, results, needs, chunk_size, group, dtypes):
    """(d hidden, d weight, d bias): the chunks of the forward again, turned into gradients."""
    head, gradients = walk.head, Gradients(walk, *needs)
    for part in walk.parts(chunk_size or TOKENS):
        h = head.inputs(part, walk.kept[part])
        dh = gradients.hidden_part(part, h)
        here = [[None if x is None else x[part] for x in tensors] for tensors in (upstream, results)]
        for columns in walk.columns():
            chunk = walk.chunk(part, h, columns)
            walk.kernels.gradient(chunk, *here)
            gradients.add(chunk.logits, columns, h, dh, part.start == 0)
        gradients.finish_part(part, dh)
    return gradients.finish(dtypes, group)


def with_gradients(walk: Walk, token_gradients, needs, chunk_size, group, with_entropy):
    """One pass: log-probs and entropy [M], and gradients for token_gradients(part, log-prob, entropy) upstream."""
    head, gradients = walk.head, Gradients(walk, *needs)
    out = torch.zeros(2, head.count, device=head.hidden.device)
    whole = slice(0, head.vocab)
    for part in walk.parts(chunk_size or wide_tokens(head.vocab, group)):
        h = head.inputs(part, walk.kept[part])
        chunk = walk.chunk(part, h, whole)
        state = State.start(h.shape[0], with_entropy, h.device)
        walk.kernels.fold(chunk, state)
        results = state.results(walk.kept[part], head.astray(part), group)
        out[0, part] = results[0]
        if with_entropy:
            out[1, part] = results[1]
        if any(needs):
            chunk.has_bias_in = True
            dh = gradients.hidden_part(part, h)
            walk.kernels.gradient(chunk, token_gradients(part, *results[:2]), results)
            gradients.add(chunk.logits, whole, h, dh, part.start == 0)
            gradients.finish_part(part, dh)
    dtypes = [_saved_dtype(x, head) for x in (head.hidden, head.weight, head.bias)]
    return out[0], out[1], gradients.finish(dtypes, group)


def kl_logits(walk: Walk, part, h):
    """(softcap(logits + bias) [n, V], what the softcap lets through of a gradient, or None), the latter on demand."""
    head = walk.head
    x = walk.chunk(part, h, slice(0, head.vocab)).logits
    if walk.bias is not None:
        x += walk.bias
    if head.softcap is None:
        return x, lambda: None
    capped = torch.where(x == float("-inf"), x, head.softcap * torch.tanh(x / head.softcap))
    return capped, lambda: torch.where(x == float("-inf"), 0.0, 1.0 - (capped / head.softcap).square())


def kl_fwd(walk: Walk, ref: Walk, reverse, chunk_size):
    """KL [N] between the distributions of two heads."""
    out = torch.empty(walk.head.count, device=walk.head.hidden.device)
    for part in walk.parts(chunk_size or wide_tokens(2 * walk.head.vocab, None)):
        logits, ref_logits = (kl_logits(x, part, x.head.inputs(part, x.kept[part]))[0] for x in (walk, ref))
        out[part] = walk.kernels.divergence(logits, ref_logits, walk.head.temperature, reverse)[0]
    return out


def kl_bwd(grad, walk: Walk, ref: Walk, reverse, chunk_size, needs, dtypes):
    """(d hidden, d weight, d bias) of the policy: both sides' logits again, and the first side's gradient."""
    gradients, whole = Gradients(walk, *needs), slice(0, walk.head.vocab)
    for part in walk.parts(chunk_size or wide_tokens(2 * walk.head.vocab, None)):
        h = walk.head.inputs(part, walk.kept[part])
        logits, through = kl_logits(walk, part, h)
        ref_logits, _ = kl_logits(ref, part, ref.head.inputs(part, ref.kept[part]))
        dlogits = walk.kernels.divergence_gradient(grad[part], logits, ref_logits, walk.head.temperature, reverse)
        if (slope := through()) is not None:
            dlogits *= slope
        dh = gradients.hidden_part(part, h)
        gradients.add(dlogits, whole, h, dh, part.start == 0)
        gradients.finish_part(part, dh)
    return gradients.finish(dtypes, None)


def wide_tokens(vocab, group):
    """Tokens of a chunk that spans the vocabulary; ranks with shards of other sizes must agree."""
    return TOKENS if group is not None else max(64, WIDE_BYTES // (4 * vocab) // 64 * 64)


def ppo_upstream(mask, loss_agg_mode, normalizer, old_log_probs, advantages, clipping, entropy_coef):
    """token_gradients of the PPO policy loss: (d loss / d log-prob, d loss / d entropy or None) of some tokens."""
    weights = aggregation_weights(mask, loss_agg_mode, normalizer, torch.float32).reshape(-1)
    old, advantage = (torch.where(mask, x.to(torch.float32), 0.0).reshape(-1) for x in (old_log_probs, advantages))

    def token_gradients(part, logprob, entropy):
        _, slope = ppo_token_loss(logprob, old[part], advantage[part], **clipping)
        return weights[part] * slope, -entropy_coef * weights[part] if entropy_coef else None

    return token_gradients
