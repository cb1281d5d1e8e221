"""Log-probs, cross-entropy, PPO loss and KL from hidden states and the LM head, without the [N, V] logits.

All four walk over chunks of tokens. A chunk's logits [n, V] are made in fp32 (fp64 for fp64 inputs) from exact
products of the inputs, turned into statistics, and, where a gradient is wanted, in the same memory order into dlogits:

    logits = hidden[rows] weight^T + bias      d hidden = dlogits weight      d weight = sum of dlogits^T hidden[rows]

With `low` [N, r] and `up` [V, r], of a LoRA layer on the head, low[rows] up^T is added, and they get their gradients as
hidden and weight do.

d hidden and d weight are summed in fp32 and rounded once. Log-probs and KL recompute the logits in the backward;
cross-entropy and PPO know their loss in the forward and make the gradients there. So do log-probs and KL for a head
that is not trained: d log p_i / d h_i is known in the forward, and the backward only multiplies it ("slopes"). With a
process group the columns of the head are spread over ranks: (max, sum of the others, label's logit, ...) of each row
are merged by all-reduce, and d hidden is summed over the ranks.

Rows whose label is ignored are replaced by 0 before any arithmetic, so their hidden states may be NaN. `fast` lets a
backend round its products; this one, the definition, never does.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from . import kl as kl_reference
from . import logprobs as row_reference
from . import policy as policy_reference
from . import ppo as ppo_reference
from ._head import Gradients, Head, Rows, default_chunk_size, dtypes_of
from .logprobs import Upstream

CASES = ("small", "masked", "rows", "rich", "banned", "one_entry", "empty")


def _parts(count, chunk_size):
    return [slice(start, min(start + chunk_size, count)) for start in range(0, count, chunk_size)]


def _local_labels(labels, head, vocab_start):
    """Labels as columns of this rank's head, -1 where they lie in another rank's."""
    local = labels - vocab_start
    return torch.where((local >= 0) & (local < head.vocab), local, -1)


def _statistics(z, local, with_entropy):
    """A chunk's (max, sum of the others, label's logit, whether the label is here, weighted sum), each [n]."""
    row_max, rest, weighted = row_reference.partial_statistics(z, with_entropy)
    here = local >= 0
    label_logit = z.gather(-1, local.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    label_logit = torch.where(here, label_logit, 0.0)
    return row_max, rest, label_logit, here.to(z.dtype), torch.zeros_like(rest) if weighted is None else weighted


def _merge(statistics, group):
    """The same statistics over the columns of all ranks: one all-reduce of the maxima, one of the sums."""
    if group is None:
        return statistics
    row_max, rest, label_logit, here, weighted = statistics
    highest = row_max.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    joined, top, fall = row_reference.raised(row_max, rest, highest)
    weighted = torch.exp(fall) * (weighted + (1.0 + rest) * fall)
    sums = torch.stack([joined, top, label_logit, here, weighted])
    dist.all_reduce(sums, group=group)
    return highest, row_reference.whole_rest(sums[0], sums[1]), *sums[2:].unbind()


def gaps(row_max, total, count, group):
    """(gap, count) of `Rows` from the `row_sums` of each rank's columns."""
    if group is not None:
        sums = torch.stack([total, count])
        dist.all_reduce(sums, group=group)
        total, count = sums.unbind()
    return row_reference.gap_below(row_max, total, count), count.to(row_max.dtype)


def _row_results(statistics, kept, astray, with_entropy):
    """`Rows` without sums: 0 where not kept, NaN where the label or row is nowhere."""
    row_max, rest, label_logit, here, weighted = statistics
    results = row_reference.finish_statistics(row_max, rest, weighted if with_entropy else None, label_logit)
    logprob, entropy, log_sum = results
    outside = kept & ((here == 0) | astray)
    return Rows(
        *(
            None if x is None else torch.where(kept, x, 0.0).masked_fill(outside, math.nan)
            for x in (logprob, entropy, row_max, log_sum)
        )
    )


