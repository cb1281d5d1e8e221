"""Generalised Jensen-Shannon divergence between a student's and a teacher's next-token distributions.

With s and t their probabilities and m = (1 - beta) s + beta t, Agarwal et al. 2024 (arXiv 2306.13649), in TRL's naming:

    0 < beta < 1    beta KL(t || m) + (1 - beta) KL(s || m)
    beta = 0        KL(t || s), the forward one         beta = 1    KL(s || t), the reverse one

    d / d z_j = s_j (a_j - sum_k s_k a_k),  a = (1 - beta) log(s / m) for 0 < beta < 1, log(s / t) for beta = 1
    d / d z_j = s_j - t_j                                            for beta = 0

Logits are made for a chunk of rows at a time, in the forward and again in the backward; the teacher is a constant.
"""

import math

import torch

from . import linear as linear_reference
from .linear import Gradients, Head

CASES = ("small", "capped", "banned", "one_entry", "empty")


def _shares(z):
    """(p, log p) of rows z; 0 and -inf where z is -inf."""
    log_p = z.log_softmax(-1)
    return log_p.exp(), log_p


def _weighted_gap(p, log_p, log_q):
    """Sum over j of p (log p - log q), where p = 0 adds nothing."""
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)


def divergence(z, z_teacher, beta):
    """The divergence [n] of rows of logits z and z_teacher [n, V], and its gradient [n, V] in z."""
    (s, log_s), (t, log_t) = _shares(z), _shares(z_teacher)
    if beta == 0:
        return _weighted_gap(t, log_t, log_s), s - t
    if beta == 1:
        log_m, weight = log_t, 1.0
        value = _weighted_gap(s, log_s, log_t)
    else:
        log_m, weight = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta)), 1.0 - beta
        value = beta * _weighted_gap(t, log_t, log_m) + (1.0 - beta) * _weighted_gap(s, log_s, log_m)
    a = torch.where(s == 0, 0.0, weight * (log_s - log_m))
    return value, s * (a - (s * a).sum(-1, keepdim=True))


def _walk(student, teacher, chunk_size):
    kept = torch.ones(student.count, dtype=torch.bool, device=student.hidden.device)
    step = chunk_size or linear_reference.default_chunk_size(2 * student.vocab, student.hidden.device)
    for start in range(0, student.count, step):
        part = slice(start, min(start + step, student.count))
        h = student.inputs(part, kept[part])
        yield part, h, *student.scaled(h, part), teacher.scaled(teacher.inputs(part, kept[part]), part)[0]


def _heads(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, temperature, softcap):
    options = {"temperature": temperature, "softcap": softcap}
    return Head(hidden, weight, bias, **options), Head(teacher_hidden, teacher_weight, teacher_bias, **options)


def jsd_fwd(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, beta, temperature, softcap, chunk_size
):  # fmt: skip
    """The divergence of each row, [N]."""
    heads = _heads(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, temperature, softcap)
    out = hidden.new_zeros(heads[0].count, dtype=heads[0].dtype)
    for part, _, z, _, z_teacher in _walk(*heads, chunk_size):
        out[part] = divergence(z, z_teacher, beta)[0]
    return out


def jsd_bwd(
    grad, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, beta, temperature, softcap, chunk_size,
    need_hidden, need_weight, need_bias,
):  # fmt: skip
    """(d hidden, d weight, d bias), each in its input's dtype; of shape [0] where not needed."""
    heads = _heads(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, temperature, softcap)
    gradients = Gradients(heads[0], need_hidden, need_weight, need_bias)
    for part, h, z, slope, z_teacher in _walk(*heads, chunk_size):
        dz = divergence(z, z_teacher, beta)[1]
        gradients.add(part, h, torch.where(z == -math.inf, 0.0, grad[part].unsqueeze(-1) * dz * slope))
    return gradients.finish((hidden.dtype, weight.dtype, heads[0].dtype if bias is None else bias.dtype))


def example_inputs(case, *, dtype=torch.float32, device="cpu", seed=0):
    """Keyword arguments of `linear_jsd` for a case of CASES."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    n, h, v = {"one_entry": (3, 4, 1), "empty": (0, 4, 5)}.get(case, (7, 6, 19))
    inputs = {"hidden_states": normal(n, h), "weight": normal(v, h)}
    inputs |= {"teacher_hidden_states": normal(n, h + 2), "teacher_weight": normal(v, h + 2)}
    if case == "capped":
        inputs |= {"bias": normal(v), "teacher_bias": normal(v), "temperature": 0.7, "softcap": 4.0}
    if case == "banned":
        inputs |= {"bias": normal(v), "teacher_bias": normal(v)}
        for name in ("bias", "teacher_bias"):
            inputs[name][:4] = -math.inf
    return inputs
