"""What the native functions of csrc expect of each argument, checked before its address is taken.

A prototype names a function's arguments as C++ does, and of an array says more: `f32 x[B * T] by stride` is float32 and
has B * T entries, in rows `stride` entries apart (without `by`: dense); `by T:batch_stride:stride` says that it is
[B, T, V], with planes and rows so far apart; `f32? x[N]` may be absent. A size is an expression in the other
arguments. An array whose dtype is chosen at run time has the argument that holds its code in the place of the dtype.
tests/kernels/test_signatures.py compares the prototypes with csrc.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import torch

_DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "bool": torch.bool,
}
CODED = (torch.float32, torch.bfloat16, torch.float16)  # in the order of enum DType of csrc/include/rk.h
_OFFSETS = (torch.int32, torch.int64)  # by cu_wide

CPU = """
gae_fwd_f32(f32 rewards[B * T or rewards.numel()] by rewards_stride, rewards_stride,
    f32 values[rewards.numel()] by values_stride, values_stride, bool? mask[rewards.numel()] by mask_stride,
    mask_stride, f32? last_values[B], i64? cu_seqlens[B + 1], B, T, gamma, lam, f32 advantages[rewards.numel()],
    f32 returns[rewards.numel()])
rlhf_advantages_fwd_f32(f32 scores[B], f32 log_probs[B * T or log_probs.numel()] by log_probs_stride, log_probs_stride,
    f32 ref[log_probs.numel()] by ref_stride, ref_stride, f32 values[log_probs.numel()] by values_stride, values_stride,
    bool? mask[log_probs.numel()] by mask_stride, mask_stride, i64? cu_seqlens[B + 1], B, T, kl_coef, gamma, lam,
    kl_estimator, reward_clip, whiten, f64? row_stats[3 * B], f32 advantages[log_probs.numel()],
    f32 returns[log_probs.numel()], f32 rewards[log_probs.numel()], f32 kl[log_probs.numel()])
whiten_stats_f32(f32 x[B * T] by x_stride, x_stride, bool? mask[B * T] by mask_stride, mask_stride, B, T,
    f64 row_stats[3 * B], f64 stats[3])
whiten_fwd_f32(f32 x[B * T] by x_stride, x_stride, bool? mask[B * T] by mask_stride, mask_stride, B, T, f64 stats[3],
    center, f32 out[B * T])

bradley_terry_fwd_f32(f32 scores[grad.numel()], i64 ranks[grad.numel()], i64 cu_groups[prompts + 1], prompts,
    f32? margins[grad.numel() * margin_columns if margin_columns else prompts], margin_columns, ties_half,
    f32 loss[prompts], f32 grad[scores.numel()], f32 stats[8 * prompts])
plackett_luce_fwd_f32(f32 scores[grad.numel()], i64 ranks[grad.numel()], i64 cu_groups[prompts + 1], prompts,
    f32 loss[prompts], f32 grad[scores.numel()], f32 stats[8 * prompts])
bradley_terry_bwd_f32(f32 grad_loss[prompts], f32 grad[grad_scores.numel()], i64 cu_groups[prompts + 1], prompts,
    f32 grad_scores[grad.numel()])

kl_fwd(dtype_a a[N * V] by T:batch_a:stride_a, dtype_a, T, batch_a, stride_a, dtype_b b[N * V] by T:batch_b:stride_b,
    dtype_b, batch_b, stride_b, N, V, temperature, f32 kl[N], f32 max_a[N], f32 log_sum_a[N], f32 max_b[N],
    f32 log_sum_b[N])
kl_bwd(f32 grad[N], dtype_a a[N * V] by T:batch_a:stride_a, dtype_a, T, batch_a, stride_a,
    dtype_b b[N * V] by T:batch_b:stride_b, dtype_b, batch_b, stride_b, f32 kl[N], f32 max_a[N], f32 log_sum_a[N],
    f32 max_b[N], f32 log_sum_b[N], N, V, temperature, dtype_a? grad_a[N * V], dtype_b? grad_b[N * V])
approx_kl_fwd(dtype_p p[rows * columns] by stride_p, dtype_p, stride_p, dtype_q q[rows * columns] by stride_q, dtype_q,
    stride_q, rows, columns, estimator, f32 kl[rows * columns])
approx_kl_bwd(f32 grad[rows * columns] by grad_stride, grad_stride, dtype_p p[rows * columns] by stride_p, dtype_p,
    stride_p, dtype_q q[rows * columns] by stride_q, dtype_q, stride_q, rows, columns, estimator,
    dtype_p? grad_p[rows * columns], dtype_q? grad_q[rows * columns])

