"""Divergences of a student from a teacher, from hidden states, beside the whole logits."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

import rlhf_kernels as rk
from benchmarks.cases import Bench, Case
from benchmarks.test_linear import head


def eager_jsd(hidden, weight, teacher_hidden, teacher_weight):
    s, t = F.linear(hidden, weight).log_softmax(-1), F.linear(teacher_hidden, teacher_weight).log_softmax(-1)
    m = torch.logaddexp(s, t) - math.log(2)
    return 0.5 * (t.exp() * (t - m)).sum(-1) + 0.5 * (s.exp() * (s - m)).sum(-1)


def eager_topk(hidden, weight, ids, log_t):
    s = F.linear(hidden, weight).log_softmax(-1).gather(-1, ids)
    rest_t, rest_s = 1 - log_t.exp().sum(-1), 1 - s.exp().sum(-1)
    return (log_t.exp() * (log_t - s)).sum(-1) + rest_t * (rest_t / rest_s).log()


def build(case):
    rows, width, vocab = (case.sizes[name] for name in "NHV")
    hidden, weight = head(rows, width, vocab, torch.float32)
    teacher = head(rows, width, vocab, torch.float32)
    if case.function == "linear_topk_kl":
        log_t, ids = F.linear(*teacher).log_softmax(-1).topk(min(20, vocab - 1))
        ours, eager, others = rk.linear_topk_kl, eager_topk, (ids, log_t)
    else:
        ours, eager, others = rk.linear_jsd, eager_jsd, teacher
    leaves, upstream = (hidden.requires_grad_(), weight.requires_grad_()), torch.randn(rows) / rows

    def run(function, h, w, *rest):
        output = function(h, w, *rest)
        return (output,), torch.autograd.grad(output, (h, w), upstream.to(output.dtype))

    def exact():
        wide = (x.double() if x.is_floating_point() else x for x in others)
        return run(eager, *(x.detach().double().requires_grad_() for x in leaves), *wide)

    calls = {"ours": lambda: run(ours, *leaves, *others), "eager": lambda: run(eager, *leaves, *others)}
    return Bench(
        calls={name: calls[name] for name in case.impls}, exact=exact, flops=12 * rows * width * vocab, roof="matmuls"
    )


SIZES = {"N": 512, "H": 768, "V": 50257}
CASES = [Case(name, "fwdbwd", "fp32", SIZES, ("ours", "eager"), build) for name in ("linear_jsd", "linear_topk_kl")]


def test_linear_jsd(row, measure):
    measure(row)


def test_linear_topk_kl(row, measure):
    measure(row)
