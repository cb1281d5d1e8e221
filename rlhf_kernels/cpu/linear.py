"""The walk of _linear_walk.py on the chunk kernels of csrc/cpu/linear.cpp; reference/linear.py defines it."""

from __future__ import annotations

import torch

from .. import _linear_walk as walk
from .._native import fresh, run
from . import kl


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
        run(
            "linear_fold_f32", chunk.logits, chunk.logits.stride(0), *chunk.logits.shape, chunk.first, chunk.bias,
            chunk.temperatures, chunk.temperature, chunk.softcap or 0.0, chunk.labels, chunk.kept, state.max,
            state.sum, state.weighted, state.label_logit, state.here,
        )  # fmt: skip

    @staticmethod
    def gradient(chunk, upstream, results):
        upstream = [None if g is None else g.to(torch.float32).contiguous() for g in upstream]
        run(
            "linear_gradient_f32", chunk.logits, chunk.logits.stride(0), *chunk.logits.shape, chunk.first, chunk.bias,
            chunk.has_bias_in, chunk.temperatures, chunk.temperature, chunk.softcap or 0.0, chunk.labels, chunk.kept,
            *upstream, *results,
        )  # fmt: skip
        return chunk.logits, None

    divergence = staticmethod(kl.kl_fwd)

    @staticmethod
    def divergence_gradient(grad, logits, ref_logits, results, head, reverse):
        dlogits = kl.kl_bwd(grad, logits, ref_logits, *results, head.temperature, reverse, True, False)[0]
        if head.softcap is not None:
            dlogits *= torch.where(logits == float("-inf"), 0.0, 1.0 - (logits / head.softcap).square())
        return dlogits, None


operators = walk.Operators(lambda hidden: _Kernels)
linear_logprobs_fwd = operators.linear_logprobs_fwd
linear_logprobs_bwd = operators.linear_logprobs_bwd
linear_cross_entropy_fwd = operators.linear_cross_entropy_fwd
linear_ppo_fwd = operators.linear_ppo_fwd
linear_kl_fwd = operators.linear_kl_fwd
linear_kl_bwd = operators.linear_kl_bwd