def _dlogits(z, slope, local, kept, upstream, rows):
    """d/dlogits of one chunk; 0 in rows that are not kept, NaN where the log-prob is."""
    logprob, entropy, row_max, log_sum = rows[:4]
    d = row_reference.row_gradient(z, slope, local, *upstream[:2], logprob, entropy, row_max, log_sum)
    if upstream.log_sum_exp is not None or upstream.each is not None:
        d = d + row_reference.through_sums(z, slope, row_max, log_sum, upstream.log_sum_exp, upstream.each)
    d = torch.where(kept.unsqueeze(-1), d, 0.0)
    return d.masked_fill_((kept & logprob.isnan()).unsqueeze(-1), math.nan)


def _saved_dtype(tensor, head):
    """dtype in which gradients made in the forward wait: fp16 could underflow before the loss scale arrives."""
    return head.dtype if tensor is None or tensor.dtype == torch.float16 else tensor.dtype


def _ones(part, rows):
    """Upstream of slopes: d log p itself."""
    return Upstream(torch.ones_like(rows.log_prob))


def spread_slopes(grad, slopes, kept, rows, shape, dtype):
    """d hidden, of this shape and dtype, from the slopes [M, H] that a forward made and the gradient [M] of later."""
    grads = torch.where(kept.unsqueeze(-1), grad.unsqueeze(-1) * slopes, 0.0)
    if rows is None:
        return grads.to(dtype)
    rows, out = rows.clamp(0, max(shape[0] - 1, 0)), slopes.new_zeros(shape)
    if out.device.type == "cpu":
        return out.index_add(0, rows, grads).to(dtype)
    return out.index_put((rows,), grads, accumulate=True).to(dtype)  # sorts: the same bits on every run


def walk_with_gradients(
    head, labels, kept, token_gradients, needs, chunk_size, group, vocab_start, with_entropy, apart=False,
    with_sums=False,
):  # fmt: skip
    """One pass: log-probs and entropy [M], and the gradients of token_gradients(part, `Rows`), an `Upstream`."""
    gradients = Gradients(head, *needs, apart=apart)
    logprobs, entropy = (head.hidden.new_zeros(head.count, dtype=head.dtype) for _ in range(2))
    for part in _parts(head.count, chunk_size or default_chunk_size(head.vocab, head.hidden.device, group)):
        h, low = head.inputs(part, kept[part]), head.low_inputs(part, kept[part])
        z, slope = head.scaled(h, part, low)
        local = _local_labels(labels[part], head, vocab_start)
        merged = _merge(_statistics(z, local, with_entropy), group)
        rows = _row_results(merged, kept[part], head.astray(part), with_entropy)
        if with_sums:
            rows = Rows(*rows[:4], *gaps(rows.max, *row_reference.row_sums(z), group))
        logprobs[part] = rows.log_prob
        if with_entropy:
            entropy[part] = rows.entropy
        upstream = token_gradients(part, rows)
        if any(needs):
            gradients.add(part, h, _dlogits(z, slope, local, kept[part], upstream, rows), low)
    tensors = (head.hidden, head.weight, head.bias, head.low, head.up)
    dtypes = [head.dtype if apart else _saved_dtype(x, head) for x in tensors]
    return logprobs, entropy, gradients.finish(dtypes, group)


def linear_logprobs_fwd(
    hidden, weight, labels, rows, bias, temperatures, low, up, temperature, softcap, ignore_index, with_entropy,
    with_slopes, chunk_size, fast, group, vocab_start,
):  # fmt: skip
    """(log-probs, entropy, row maximum, log of the row's sum), each [M], and slopes [M, H]; [0] if not asked for.

    With slopes there is no entropy, and no backward needs the statistics: they are [0] too.
    """
    head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up)
    kept = labels != ignore_index
    nothing = hidden.new_zeros(0, dtype=head.dtype)
    if with_slopes:
        logprobs, _, found = walk_with_gradients(
            head, labels, kept, _ones, (True, False, False), chunk_size, group, vocab_start, False, apart=True
        )
        return logprobs, nothing, nothing.clone(), nothing.clone(), found[0]
    rows = rows_of(head, labels, kept, chunk_size, group, vocab_start, with_entropy)
    return *(nothing if x is None else x for x in rows[:4]), nothing.clone()