row_sums(dtype logits[N * V] by stride, dtype, stride, N, V, f32? temperatures[N], temperature, softcap, bool kept[N],
    f64 total[N], f64 count[N])

linear_fold_f32(f32 logits[n * columns] by stride, stride, n, columns, first, f32? bias[columns], f32? temperatures[n],
    temperature, softcap, i64 labels[n], bool kept[n], f32 max[n], f64 rest[n], f64? weighted[n], f32 label_logit[n],
    bool here[n])
linear_fold_extras_f32(f32 logits[n * columns] by stride, stride, n, columns, first, f32? bias[columns],
    f32? temperatures[n], temperature, softcap, i64 labels[n], bool kept[n], f32 max[n], f64 rest[n], f64 weighted[n],
    f32 label_logit[n], bool here[n], f64 squares[n], f64 total[n], f64 count[n], i64 top[n])
linear_gradient_f32(f32 logits[n * columns] by stride, stride, n, columns, first, f32? bias[columns], has_bias_in,
    f32? temperatures[n], temperature, softcap, i64 labels[n], bool kept[n], f32? grad_logprobs[n],
    f32? grad_entropy[n], f32? grad_log_sum_exp[n], f32? grad_each[n], f32 logprobs[n], f32? entropy[n], f32 max[n],
    f32 log_sum[n])

logprobs_fwd(dtype logits[N * V] by T:batch_stride:stride, dtype, T, batch_stride, stride, i64? labels[N], N, V,
    f32? temperatures[N], temperature, softcap, ignore_index, f32 logprobs[0 if labels is None else N],
    f32? entropy[N], f32 row_max[N], f32 log_sum[N])
token_statistics_fwd(dtype logits[N * V] by T:batch_stride:stride, dtype, T, batch_stride, stride, i64 labels[N], N, V,
    f32? temperatures[N], temperature, softcap, ignore_index, f32 logprobs[N], f32 entropy[N], f32 row_max[N],
    f32 log_sum[N], f32 log_squares[N], f32 mean[N], bool top[N])
logprobs_bwd(f32? grad_logprobs[N], f32? grad_entropy[N], f32? grad_log_sum_exp[N], f32? grad_each[N],
    dtype logits[N * V] by T:batch_stride:stride, dtype, T, batch_stride, stride, i64? labels[N],
    f32 logprobs[0 if labels is None else N], f32 entropy[N if grad_entropy is not None else entropy.numel()],
    f32 row_max[N], f32 log_sum[N], N, V, f32? temperatures[N], temperature, softcap, ignore_index,
    dtype out[N * V] by T:out_batch_stride:out_stride, out_batch_stride, out_stride)

policy_fwd_f32(bool mask[B * T], f32? log_probs[B * T], f32? old_log_probs[B * T], f32? advantages[B * T],
    f32? ref_log_probs[B * T], f32? weights[B * T], f32? coefficients[B * T], f32? values[B * T],
    f32? old_values[B * T], f32? returns[B * T], f32? entropy[B * T], f32? normalizer[1], f32? entropy_normalizer[1],
    f64 settings[18], B, T, piece, i64 lengths[B], f32? sequences[2 * B],
    f64 workspace[33 * pieces(B * T, piece)], f32 losses[4], f32 grad_log_probs[0 if log_probs is None else B * T],
    f32 grad_values[0 if values is None else B * T], f32 grad_entropy[0 if entropy is None else B * T], f32 stats[19])
policy_bwd_f32(f32? grad_loss[1], f32? grad_policy_loss[1], f32? grad_value_loss[1], vf_coef,
    f32 grad_log_probs[log_probs], f32 grad_values[values], f32 grad_entropy[entropy], log_probs, values, entropy,
    f32 out_log_probs[log_probs], f32 out_values[values], f32 out_entropy[entropy])

preference_fwd_f32(f32 chosen[chosen_count], f32 rejected[rejected_count], f32? ref_chosen[chosen_count],
    f32? ref_rejected[rejected_count], i64? chosen_lengths[chosen_count], i64? rejected_lengths[rejected_count],
    chosen_count, rejected_count, kind, f32? anchor[1], beta, a, b, divergence, alpha,
    f32 loss[chosen_count + (rejected_count if kind == 4 else 0)], f32 grad_chosen[chosen_count],
    f32 grad_rejected[rejected_count], f32 chosen_rewards[chosen_count], f32 rejected_rewards[rejected_count])
