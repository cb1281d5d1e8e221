"""The backend `cpu`: turns tensors into addresses, strides and counts for the compiled module _cpu.

RLHF_KERNELS_CPU_ISA=base|avx2|avx512 forces an instruction set; by default the newest that the CPU has is taken.
"""

import functools
import os
from pathlib import Path

import torch  # before _cpu: the extension then shares torch's OpenMP threads
from torch import Tensor

HUGE_BYTES = 4 << 20
KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}


@functools.cache
def _load() -> tuple[object | None, str | None]:
    try:
        from . import _cpu
    except ImportError as error:
        note = Path(__file__).with_name("_cpu_build_error.txt")
        return None, note.read_text().strip() if note.exists() else f"rlhf_kernels._cpu cannot be imported: {error}"
    return _cpu, None


def missing() -> str | None:
    """Why the compiled module is not there, or None if it is."""
    return _load()[1]


def isas() -> list[str]:
    """Instruction sets that were built and that this CPU has, plainest first."""
    return _load()[0].isas()


@functools.cache
def _functions(isa: str) -> dict:
    module, reason = _load()
    if reason is not None:
        raise RuntimeError(f"the cpu backend is missing: {reason}")
    if not isa:
        isa = module.isas()[-1]
    if isa not in module.isas():
        known = ", ".join(module.isas())
        raise RuntimeError(f"RLHF_KERNELS_CPU_ISA={isa}: this machine runs only {known}")
    return module.functions(isa)


def _kernel(name: str):
    return _functions(os.environ.get("RLHF_KERNELS_CPU_ISA", ""))[name]


def _fresh(*shape: int) -> Tensor:
    """An uninitialised fp32 result; a large one asks for huge pages, which fault in far more cheaply."""
    out = torch.empty(shape, dtype=torch.float32)
    if out.nbytes >= HUGE_BYTES:
        _load()[0].huge_pages(out.data_ptr(), out.nbytes)
    return out


def _dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is dense, else a copy; the row stride may be anything."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(tensor: Tensor | None) -> tuple[int, int]:
    """Address and row stride; packed and absent tensors have row stride 0."""
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), tensor.stride(0) if tensor.dim() == 2 else 0


def _shape(tensor: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Rows and tokens a row; packed tensors count their rows in cu_seqlens."""
    return (cu_seqlens.shape[0] - 1, 0) if cu_seqlens is not None else (tensor.shape[0], tensor.shape[1])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def gae_fwd(rewards, values, mask, gamma, lam, cu_seqlens, last_values):
    """See reference/advantages.py."""
    rewards, values = _dense_rows(rewards), _dense_rows(values)
    mask = None if mask is None else _dense_rows(mask)
    last_values = None if last_values is None else last_values.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    advantages, returns = (_fresh(*rewards.shape) for _ in range(2))
    _kernel("gae_fwd_f32")(
        *_rows(rewards),
        *_rows(values),
        *_rows(mask),
        _address(last_values),
        _address(cu_seqlens),
        *_shape(rewards, cu_seqlens),
        gamma,
        lam,
        _address(advantages),
        _address(returns),
        torch.get_num_threads(),
    )
    return advantages, returns


def rlhf_advantages_fwd(
    scores,
    log_probs,
    ref_log_probs,
    values,
    mask,
    kl_coef,
    gamma,
    lam,
    kl_estimator,
    reward_clip,
    whiten,
    cu_seqlens,
):
    """See reference/advantages.py."""
    scores = scores.contiguous()
    log_probs, ref_log_probs, values = (_dense_rows(x) for x in (log_probs, ref_log_probs, values))
    mask = None if mask is None else _dense_rows(mask)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    advantages, returns, rewards, kl = (_fresh(*log_probs.shape) for _ in range(4))
    row_stats = torch.empty((scores.shape[0], 3), dtype=torch.float64) if whiten else None
    _kernel("rlhf_advantages_fwd_f32")(
        _address(scores),
        *_rows(log_probs),
        *_rows(ref_log_probs),
        *_rows(values),
        *_rows(mask),
        _address(cu_seqlens),
        *_shape(log_probs, cu_seqlens),
        kl_coef,
        gamma,
        lam,
        KL_ESTIMATORS[kl_estimator],
        float("inf") if reward_clip is None else reward_clip,
        int(whiten),
        _address(row_stats),
        _address(advantages),
        _address(returns),
        _address(rewards),
        _address(kl),
        torch.get_num_threads(),
    )
    return advantages, returns, rewards, kl


def _as_rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _dense_rows(tensor if tensor.dim() == 2 else tensor[None])


def whiten_stats_fwd(values, mask):
    """See reference/advantages.py."""
    rows, keep = _as_rows(values), _as_rows(mask)
    row_stats = torch.empty((rows.shape[0], 3), dtype=torch.float64)
    stats = torch.empty(3, dtype=torch.float64)
    _kernel("whiten_stats_f32")(
        *_rows(rows), *_rows(keep), *rows.shape, _address(row_stats), _address(stats), torch.get_num_threads()
    )
    return stats


def whiten_fwd(values, mask, stats, center):
    """See reference/advantages.py."""
    rows, keep, stats = _as_rows(values), _as_rows(mask), stats.contiguous()
    out = _fresh(*rows.shape)
    _kernel("whiten_fwd_f32")(
        *_rows(rows), *_rows(keep), *rows.shape, _address(stats), int(center), _address(out), torch.get_num_threads()
    )
    return out.view(values.shape)


def bradley_terry_fwd(scores, ranks, cu_groups, margins, ties_half):
    """See reference/bradley_terry.py."""
    scores = scores.to(torch.float32).contiguous()
    loss, grad, stats = _ranking_outputs(scores, cu_groups)
    _kernel("bradley_terry_fwd_f32")(
        _address(scores),
        _address(ranks),
        _address(cu_groups),
        cu_groups.shape[0] - 1,
        _address(margins),
        0 if margins is None or margins.dim() == 1 else margins.shape[1],
        int(ties_half),
        _address(loss),
        _address(grad),
        _address(stats),
        torch.get_num_threads(),
    )
    return loss, grad, stats


def plackett_luce_fwd(scores, ranks, cu_groups):
    """See reference/bradley_terry.py."""
    scores = scores.to(torch.float32).contiguous()
    loss, grad, stats = _ranking_outputs(scores, cu_groups)
    _kernel("plackett_luce_fwd_f32")(
        _address(scores),
        _address(ranks),
        _address(cu_groups),
        cu_groups.shape[0] - 1,
        _address(loss),
        _address(grad),
        _address(stats),
        torch.get_num_threads(),
    )
    return loss, grad, stats


def bradley_terry_bwd(grad_loss, grad, cu_groups):
    """See reference/bradley_terry.py."""
    out = torch.empty_like(grad)
    _kernel("bradley_terry_bwd_f32")(
        _address(grad_loss),
        _address(grad),
        _address(cu_groups),
        cu_groups.shape[0] - 1,
        _address(out),
        torch.get_num_threads(),
    )
    return out


def _ranking_outputs(scores: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    prompts = cu_groups.shape[0] - 1
    return _fresh(prompts), _fresh(scores.shape[0]), _fresh(prompts, 8)