def rows_of(head, labels, kept, chunk_size, group, vocab_start, with_entropy=False, with_sums=False):
    """`Rows` of all labels; ranks merge once."""
    statistics = head.hidden.new_zeros(5, head.count, dtype=head.dtype)
    sums = head.hidden.new_zeros(2, head.count, dtype=torch.float64)
    for part in _parts(head.count, chunk_size or default_chunk_size(head.vocab, head.hidden.device)):
        low = head.low_inputs(part, kept[part])
        z, _ = head.scaled(head.inputs(part, kept[part]), part, low)
        local = _local_labels(labels[part], head, vocab_start)
        statistics[:, part] = torch.stack(_statistics(z, local, with_entropy))
        if with_sums:
            sums[:, part] = torch.stack(row_reference.row_sums(z))
    merged = _merge(statistics.unbind(), group)
    rows = _row_results(merged, kept, head.astray(slice(0, head.count)), with_entropy)
    return Rows(*rows[:4], *gaps(rows.max, *sums, group)) if with_sums else rows


def linear_token_statistics_fwd(
    hidden, weight, labels, rows, bias, temperatures, low, up, temperature, softcap, ignore_index, chunk_size, fast,
    group, vocab_start,
):  # fmt: skip
    """The seven of `reference.logprobs.token_statistics_fwd`, each [M]."""
    head, kept = Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up), labels != ignore_index
    found, extras = [], []
    for part in _parts(head.count, chunk_size or default_chunk_size(head.vocab, hidden.device)):
        z, _ = head.scaled(head.inputs(part, kept[part]), part, head.low_inputs(part, kept[part]))
        found.append(_statistics(z, _local_labels(labels[part], head, vocab_start), True))
        extras.append(row_reference.partial_extras(z))
    if not found:
        empty = [hidden.new_zeros(0, dtype=head.dtype) for _ in range(6)]
        return *empty, torch.zeros_like(labels, dtype=torch.bool)
    statistics, extras = ([torch.cat(x) for x in zip(*each)] for each in (found, extras))
    merged, (squares, total, count, first) = _merge(statistics, group), extras
    first = first + vocab_start
    if group is not None:
        joined, top, _ = row_reference.raised(statistics[0].double(), squares, merged[0].double(), 2.0)
        sums = torch.stack([joined, top, total, count])
        dist.all_reduce(sums, group=group)
        squares, total, count = row_reference.whole_rest(sums[0], sums[1]), *sums[2:].unbind()
        first = torch.where(top > 0.0, first, torch.iinfo(torch.int64).max)
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=group)
    astray = head.astray(slice(0, head.count))
    outside = kept & ((merged[3] == 0) | astray)
    more = row_reference.finish_extras(merged[0], merged[1], squares, total, count)
    more = (torch.where(kept, x, 0.0).masked_fill(outside, math.nan) for x in more)
    top = kept & ~outside & (first == labels) & (merged[0] != -math.inf)
    return *_row_results(merged, kept, astray, True)[:4], *more, top


def linear_logprobs_bwd(
    grad_logprobs, grad_entropy, hidden, weight, labels, rows, bias, temperatures, low, up, logprobs, entropy, row_max,
    log_sum, temperature, softcap, ignore_index, chunk_size, fast, group, vocab_start, needs, grad_log_sum_exp=None,
    grad_each=None, dtypes=None,
):  # fmt: skip
    """(d hidden, d weight, d bias, d low, d up), each in its input's dtype or in `dtypes`; [0] where not needed.

    The two gradients before these as in `reference.logprobs.logprobs_bwd`.
    """
    head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up)
    gradients, kept = Gradients(head, *needs), labels != ignore_index
    saved = (logprobs, entropy if grad_entropy is not None else None, row_max, log_sum)
    grads = (grad_logprobs, grad_entropy, grad_log_sum_exp, grad_each)
    for part in _parts(head.count, chunk_size or default_chunk_size(head.vocab, hidden.device)):
        h, low = head.inputs(part, kept[part]), head.low_inputs(part, kept[part])
        z, slope = head.scaled(h, part, low)
        local = _local_labels(labels[part], head, vocab_start)
        upstream = Upstream(*(None if g is None else g[part] for g in grads))
        rows = Rows(*(None if x is None else x[part] for x in saved))
        gradients.add(part, h, _dlogits(z, slope, local, kept[part], upstream, rows), low)
    return gradients.finish(dtypes or dtypes_of(head), group)