preference_bwd_f32(f32 for_chosen[chosen_count], f32 for_rejected[rejected_count], f32 grad_chosen[chosen_count],
    f32 grad_rejected[rejected_count], chosen_count, rejected_count, f32 out_chosen[chosen_count],
    f32 out_rejected[rejected_count])
"""

CUDA = """
gae_fwd_f32(f32 rewards[count] by rewards_stride, rewards_stride,
    f32 values[count] by values_stride, values_stride, bool? mask[count] by mask_stride,
    mask_stride, f32? last_values[B], cu_wide? cu[B + 1], cu_wide, B, T, count, gamma, lam, units, f64 parts[2 * units],
    i32 control[units + 2], f32 advantages[count], f32 returns[count])
rlhf_advantages_fwd_f32(f32 scores[B], f32 log_probs[count] by log_probs_stride, log_probs_stride,
    f32 ref[count] by ref_stride, ref_stride, f32 values[count] by values_stride, values_stride,
    bool? mask[count] by mask_stride, mask_stride, cu_wide? cu[B + 1], cu_wide, B, T, count, kl_coef, gamma, lam,
    kl_estimator, reward_clip, units, f64 parts[2 * units], i32 control[units + 2], f64? moments[3 * (units or B) + 3],
    f32 advantages[count], f32 returns[count], f32 rewards[count], f32 kl[count])
whiten_stats_f32(f32 x[rows * columns] by x_stride, x_stride, bool? mask[rows * columns] by mask_stride, mask_stride,
    rows, columns, f64 blocks[3 * pieces(rows * columns, 4096)], f64 stats[3])
whiten_fwd_f32(f32 x[rows * columns] by x_stride, x_stride, bool? mask[rows * columns] by mask_stride, mask_stride,
    rows, columns, f64 stats[3], center, f32 out[rows * columns])

bradley_terry_fwd(dtype scores[responses], dtype, i64 ranks[responses], i64 cu_groups[prompts + 1], prompts, responses,
    f32? margins[responses * margin_columns if margin_columns else prompts], margin_columns, ties_half,
    f32 loss[prompts], f32 grad[responses], f32 stats[8 * prompts])
plackett_luce_fwd(dtype scores[responses], dtype, i64 ranks[responses], i64 cu_groups[prompts + 1], prompts, responses,
    f32 peaks[responses], f32 inverses[responses], f32 loss[prompts], f32 grad[responses], f32 stats[8 * prompts])
bradley_terry_bwd(f32 grad_loss[prompts], f32 grad[responses], i64 cu_groups[prompts + 1], prompts, responses,
    f32 out[responses])
ranking_fwd(dtype scores[responses], dtype, i64 ranks[responses], i64? cu_groups[prompts + 1], columns, prompts,
    responses, f32? margins[responses * margin_columns if margin_columns else prompts], margin_columns, kind,
    f32? normalizer[1], number, f32? peaks[responses], f32? inverses[responses],
    f64 records[10 * max(pieces(prompts, 8), min(prompts, 1056), 1)], i32 done[1], f32 value[1], f32 grad[responses],
    f32 metrics[7])
ranking_bwd(f32 grad_value[1], f32 divisor[1], f32 grad[responses], responses, f32 out[responses])

kl_fwd(dtype_a a[N * V] by T:batch_a:stride_a, dtype_a, T, batch_a, stride_a, dtype_b b[N * V] by T:batch_b:stride_b,
    dtype_b, batch_b, stride_b, N, V, temperature, f64? partial[4 * N * pieces(V, 16384)], f32 kl[N], f32 max_a[N],
    f32 log_sum_a[N], f32 max_b[N], f32 log_sum_b[N])
kl_bwd(f32 grad[N], dtype_a a[N * V] by T:batch_a:stride_a, dtype_a, T, batch_a, stride_a,
    dtype_b b[N * V] by T:batch_b:stride_b, dtype_b, batch_b, stride_b, f32 kl[N], f32 max_a[N], f32 log_sum_a[N],
    f32 max_b[N], f32 log_sum_b[N], N, V, temperature, dtype_a? grad_a[N * V], dtype_b? grad_b[N * V])
approx_kl_fwd(dtype_p p[rows * columns] by stride_p, dtype_p, stride_p, dtype_q q[rows * columns] by stride_q, dtype_q,
    stride_q, rows, columns, estimator, f32 kl[rows * columns])
approx_kl_bwd(f32 grad[rows * columns] by grad_stride, grad_stride, dtype_p p[rows * columns] by stride_p, dtype_p,
    stride_p, dtype_q q[rows * columns] by stride_q, dtype_q, stride_q, rows, columns, estimator,
    dtype_p? grad_p[rows * columns], dtype_q? grad_q[rows * columns])

