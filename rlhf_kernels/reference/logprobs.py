"""Log-probs and entropy of rows of logits: the definition that every backend is tested against.

    z = softcap * tanh(logits / softcap) / temperature        (no softcap: z = logits / temperature)
    log p_j = (z_j - m) - log s,    m = max_j z_j = z_k,    s = 1 + r,    r = sum_{j != k} exp(z_j - m)
    entropy = -sum_j p_j log p_j = log s - sum_j p_j (z_j - m)

The maximum's own 1 stays out of r, and log s is log1p(r): where one entry is nearly certain, r keeps its digits.

    d log p_y / d z_j = [j = y] - p_j            d entropy / d z_j = -p_j (log p_j + entropy)
    d log sum exp(z) / d z_j = p_j

A logit of -inf has p = 0, adds nothing and gets no gradient. A row of nothing but -inf has log p = -inf, entropy 0
and no gradient. Rows whose label is `ignore_index` give 0 and no gradient, whatever their logits hold. Rows whose
label is outside [0, V) give NaN.
"""

import math
from typing import NamedTuple

import torch

from .._planes import blocks, planes

BLOCK_ELEMENTS = 1 << 22  # rows are handled in blocks of about this many logits, so that fp32 copies stay small

CASES = ("small", "batched", "masked_logits", "ignored", "capped", "wide", "one_entry", "empty")


def accumulator_dtype(*tensors):
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def scale_logits(logits, temperature, softcap):
    """z and dz/dlogits (a tensor, or a number where it is constant); -inf stays -inf, also under a softcap."""
    x = logits.to(accumulator_dtype(logits))
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(x.dtype).unsqueeze(-1)  # one for each row
    if softcap is None:
        return x / temperature, 1.0 / temperature
    t = torch.tanh(x / softcap)
    z = torch.where(x == -math.inf, x, (softcap * t) / temperature)
    return z, (1.0 - t * t) / temperature


def partial_statistics(z, with_entropy):
    """(m, r, w) of rows z [..., V]: max, sum exp(z - m) without the maximum's own 1, sum exp(z - m) (z - m).

    They merge over parts of a row. A row of nothing but -inf has m = -inf, r = w = 0. Without entropy w is None.
    """
    row_max, where = z.max(-1, keepdim=True)
    offset = z - torch.where(row_max == -math.inf, 0.0, row_max)
    at_max = offset.detach().gather(-1, where)  # 0, or NaN for a maximum of inf: that stays
    offset = offset.scatter(-1, where, at_max - math.inf)
    e = torch.exp(offset)
    rest, row_max = e.sum(-1), row_max.squeeze(-1)
    return row_max, rest, (e * torch.where(offset == -math.inf, 0.0, offset)).sum(-1) if with_entropy else None


def row_sums(z):
    """(sum of the entries that are not -inf, their number) of rows z [..., V], fp64; they add up over a row's parts."""
    banned = z == -math.inf
    return torch.where(banned, 0.0, z).sum(-1, dtype=torch.float64), (~banned).sum(-1, dtype=torch.float64)


def gap_below(row_max, total, count):
    """How far the mean total / count of a row lies below its maximum; 0 for a row of nothing but -inf."""
    gap = torch.where(row_max == -math.inf, 0.0, row_max).double() - total / count.clamp(min=1.0)
    return torch.where(count == 0.0, 0.0, gap).to(row_max.dtype)


def partial_extras(z):
    """(q, total, count, first) of rows z [..., V], fp64 and int64.

    sum exp(z - m)^2 without the maximum's own 1; sum and number of the entries that are not -inf; where the first one
    at the maximum stands, -1 if there is none.
    """
    row_max, where = z.max(-1, keepdim=True)
    dead = row_max == -math.inf
    offset = (z - torch.where(dead, 0.0, row_max)).double()
    first = torch.where(z == row_max, torch.arange(z.shape[-1], dtype=torch.int64, device=z.device), z.shape[-1]).amin(
        -1, keepdim=True
    )
    one = torch.where(dead | (row_max == math.inf), where, first.clamp(max=z.shape[-1] - 1))
    squares = torch.exp(2.0 * offset).scatter(-1, one, torch.where(row_max == math.inf, math.nan, 0.0).double())
    first = torch.where(dead, -1, one).squeeze(-1)
    return squares.sum(-1), *row_sums(z), first