def linear_ppo_fwd(
    hidden, weight, labels, rows, bias, temperatures, low, up, old_log_probs, advantages, mask, normalizer,
    temperature, softcap, cliprange, cliprange_high, dual_clip, entropy_coef, loss_agg_mode, chunk_size, fast, group,
    vocab_start, needs,
):  # fmt: skip
    """(loss, policy loss, metrics [len(ppo.STATS)], gradients as `Gradients`) of policy - entropy_coef * entropy.

    labels, old_log_probs, advantages and mask are [B, T] or [M]; rows and temperatures [M].
    """
    head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up)
    kept = mask.reshape(-1)
    weights = ppo_reference.aggregation_weights(mask, loss_agg_mode, normalizer, head.dtype).reshape(-1)
    old, advantage = (torch.where(mask, x.to(head.dtype), 0.0).reshape(-1) for x in (old_log_probs, advantages))
    clipping = {"cliprange": cliprange, "cliprange_high": cliprange_high, "dual_clip": dual_clip}

    def token_gradients(part, rows):
        _, slope = ppo_reference.ppo_token_loss(rows.log_prob, old[part], advantage[part], **clipping)
        return Upstream(weights[part] * slope, -entropy_coef * weights[part] if entropy_coef else None)

    logprobs, entropy, gradients = walk_with_gradients(
        head, labels.reshape(-1), kept, token_gradients, needs, chunk_size, group, vocab_start, True
    )
    losses, _, _, _, stats = ppo_reference.ppo_fwd(
        logprobs.view(mask.shape), old_log_probs, advantages, mask, None, None, None, entropy.view(mask.shape),
        normalizer, cliprange, cliprange_high, dual_clip, None, loss_agg_mode,
    )  # fmt: skip
    return losses[0] - entropy_coef * losses[2], losses[0].clone(), stats, *gradients


def linear_policy_fwd(
    hidden, weight, labels, rows, bias, temperatures, low, up, tensors, settings, temperature, softcap, chunk_size,
    fast, group, vocab_start, needs,
):  # fmt: skip
    """(loss, its parts [4], stats, gradients as `Gradients`) of the policy loss.

    tensors: policy.Tensors without log_probs and entropy; they and labels are [B, T] or [M], rows and temperatures [M].
    """
    head, mask = Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up), tensors.mask
    path = head, labels.reshape(-1), mask.reshape(-1)
    first = None
    if settings.by_sequence:  # the ratio of a sequence is known only when all its tokens are
        first = rows_of(*path, chunk_size, group, vocab_start).log_prob.view(mask.shape)
    upstream = policy_reference.token_gradients(tensors, settings, head.dtype, first)
    logprobs, entropy, gradients = walk_with_gradients(*path, upstream, needs, chunk_size, group, vocab_start, True)
    shape = mask.shape if mask.dim() == 2 else (1, -1)  # packed tokens are one row
    tensors = tensors._replace(log_probs=logprobs, entropy=entropy)
    found = {name: x.reshape(shape) for name, x in tensors._asdict().items() if x is not None and x.dim()}
    losses, *_, stats = policy_reference.policy_fwd(tensors._replace(**found), settings)
    return policy_reference.total_loss(losses, settings._replace(value_scale=0.0)), losses, stats, *gradients


def _kl_heads(hidden, weight, ref_hidden, ref_weight, rows, bias, ref_bias, temperature, softcap):
    options = {"rows": rows, "temperature": temperature, "softcap": softcap}
    return Head(hidden, weight, bias, **options), Head(ref_hidden, ref_weight, ref_bias, **options)


def _kl_chunks(head, ref_head, reverse, chunk_size, group):
    """(part, policy's inputs, KL [n], d KL / d logits [n, V]) of each chunk of tokens."""
    for part in _parts(head.count, chunk_size or default_chunk_size(head.vocab, head.hidden.device, group)):
        kept = torch.ones(part.stop - part.start, dtype=torch.bool, device=head.hidden.device)
        h = head.inputs(part, kept)
        z, slope = head.scaled(h, part)
        sides = (z, ref_head.scaled(ref_head.inputs(part, kept), part)[0])[:: 1 if reverse else -1]
        statistics = [kl_reference.row_statistics(x) for x in sides]
        kl = kl_reference.divergence(*sides, *statistics)[0]
        kl, *merged = kl_reference.merge_divergence((kl, *statistics[0], *statistics[1]), group)
        kl = kl.masked_fill(head.astray(part), math.nan)
        dz = kl_reference.divergence_gradient(torch.ones_like(kl), *sides, kl, merged[:2], merged[2:])
        yield part, h, kl, dz[0 if reverse else 1] * slope