logprobs_fwd(dtype logits[N * V] by T:batch_stride:stride, dtype, T, batch_stride, stride, i64? labels[N], N, V,
    f32? temperatures[N], temperature, softcap, ignore_index, f64? partial[4 * N * pieces(V, 32768)],
    f32 logprobs[0 if labels is None else N], f32? entropy[N], f32 row_max[N], f32 log_sum[N])
token_statistics_fwd(dtype logits[N * V] by T:batch_stride:stride, dtype, T, batch_stride, stride, i64 labels[N], N, V,
    f32? temperatures[N], temperature, softcap, ignore_index, f64? partial[8 * N * pieces(V, 8192)], f32 logprobs[N],
    f32 entropy[N], f32 row_max[N], f32 log_sum[N], f32 log_squares[N], f32 mean[N], bool top[N])
logprobs_bwd(f32? grad_logprobs[N], f32? grad_entropy[N], dtype logits[N * V] by T:batch_stride:stride, dtype, T,
    batch_stride, stride, i64? labels[N], f32 logprobs[0 if labels is None else N],
    f32 entropy[N if grad_entropy is not None else entropy.numel()], f32 row_max[N], f32 log_sum[N], N, V,
    f32? temperatures[N], temperature, softcap, ignore_index, dtype out[N * V] by T:out_batch_stride:out_stride,
    out_batch_stride, out_stride)

policy_fwd_f32(bool mask[B * T], f32? log_probs[B * T], f32? old_log_probs[B * T], f32? advantages[B * T],
    f32? ref_log_probs[B * T], f32? weights[B * T], f32? coefficients[B * T], f32? values[B * T],
    f32? old_values[B * T], f32? returns[B * T], f32? entropy[B * T], f32? normalizer[1], f32? entropy_normalizer[1],
    B, T, term, a, b, c, d, log_ratio_clamp, kl_estimator, kl_gradient, kl_coef, kl_low, kl_high, kl_cap,
    kl_ratio_cap, cliprange_value, value_scale, entropy_scale, loss_agg_mode, entropy_agg_mode, i64 counts[512 + B],
    i64 lengths[B], f32 parts[2 * B if term in (1, 4) else 0],
    f64 records[25 * ((pieces(B * T, 2048) or 1) + (pieces(B * T, 65536) or 1))],
    i32 done[(pieces(B * T, 65536) or 1) + 1], f32 losses[4], f32? loss[1],
    f32 grad_log_probs[0 if log_probs is None else B * T],
    f32 grad_values[0 if values is None else B * T], f32 grad_entropy[0 if entropy is None else B * T], f32 stats[19])

ppo_fwd_f32(f32 log_probs[B * T], f32 old_log_probs[B * T], f32 advantages[B * T], bool mask[B * T], f32? values[B * T],
    f32? old_values[B * T], f32? returns[B * T], f32? entropy[B * T], f32? normalizer[1], B, T, cliprange,
    cliprange_high, dual_clip, cliprange_value, aggregation, value_scale, entropy_scale, vf_coef,
    i64 counts[512 + B], i64 lengths[B], f64 records[17 * ((pieces(B * T, 2048) or 1) + (pieces(B * T, 65536) or 1))],
    i32 done[(pieces(B * T, 65536) or 1) + 1], f32 losses[3], f32? loss[1], f32? policy_loss[1], f32? value_loss[1],
    f32 grad_log_probs[B * T],
    f32 grad_values[0 if values is None else B * T], f32 grad_entropy[0 if entropy is None else B * T], f32 stats[12])
ppo_bwd_f32(f32? grad_loss[1], f32? grad_policy_loss[1], f32? grad_value_loss[1], vf_coef,
    f32 grad_log_probs[log_probs], f32 grad_values[values], f32 grad_entropy[entropy], log_probs, values, entropy,
    f32 out_log_probs[log_probs], f32 out_values[values], f32 out_entropy[entropy])