def finish_extras(row_max, rest, squares, total, count):
    """(log sum p^2, mean of the entries that are not -inf); -inf of a row of nothing else."""
    dead = (row_max == -math.inf) & (rest == 0.0)
    log_squares = (torch.log1p(squares) - 2.0 * torch.log1p(rest.double())).clamp(max=0.0)
    found = (log_squares, total / count.clamp(min=1.0))
    return tuple(torch.where(dead, -math.inf, x).to(row_max.dtype) for x in found)


def raised(row_max, rest, highest, power=1.0):
    """(r, 1 if m is the highest or else 0, m - highest) of a part whose m is at most `highest`.

    A lower maximum joins the others. So the whole row's r is the sum of its parts', and 1 for each m beyond the first
    that is the highest: `whole_rest`. r are sums of exps to this power.
    """
    some = row_max != -math.inf
    fall = torch.where(some, row_max - highest, 0.0)
    top = some & (fall == 0.0)
    return torch.where(some & ~top, torch.exp(power * fall) * (1.0 + rest), rest), top.to(rest.dtype), fall


def whole_rest(rests, tops):
    """r of a row from the sums over its parts that `raised` gives."""
    return rests + (tops - 1.0).clamp(min=0.0)


def finish_statistics(row_max, rest, weighted, label_logit):
    """(log-prob of the label, entropy, log s) from merged statistics; entropy and log-prob are None where unasked."""
    dead = (row_max == -math.inf) & (rest == 0.0)
    log_sum = torch.log1p(rest)
    logprob = entropy = None
    if label_logit is not None:
        logprob = torch.where(dead, -math.inf, label_logit - row_max - log_sum)
    if weighted is not None:
        entropy = torch.where(dead, 0.0, log_sum - weighted / (1.0 + rest))
    return logprob, entropy, log_sum


def label_state(labels, vocab, ignore_index):
    """(kept, outside, safe) masks and clamped labels: kept = counts, outside = counts but is no entry of the row."""
    kept = labels != ignore_index
    outside = kept & ((labels < 0) | (labels >= vocab))
    return kept, outside, torch.where(kept & ~outside, labels, 0)


def logprobs_and_entropy(logits, labels=None, *, temperature=1.0, softcap=None, ignore_index=-100):
    """The definition, differentiable by autograd: (log-probs or None, entropy), each [...], fp32 or fp64.

    Of labels [..., K] the log-probs are [..., K]; a row counts if one of its labels does.
    """
    several = labels is not None and labels.dim() == logits.dim()
    if labels is not None:
        kept, outside, safe = label_state(labels, logits.shape[-1], ignore_index)
        rows, astray = (kept.any(-1), outside.any(-1)) if several else (kept, outside)
        logits = torch.where(rows.unsqueeze(-1), logits, 0.0)
    z = scale_logits(logits, temperature, softcap)[0].masked_fill(logits == -math.inf, -math.inf)
    statistics = partial_statistics(z, True)
    if labels is None:
        return None, finish_statistics(*statistics, None)[1]
    label_logits = z.gather(-1, safe if several else safe.unsqueeze(-1))
    logprobs = [finish_statistics(*statistics[:2], None, z_label)[0] for z_label in label_logits.unbind(-1)]
    logprob = torch.stack(logprobs, -1) if several else logprobs[0]
    entropy = finish_statistics(*statistics, None)[1]
    poison = torch.where(astray, math.nan, 0.0).to(entropy.dtype)
    logprob = torch.where(kept, logprob + (poison.unsqueeze(-1) if several else poison), 0.0)
    return logprob, torch.where(rows, entropy, 0.0) + poison


