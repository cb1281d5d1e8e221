"""The walk of _linear_walk.py on the chunk kernels of csrc/cpu/linear.cpp; reference/linear.py defines it."""

from __future__ import annotations

import torch

from .. import _linear_walk as walk
from .._linear_backend import Operators
from .._native import fresh, run
from ..reference._head import Rows
from . import kl as cpu_kl
from .logprobs import add_row_sums, logprobs_fwd

SMALL = 1 << 16  # logits of a chunk whose fold takes less time than the steps around it


class _Kernels(walk.Kernels):
    """The chunk kernels; sizes and products are the walk's own."""

    @staticmethod
    def workspace(size, device):
        return fresh(size)

    @staticmethod
    def fresh(shape, device):
        return fresh(*shape)

    @staticmethod
    def fold(chunk, state):
        name, extras = ("linear_fold_f32", ()) if state.extras is None else ("linear_fold_extras_f32", state.extras)
        run(
            name, chunk.logits, chunk.logits.stride(0), *chunk.logits.shape, chunk.first, chunk.bias,
            chunk.temperatures, chunk.temperature, chunk.softcap or 0.0, chunk.labels, chunk.kept, state.max,
            state.rest, state.weighted, state.label_logit, state.here, *extras,
        )  # fmt: skip

    @staticmethod
    def row_sums(chunk, total, count):
        add_row_sums(chunk.logits, chunk.temperatures, chunk.temperature, chunk.softcap, chunk.kept, total, count)

    @staticmethod
    def whole_rows(chunk, with_entropy):
        if chunk.logits.numel() > SMALL:
            return None
        if chunk.bias is not None:
            chunk.logits += chunk.bias
        options = (chunk.temperatures, chunk.temperature, chunk.softcap, walk.NOWHERE, with_entropy)
        log_prob, entropy, *rest = logprobs_fwd(chunk.logits, chunk.labels, *options)
        return Rows(log_prob, entropy if with_entropy else None, *rest)

    @staticmethod
    def gradient(chunk, upstream, rows):
        upstream = [None if g is None else g.to(torch.float32).contiguous() for g in upstream]
        run(
            "linear_gradient_f32", chunk.logits, chunk.logits.stride(0), *chunk.logits.shape, chunk.first, chunk.bias,
            chunk.has_bias_in, chunk.temperatures, chunk.temperature, chunk.softcap or 0.0, chunk.labels, chunk.kept,
            *upstream, *rows[:4],
        )  # fmt: skip
        return chunk.logits, None

    @staticmethod
    def divergence(logits, ref_logits, temperature, reverse):
        kl, *statistics = cpu_kl.kl_fwd(logits, ref_logits, temperature, reverse)
        return kl, *_turned(statistics, reverse)

    @staticmethod
    def divergence_gradient(grad, logits, ref_logits, results, head, reverse):
        results = (results[0], *_turned(results[1:], reverse))
        dlogits = cpu_kl.kl_bwd(grad, logits, ref_logits, *results, head.temperature, reverse, True, False)[0]
        if head.softcap is not None:
            dlogits *= torch.where(logits == float("-inf"), 0.0, 1.0 - (logits / head.softcap).square())
        return dlogits, None


def _turned(statistics, reverse):
    """(max and log sum of the policy, of the reference), or for KL(reference || policy) the other way round."""
    return tuple(statistics) if reverse else (*statistics[2:], *statistics[:2])


class _FastKernels(_Kernels):
    """Products of bf16 factors, whose results PyTorch rounds to bf16; sums over them and everything else are fp32."""

    @staticmethod
    def inputs(head, part, kept):
        h = head.hidden[part] if head.rows is None else head.hidden[head.safe_rows(part)]
        return torch.where(kept.unsqueeze(-1), h.to(torch.bfloat16), 0.0)

    @staticmethod
    def blocks(weight, columns):
        return walk.Kernels.blocks(weight, columns, torch.bfloat16)

    @staticmethod
    def gradient(chunk, upstream, rows):
        dlogits, unit = _Kernels.gradient(chunk, upstream, rows)
        return dlogits.to(torch.bfloat16), unit

    @staticmethod
    def divergence_gradient(grad, logits, ref_logits, results, head, reverse):
        dlogits, unit = _Kernels.divergence_gradient(grad, logits, ref_logits, results, head, reverse)
        return dlogits.to(torch.bfloat16), unit

    @staticmethod
    def product(a, b, out, add=False, unit=None):
        result = torch.mm(a, b)
        out.add_(result) if add else out.copy_(result)


def _kernels(hidden, weight, fast):
    dtypes = (hidden.dtype, weight.dtype)
    return _FastKernels if fast and torch.bfloat16 in dtypes and torch.float16 not in dtypes else _Kernels


operators = Operators(_kernels)
linear_logprobs_fwd = operators.linear_logprobs_fwd
linear_logprobs_bwd = operators.linear_logprobs_bwd
linear_token_statistics_fwd = operators.linear_token_statistics_fwd
linear_policy_fwd = operators.linear_policy_fwd
linear_ppo_fwd = operators.linear_ppo_fwd
linear_kl_fwd = operators.linear_kl_fwd
linear_kl_bwd = operators.linear_kl_bwd