def linear_kl_fwd(
    hidden, weight, ref_hidden, ref_weight, rows, bias, ref_bias, temperature, softcap, reverse, with_slopes,
    chunk_size, fast, group,
):  # fmt: skip
    """Exact KL [M] between the two heads' distributions, and slopes [M, H]; [0] if not asked for."""
    head, ref_head = _kl_heads(hidden, weight, ref_hidden, ref_weight, rows, bias, ref_bias, temperature, softcap)
    gradients = Gradients(head, with_slopes, False, False, apart=True)
    out = hidden.new_zeros(head.count, dtype=head.dtype)
    for part, h, kl, dlogits in _kl_chunks(head, ref_head, reverse, chunk_size, group):
        out[part] = kl
        gradients.add(part, h, dlogits)
    return out, gradients.finish((head.dtype,) * 3, group)[0]


def linear_kl_bwd(
    grad, hidden, weight, ref_hidden, ref_weight, rows, bias, ref_bias, temperature, softcap, reverse, chunk_size,
    fast, group, need_hidden, need_weight, need_bias,
):  # fmt: skip
    """(d hidden, d weight, d bias) of the policy, each in its input's dtype; of shape [0] where not needed."""
    head, ref_head = _kl_heads(hidden, weight, ref_hidden, ref_weight, rows, bias, ref_bias, temperature, softcap)
    gradients = Gradients(head, need_hidden, need_weight, need_bias)
    for part, h, _, dlogits in _kl_chunks(head, ref_head, reverse, chunk_size, group):
        upstream = grad[part].masked_fill(head.astray(part), math.nan)
        gradients.add(part, h, upstream[:, None] * dlogits)
    return gradients.finish((hidden.dtype, weight.dtype, head.dtype if bias is None else bias.dtype), group)


def full_logits(hidden, weight, labels, rows=None, bias=None, ignore_index=-100):
    """The [M, V] logits that the functions above never hold; hidden states of ignored labels count as 0."""
    h = hidden if rows is None else hidden[rows]
    logits = torch.where((labels != ignore_index).unsqueeze(-1), h, 0.0) @ weight.t()
    return logits if bias is None else logits + bias


def linear_logprobs(hidden, weight, labels, rows=None, bias=None, temperature=1.0, softcap=None, ignore_index=-100):
    """The definition, differentiable by autograd, with full logits: (log-probs, entropy)."""
    logits = full_logits(hidden, weight, labels, rows, bias, ignore_index)
    options = {"temperature": temperature, "softcap": softcap, "ignore_index": ignore_index}
    return row_reference.logprobs_and_entropy(logits, labels, **options)


def example_inputs(case, *, dtype=torch.float32, device="cpu", seed=0):
    """Keyword arguments of `linear_logprobs` for a case of CASES; hidden states of ignored labels are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, h, v = {"one_entry": (3, 4, 1), "empty": (0, 4, 5), "small": (5, 8, 11)}.get(case, (9, 6, 13))
    hidden, weight = normal(n, h), normal(v, h)
    labels = torch.randint(0, v, (n,), generator=generator, dtype=torch.int64)
    options = {}
    if case == "masked":
        labels[2] = labels[8] = -100
        hidden[2], hidden[8] = math.nan, math.inf
    if case == "rows":
        options["rows"] = torch.tensor([3, 3, 3, 0, 8, 1, 3], dtype=torch.int64)
        labels = torch.randint(0, v, (7,), generator=generator, dtype=torch.int64)
        labels[4] = -100
        hidden[8] = math.nan
    if case == "rich":
        options["bias"] = normal(v).to(dtype).to(device)
        options["temperature"] = (0.5 + torch.rand(n, generator=generator, dtype=torch.float32)).to(device)
        options["softcap"] = 4.0
    if case == "banned":
        bias = normal(v)
        bias[:4] = -math.inf
        labels = labels.clamp(min=4)
        labels[1] = 2
        options["bias"] = bias.to(dtype).to(device)
    options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in options.items()}
    tensors = {"hidden_states": hidden.to(dtype), "weight": weight.to(dtype), "labels": labels}
    return {**{k: x.to(device) for k, x in tensors.items()}, **options}