"""

_PROTOTYPE = re.compile(r"^(\w+)\((.*?)\)$", re.DOTALL | re.MULTILINE)
_COMMA = re.compile(r",\s*(?![^\[]*\])")
_ARRAY = re.compile(
    r"(?P<dtype>\w+)(?P<optional>\?)? (?P<name>\w+)\[(?P<size>.*)\](?: by (?P<stride>[\w:]+))?", re.DOTALL
)


class Array(NamedTuple):
    """An argument that is an array, its dtype (or which argument holds the code of it), size and row stride."""

    name: str
    dtype: str
    optional: bool
    size: str
    stride: str | None

    @property
    def dtype_expression(self) -> str:
        if self.dtype in _DTYPES:
            return self.dtype
        return f"{'offsets' if self.dtype == 'cu_wide' else 'floats'}[{self.dtype}]"

    def condition(self, place: str) -> str:
        """An expression in the arguments: whether the kernel reads and writes this one as it is."""
        x = self.name
        layout = f"{x}.is_contiguous()"
        if self.stride and ":" in self.stride:
            layout = f"in_planes({x}, {self.stride.replace(':', ', ')})"
        elif self.stride:
            layout = f"({x}.stride() == ({self.stride}, 1) or in_rows({x}, {self.stride}))"
        entries = f"{x}.dtype is {self.dtype_expression} and {x}.numel() == ({self.size})"
        fits = f"({entries} and {x}.{place} and {layout})"
        return f"({x} is None or {fits})" if self.optional else fits


class Signature:
    """A prototype, and the check of a call against it."""

    def __init__(self, name: str, arguments: str, place: str):
        parts = _COMMA.split(arguments)
        found = [_ARRAY.fullmatch(part) for part in parts]
        self.name, self.names = name, [array["name"] if array else part for array, part in zip(found, parts)]
        self.arrays = {
            array["name"]: Array(array["name"], array["dtype"], bool(array["optional"]), array["size"], array["stride"])
            for array in found
            if array
        }
        self.required = [name for name, array in self.arrays.items() if not array.optional]
        present = [f"{name} is not None" for name in self.required]
        self.conditions = {name: array.condition(place) for name, array in self.arrays.items()}
        self.fits = self._compiled(" and ".join([*present, *self.conditions.values()]))

    def _compiled(self, expression):
        """A function (device, *arguments): compiled, because it stands before every call of a kernel."""
        layouts = {"in_rows": _in_rows, "in_planes": _in_planes}
        known = {**_DTYPES, **layouts, "floats": CODED, "offsets": _OFFSETS, "pieces": _pieces}
        return eval(f"lambda device, {', '.join(self.names)}: {expression}", known)

    def check(self, args: tuple, device: torch.device) -> None:
        """RuntimeError if the native function would misread one of these arguments."""
        if len(args) != len(self.names):
            raise TypeError(f"{self.name} takes {len(self.names)} arguments, got {len(args)}")
        if not self.fits(device, *args):
            raise RuntimeError(f"internal error: {self.name} takes {self._misfit(args, device)}; please report it")

    def _misfit(self, args, device):
        """Which array does not fit: what is wanted, and what came."""
        given = dict(zip(self.names, args))
        for name in self.required:
            if given[name] is None:
                return f"{name}, got None"
        fits = {name: self._compiled(condition) for name, condition in self.conditions.items()}
        array = next(array for name, array in self.arrays.items() if not fits[name](device, *args))
        dtype, size = self._compiled(f"({array.dtype_expression}, {array.size})")(device, *args)
        x, layout = given[array.name], f"in rows as {array.stride} says" if array.stride else "dense"
        wanted = f"{array.name} as {dtype} on {device} with {size} entries, {layout}"
        return f"{wanted}, got {x.dtype} on {x.device} with shape {list(x.shape)}, strides {list(x.stride())}"


def _pieces(count, size):
    return -(-count // size)


def _in_rows(x, stride):
    """Whether the rows of x are dense, and `stride` entries apart; a tensor of one dimension has one row.

    An empty one is, whatever its strides: no entry is read.
    """
    if x.dim() != 2 or not x.numel():
        return x.is_contiguous()
    rows, columns = x.shape
    return (columns <= 1 or x.stride(1) == 1) and (rows <= 1 or x.stride(0) == stride)


def _in_planes(x, length, batch_stride, stride):
    """Whether x is [B, T, V] with dense rows, and its planes and rows are so many entries apart; or empty."""
    if x.dim() != 3 or not x.numel():
        return not x.numel()
    planes, rows, columns = x.shape
    dense = columns == 1 or x.stride(2) == 1
    apart = (planes == 1 or x.stride(0) == batch_stride) and (rows == 1 or x.stride(1) == stride)
    return rows == length and dense and apart


@functools.cache
def signatures(prototypes: str) -> dict[str, Signature]:
    """{name: Signature} of CPU or CUDA."""
    place = "is_cpu" if prototypes is CPU else "device == device"
    return {name: Signature(name, arguments, place) for name, arguments in _PROTOTYPE.findall(prototypes)}