def _blocks(rows, vocab):
    step = max(1, BLOCK_ELEMENTS // max(vocab, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _flat(tensor, part):
    """Some of its entries in one dimension; None stays None."""
    return None if tensor is None else tensor.reshape(-1)[part]


def logprobs_fwd(logits, labels, temperatures, temperature, softcap, ignore_index, with_entropy):
    """(log-probs, entropy, row maximum, log of the row's sum), each [...]; unasked ones have shape [0].

    temperatures: [...], one for each row, or None: `temperature` for all.
    """
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    (rows,), dtype = planes(logits), accumulator_dtype(logits)
    shapes = (shape if labels is not None else 0, shape if with_entropy else 0, shape, shape)
    out = [rows.new_zeros(size, dtype=dtype) for size in shapes]
    for part, place in blocks(rows, BLOCK_ELEMENTS):
        heat = temperature if temperatures is None else _flat(temperatures, part)
        z, _ = scale_logits(rows[place].reshape(-1, vocab), heat, softcap)
        label_logit = None
        if labels is not None:
            kept, outside, safe = label_state(_flat(labels, part), vocab, ignore_index)
            label_logit = z.gather(-1, safe.unsqueeze(-1)).squeeze(-1)
        row_max, rest, weighted = partial_statistics(z, with_entropy)
        logprob, entropy, log_sum = finish_statistics(row_max, rest, weighted, label_logit)
        for target, value in zip(out, (logprob, entropy, row_max, log_sum), strict=True):
            if value is not None:
                if labels is not None:
                    value = torch.where(kept, value, 0.0).masked_fill(outside, math.nan)
                target.view(-1)[part] = value
    return tuple(out)


def token_statistics_fwd(logits, labels, temperatures, temperature, softcap, ignore_index):
    """The four of `logprobs_fwd`, then log sum p^2, the mean of the entries that are not -inf, and bool, whether the
    label is the first at the maximum; 0 and False where it is ignored.
    """
    results = logprobs_fwd(logits, labels, temperatures, temperature, softcap, ignore_index, True)
    vocab = logits.shape[-1]
    (rows,), log_sum = planes(logits), results[3]
    log_squares, mean = (torch.zeros_like(log_sum) for _ in range(2))
    top = torch.zeros_like(log_sum, dtype=torch.bool)
    for part, place in blocks(rows, BLOCK_ELEMENTS):
        heat = temperature if temperatures is None else _flat(temperatures, part)
        z, _ = scale_logits(rows[place].reshape(-1, vocab), heat, softcap)
        kept, outside, _ = label_state(_flat(labels, part), vocab, ignore_index)
        squares, total, count, first = partial_extras(z)
        found = finish_extras(z.amax(-1), partial_statistics(z, False)[1], squares, total, count)
        for target, value in zip((log_squares, mean), found, strict=True):
            target.view(-1)[part] = torch.where(kept, value, 0.0).masked_fill(outside, math.nan)
        top.view(-1)[part] = kept & (first == _flat(labels, part)) & (first >= 0)
    return *results, log_squares, mean, top


class Upstream(NamedTuple):
    """What a loss sends to a row's results: each [n], or None."""

    log_prob: torch.Tensor | None
    entropy: torch.Tensor | None = None
    log_sum_exp: torch.Tensor | None = None
    each: torch.Tensor | None = None  # d loss / d mean z, over the number of entries that are not -inf

    def times(self, grad):
        """What grad [n] times the loss sends."""
        return Upstream(*(None if x is None else grad * x for x in self))


def logits_sums(logits, labels, temperature, softcap, ignore_index):
    """`row_sums` of z of logits [N, V]; (0, 0) where the label is ignored."""
    out = logits.new_zeros(2, logits.shape[0], dtype=torch.float64)
    for start, stop in _blocks(*logits.shape):
        z, _ = scale_logits(logits[start:stop], temperature, softcap)
        sums = torch.stack(row_sums(z))
        out[:, start:stop] = torch.where(labels[start:stop] != ignore_index, sums, 0.0)
    return out.unbind()


def row_gradient(z, slope, safe, grad_logprob, grad_entropy, logprob, entropy, row_max, log_sum):
    """d/dlogits of grad_logprob * log p_label + grad_entropy * entropy for rows z [n, V].

    `safe` None means that no label lies in these columns; a negative entry, that this row's label does not.
    """
    banned = z == -math.inf
    log_p = torch.where(banned, 0.0, (z - row_max.unsqueeze(-1)) - log_sum.unsqueeze(-1))
    p = torch.where(banned, 0.0, torch.exp(log_p))
    upstream = 0.0 if grad_logprob is None else grad_logprob.unsqueeze(-1)
    if grad_entropy is not None:
        upstream = upstream + grad_entropy.unsqueeze(-1) * (log_p + entropy.unsqueeze(-1))
    dz = -p * upstream
    if grad_logprob is not None and safe is not None:
        index = safe.clamp(min=0).unsqueeze(-1)
        label_p = torch.exp(logprob)
        at_label = grad_logprob * -torch.expm1(logprob)
        if grad_entropy is not None:
            at_label = at_label - torch.where(label_p == 0, 0.0, grad_entropy * label_p * (logprob + entropy))
        present = safe >= 0
        dz.scatter_(-1, index, torch.where(present.unsqueeze(-1), at_label.unsqueeze(-1), dz.gather(-1, index)))
    return torch.where(banned, 0.0, dz * slope)


def through_sums(z, slope, row_max, log_sum, grad_log_sum_exp, grad_each):
    """d/dlogits of rows z [n, V] through log sum exp(z), and what every entry gets that is not -inf; [n] or None."""
    banned = z == -math.inf
    d = torch.zeros_like(z)
    if grad_log_sum_exp is not None:
        log_p = torch.where(banned, 0.0, (z - row_max.unsqueeze(-1)) - log_sum.unsqueeze(-1))
        d = grad_log_sum_exp.unsqueeze(-1) * torch.exp(log_p)
    if grad_each is not None:
        d = d + grad_each.unsqueeze(-1)
    return torch.where(banned, 0.0, d * slope)


def logprobs_bwd(
    grad_logprobs, grad_entropy, logits, labels, temperatures, logprobs, entropy, row_max, log_sum, temperature,
    softcap, ignore_index, inplace=False, grad_log_sum_exp=None, grad_each=None,
):  # fmt: skip
    """d/dlogits, in the dtype of the logits; written over the logits if `inplace`.

    The last two are what reaches the row through log sum exp(z), and what every entry gets that is not -inf.
    """
    vocab = logits.shape[-1]
    (rows,) = planes(logits)
    out = rows if inplace else torch.empty_like(rows, memory_format=torch.contiguous_format)
    for part, place in blocks(rows, BLOCK_ELEMENTS):
        heat = temperature if temperatures is None else _flat(temperatures, part)
        z, slope = scale_logits(rows[place].reshape(-1, vocab), heat, softcap)
        kept = outside = safe = None
        if labels is not None:
            kept, outside, safe = label_state(_flat(labels, part), vocab, ignore_index)
        per_row = (grad_logprobs, grad_entropy, logprobs, entropy, row_max, log_sum)
        dx = row_gradient(z, slope, safe, *(_flat(tensor, part) for tensor in per_row))
        if grad_log_sum_exp is not None or grad_each is not None:
            sums = (row_max, log_sum, grad_log_sum_exp, grad_each)
            dx = dx + through_sums(z, slope, *(_flat(tensor, part) for tensor in sums))
        if labels is not None:
            dx = torch.where(kept.unsqueeze(-1), dx, 0.0).masked_fill(outside.unsqueeze(-1), math.nan)
        out[place] = dx.to(out.dtype).view(out[place].shape)
    if inplace and out.data_ptr() != logits.data_ptr():
        logits.copy_(out.view(logits.shape))
    return out.view(logits.shape)


def example_inputs(case, *, dtype=torch.float32, device="cpu", seed=0):
    """Keyword arguments of `logprobs_and_entropy_from_logits` for a case of CASES; ignored rows hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    shape = {
        "small": (4, 7),
        "batched": (2, 3, 17),
        "masked_logits": (6, 11),
        "ignored": (5, 13),
        "capped": (3, 19),
        "wide": (3, 4099),
        "one_entry": (4, 1),
        "empty": (0, 5),
    }[case]
    logits = (3.0 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator, dtype=torch.int64)
    options = {"temperature": 1.0, "softcap": None}
    if case == "masked_logits":
        logits[torch.rand(shape, generator=generator, dtype=torch.float32) < 0.4] = -math.inf
        logits[0, :] = -math.inf  # no entry allowed at all
        logits[1, labels[1]] = -math.inf  # the label itself is banned
        logits[1, (labels[1] + 1) % shape[-1]] = 0.5
        logits[2, :3] = -math.inf  # the row begins with banned entries
    if case == "ignored":
        labels[1] = labels[4] = -100
        logits[1], logits[4] = math.nan, math.inf
    if case == "capped":
        options = {"temperature": 0.7, "softcap": 5.0}
    if case == "wide":
        options["temperature"] = 1.3
    return {"logits": logits.to(device), "labels": labels.to(device), **options}
