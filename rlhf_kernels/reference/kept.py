"""Logits of a few tokens a row, from hidden states and those rows of the LM head that they name.

    logits[n, k] = hidden[n] . weight[kept[n, k]] + bias[kept[n, k]]        -inf where kept[n, k] = -1

d hidden[n] = sum_k d[n, k] weight[kept[n, k]];  d weight[v] = sum of d[n, k] hidden[n] over all (n, k) with
kept[n, k] = v, in fp32 (fp64 for fp64) and always in the same order. Rows that keep nothing read nothing: their hidden
states may be NaN. Tokens outside [0, V) give NaN.
"""

import math

import torch

from .logprobs import accumulator_dtype

GATHERED = 1 << 22  # entries of gathered head rows that exist at a time

CASES = ("small", "padded", "repeated", "bias", "one_entry", "empty")


def _parts(kept, width):
    step = max(1, GATHERED // max(kept.shape[1] * width, 1))
    return [slice(start, start + step) for start in range(0, kept.shape[0], step)]


def _state(kept, vocab):
    """(present, outside, safe) of the tokens of a row."""
    present = kept != -1
    outside = present & ((kept < 0) | (kept >= vocab))
    return present, outside, torch.where(present & ~outside, kept, 0)


def kept_logits_fwd(hidden, weight, kept, bias):
    """[N, K] fp32, or fp64."""
    dtype = accumulator_dtype(hidden)
    present, outside, safe = _state(kept, weight.shape[0])
    out = hidden.new_empty(kept.shape, dtype=dtype)
    for part in _parts(kept, weight.shape[1]):
        h = torch.where(present[part].any(1, keepdim=True), hidden[part].to(dtype), 0)
        out[part] = torch.bmm(weight[safe[part]].to(dtype), h.unsqueeze(-1)).squeeze(-1)
    if bias is not None:
        out += bias.to(dtype)[safe]
    return out.masked_fill_(~present, -math.inf).masked_fill_(outside, math.nan)


def kept_logits_bwd(grad, hidden, weight, kept, need_hidden, need_weight, need_bias):
    """(d hidden, d weight, d bias) in the accumulator's dtype; of shape [0] where not needed."""
    dtype = accumulator_dtype(hidden)
    present, _, safe = _state(kept, weight.shape[0])
    grad = torch.where(present, grad.to(dtype), 0)
    d_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0, dtype=dtype)
    d_weight = weight.new_zeros(weight.shape if need_weight else 0, dtype=dtype)
    d_bias = weight.new_zeros(weight.shape[0] if need_bias else 0, dtype=dtype)
    for part in _parts(kept, weight.shape[1]):
        g, rows = grad[part], safe[part]
        if need_hidden:
            d_hidden[part] = torch.bmm(g.unsqueeze(1), weight[rows].to(dtype)).squeeze(1)
        if need_weight:
            h = torch.where(present[part].any(1, keepdim=True), hidden[part].to(dtype), 0)
            _add_rows(d_weight, rows.flatten(), (g.unsqueeze(-1) * h.unsqueeze(1)).flatten(0, 1))
    if need_bias:
        _add_rows(d_bias, safe.flatten(), grad.flatten())
    return d_hidden, d_weight, d_bias


def _add_rows(out, rows, values):
    if out.device.type == "cpu":
        out.index_add_(0, rows, values)
    else:  # index_add_ uses atomics on a GPU, index_put_ sorts: the same bits on every run
        out.index_put_((rows,), values, accumulate=True)


def kept_logprobs(logits, labels, kept, *, temperature=1.0, softcap=None, ignore_index=-100):
    """The definition, differentiable by autograd: (log-probs, entropy) [N] of logits [N, V] over the kept tokens alone.

    For temperatures that are numbers; what is not kept is -inf, and softmax is over what is left.
    """
    among = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    for k in range(kept.shape[1]):
        here = kept[:, k] >= 0
        among[here, kept[here, k]] = True
    counts = labels != ignore_index
    z = torch.where(counts.unsqueeze(-1), logits.to(accumulator_dtype(logits)), 0.0)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    z = z.masked_fill(~among, -math.inf)
    some = among.any(1, keepdim=True)
    log_p = torch.where(some, torch.where(some, z, 0.0).log_softmax(-1), -math.inf)
    p = log_p.exp()
    entropy = -(p * torch.where(among, log_p, 0.0)).sum(-1)
    label_log_p = log_p.gather(-1, torch.where(counts, labels, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counts, label_log_p, 0.0), torch.where(counts, entropy, 0.0)


def example_inputs(case, *, dtype=torch.float32, device="cpu", seed=0):
    """Keyword arguments of `linear_kept_logprobs` for a case of CASES; hidden states of ignored labels are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, h, v, k = {"one_entry": (3, 4, 1, 1), "empty": (0, 4, 5, 2)}.get(case, (9, 6, 23, 5))
    hidden, weight = normal(n, h), normal(v, h)
    order = torch.rand(n, v, generator=generator, dtype=torch.float64).argsort(1)[:, :k]
    labels = order[:, 0].clone()
    options = {}
    if case != "small" and case != "one_entry":
        kept_counts = torch.randint(1, k + 1, (n, 1), generator=generator, dtype=torch.int64)
        order = torch.where(torch.arange(k, dtype=torch.int64) < kept_counts, order, -1)
    if case == "padded":
        labels[2], hidden[2] = -100, math.nan
        order[4] = -1  # nothing is kept
        labels[5] = (order[5].max() + 1) % v if (order[5].max() + 1) % v not in order[5].tolist() else labels[5]
    if case == "repeated":
        order = order[:1].expand(n, k).contiguous()
        labels = order[:, 0].clone()
    if case == "bias":
        options = {"bias": normal(v).to(dtype).to(device), "temperature": 0.7, "softcap": 3.0}
    tensors = {"hidden_states": hidden.to(dtype), "weight": weight.to(dtype), "labels": labels, "kept": order}
    return {**{name: x.to(device) for name, x in tensors.items()}, **options}
