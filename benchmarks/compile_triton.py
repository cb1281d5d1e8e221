"""Every Triton kernel, compiled without a GPU in each specialisation that calls of usual sizes launch.

    python -m benchmarks.compile_triton [OP ...] [--target sm_90 --target gfx942] [--json]

The calls run on `meta` tensors: the launchers compute their grids and block sizes, and what they would launch is
compiled instead. Printed: registers a thread, shared memory, and bytes that spill; a spill is an error. Of NVIDIA's
machine code also the fewest and the most instructions an entry among the specialisations, barriers a turn, and the
widest load of each (`benchmarks.machine_code`): of a turn of the innermost loop that reads most of global memory, or,
where that is not a quarter of what the kernel reads, of the whole kernel once. A program's entries (BLOCK, PIECE, or
ROWS x COLUMNS) are shared out evenly to its threads, 32 a warp.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import machine_code
from rlhf_kernels._native import KL_ESTIMATORS
from rlhf_kernels.reference.bradley_terry import KINDS
from rlhf_kernels.reference.policy import ESTIMATORS, KL_GRADIENTS, TERMS, Settings, Tensors
from rlhf_kernels.reference.ppo import AGG_MODES
from rlhf_kernels.triton import _launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
            torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1", torch.uint8: "*u8"}  # fmt: skip
F32, BF16, I64, BOOL = torch.float32, torch.bfloat16, torch.int64, torch.bool


def new(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def logprobs(op) -> None:
    rows = new(64)
    plain, capped = (1.0, None), (0.7, 30.0)
    for vocab, dtype, (temperature, softcap), entropy in (
        (151936, BF16, plain, True), (151936, BF16, plain, False), (151936, BF16, (0.7, None), True),
        (151936, BF16, capped, True), (50257, F32, plain, True), (50257, torch.float16, plain, True),
        (1000, BF16, plain, True),
    ):  # fmt: skip
        logits, labels, options = new(64, vocab, dtype=dtype), new(64, dtype=I64), (temperature, softcap, -100)
        op.logprobs_fwd(logits, labels, None, *options, entropy)
        op.logprobs_bwd(rows, rows if entropy else None, logits, labels, None, rows, rows, rows, rows, *options)
        if entropy:
            op.token_statistics_fwd(logits, labels, None, *options)
    one = new(1)
    op.logprobs_fwd(new(1, 1, dtype=BF16), new(1, dtype=I64), None, *plain, -100, True)
    op.logprobs_bwd(one, one, new(1, 1, dtype=BF16), new(1, dtype=I64), None, one, one, one, one, *plain, -100)
    op.token_statistics_fwd(new(1, 1, dtype=BF16), new(1, dtype=I64), None, *plain, -100)
    logits = new(64, 151936, dtype=BF16)
    op.logprobs_fwd(logits, None, None, 1.0, None, 0, True)
    op.logprobs_bwd(None, rows, logits, None, None, rows, rows, rows, rows, 1.0, None, 0)
    logits, labels = new(8, 9, 151936, dtype=BF16)[:, :-1], new(8, 8, dtype=I64)  # rows in planes, each its temperature
    op.logprobs_fwd(logits, labels, rows, 1.0, None, -100, True)
    op.logprobs_bwd(rows, rows, logits, labels, rows, rows, rows, rows, rows, 1.0, None, -100)


def bradley_terry(op) -> None:
    prompts, total = 1024, 1024 * 9
    cu_groups, ranks = new(prompts + 1, dtype=I64), new(total, dtype=I64)
    for margins in (None, new(prompts), new(total, 16)):
        for ties_half in (False, True):
            op.bradley_terry_fwd(new(total), ranks, cu_groups, margins, ties_half)
    for dtype in (F32, BF16, torch.float16):  # the dtype changes one conversion
        op.bradley_terry_fwd(new(total, dtype=dtype), ranks, cu_groups, None, False)
        op.plackett_luce_fwd(new(total, dtype=dtype), ranks, cu_groups)
    op.bradley_terry_bwd(new(prompts), new(total), cu_groups)
    op.ranking_metrics_fwd(new(prompts, 8))
    for kind in KINDS:
        op.ranking_fwd(new(total), ranks, None, 9, prompts, None, kind, 0.0, None)
        op.ranking_fwd(new(total), ranks, cu_groups, 0, prompts, None, kind, 0.0, new(1)[0])
    op.ranking_bwd(new(1)[0], new(total), new(1)[0])
    op.bradley_terry_fwd(new(1), new(1, dtype=I64), new(2, dtype=I64), new(1, 1), False)
    op.plackett_luce_fwd(new(1), new(1, dtype=I64), new(2, dtype=I64))
    op.bradley_terry_bwd(new(1), new(1), new(2, dtype=I64))


def preference(op) -> None:
    lengths, numbers = new(512, dtype=I64), (0.1, 0.1, 0.5)
    terms = (
        "sigmoid",
        "ipo",
        "hinge",
        "exo_pair",
        "discopop",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
    )
    for dtype in (F32, BF16, torch.float16):
        x = new(512, dtype=dtype)
        for of_tokens in (None, lengths):
            for term in terms if dtype == F32 else terms[:3]:  # the dtype changes one conversion
                op.preference_fwd(x, x, x, x, of_tokens, of_tokens, None, term, *numbers, "reverse_kl", 1.0)
            op.preference_fwd(x, x, x, x, of_tokens, of_tokens, new(), "kto", *numbers, "reverse_kl", 1.0)
        op.preference_fwd(x, x, x, x, None, None, new(), "bco_pair", *numbers, "reverse_kl", 1.0)
        for divergence in ("js_divergence", "alpha_divergence"):
            op.preference_fwd(x, x, x, x, None, None, None, "sigmoid", *numbers, divergence, 0.5)
        for term in ("orpo", "sigmoid"):
            op.preference_fwd(x, x, None, None, lengths, lengths, None, term, *numbers, "reverse_kl", 1.0)
    one = new(1)
    op.preference_fwd(one, one, one, one, None, None, None, "sigmoid", *numbers, "reverse_kl", 1.0)
    op.preference_fwd(one, one, one, one, None, None, new(), "kto", *numbers, "reverse_kl", 1.0)
    op.preference_bwd(one, one, one)
    op.preference_bwd(new(512), new(512), new(512))
    op.preference_bwd(new(1024), new(512), new(512))


def kl(op) -> None:
    rows, needs = new(64), ((True, False), (True, True))
    for vocab, policy, ref, temperature in (
        (151936, BF16, BF16, 1.0), (151936, F32, BF16, 0.7), (50257, torch.float16, torch.float16, 1.0),
        (50257, F32, F32, 1.0), (1000, BF16, BF16, 1.0), (1, BF16, BF16, 1.0),
    ):  # fmt: skip
        sides = new(64, vocab, dtype=policy), new(64, vocab, dtype=ref)
        for reverse in (True, False):
            op.kl_fwd(*sides, temperature, reverse)
            for need in needs:
                op.kl_bwd(rows, *sides, *(rows,) * 5, temperature, reverse, *need)
    for dtype in (F32, BF16):
        for tokens in (new(512, 1024, dtype=dtype), new(512, 2048, dtype=dtype)[:, ::2], new(1, 1, dtype=dtype)):
            for estimator in ("k1", "k2", "k3"):
                op.approx_kl_fwd(tokens, tokens, estimator)
                op.approx_kl_bwd(new(*tokens.shape), tokens, tokens, estimator, True, True)


def linear(op) -> None:
    count, columns, no_group = 4096, 256, (0, False, None, 0)
    flat, labels, mask = new(count), new(count, dtype=I64), new(count, dtype=BOOL)
    plain, warm, capped = (None, None, 1.0, None), (None, flat, 1.0, None), (new(151936), None, 0.7, 30.0)
    for vocab, dtype, (bias, heat, temperature, softcap) in (
        (1, BF16, plain), (151936, BF16, plain), (151936, BF16, warm), (151936, BF16, capped),
        (50257, torch.float16, plain), (50257, F32, plain),
    ):  # fmt: skip
        hidden, weight = new(count, columns, dtype=dtype), new(vocab, columns, dtype=dtype)
        head, scale = (hidden, weight, labels, None, bias, heat, None, None), (temperature, softcap, -100)
        needs = (True, True, bias is not None)
        op.linear_logprobs_fwd(*head, *scale, False, False, *no_group)
        op.linear_logprobs_fwd(*head, *scale, True, False, *no_group)
        op.linear_token_statistics_fwd(*head, *scale, *no_group)
        for upstream in ((flat, None), (flat, flat)):
            op.linear_logprobs_bwd(*upstream, *head, *(flat,) * 4, *scale, *no_group, needs)
        op.linear_ppo_fwd(
            *head, flat, flat, mask, None, *scale[:2], 0.2, 0.2, None, 0.1, "token-mean", *no_group, needs
        )  # fmt: skip
        for reverse in (True, False):
            sides = (hidden, weight, hidden, weight, None, bias, bias, temperature, softcap, reverse)
            op.linear_kl_fwd(*sides, False, *no_group[:3])
            op.linear_kl_bwd(flat, *sides, *no_group[:3], *needs)


def advantages(op) -> None:
    cases = (
        (1, 1, 0),
        (1, None, 1),
        (64, 32768, 0),
        (1024, 8192, 0),
        (512, 100, 0),
        (512, None, 2**20),
        (1024, None, 2**24),
    )
    for rows, length, tokens in cases:
        shape, packed = ((tokens,), new(rows + 1, dtype=I64)) if length is None else ((rows, length), None)
        x, mask, scores = new(*shape), new(*shape, dtype=BOOL), new(rows)
        op.gae_fwd(x, x, mask, 1.0, 0.95, packed, None)
        op.gae_fwd(x, x, None, 1.0, 0.95, packed, scores)
        for estimator in KL_ESTIMATORS if (rows, length) in ((64, 32768), (512, None)) else ("k3",):
            op.rlhf_advantages_fwd(scores, x, x, x, mask, 0.1, 1.0, 0.95, estimator, None, True, packed)
        op.rlhf_advantages_fwd(scores, x, x, x, None, 0.1, 1.0, 0.95, "k3", 1.0, False, packed)
        for keep in (mask, None):
            op.whiten_fwd(x, keep, op.whiten_stats_fwd(x, keep), False)


def cross_entropy(op) -> None:
    count, columns, terms = 4096, 256, ((0.0, 0.0, False), (0.1, 0.0, False), (0.1, 1e-4, False), (0.0, 0.0, True))
    flat, labels, execution = new(count), new(count, dtype=I64), (0, False, None, 0, (True, True, False))
    for vocab, dtype, temperature, softcap in (
        (1, BF16, 1.0, None), (151936, BF16, 1.0, None), (151936, BF16, 0.7, 30.0), (50257, torch.float16, 1.0, None),
        (50257, F32, 1.0, None),
    ):  # fmt: skip
        hidden, weight = new(count, columns, dtype=dtype), new(vocab, columns, dtype=dtype)
        logits, scale = new(64, vocab, dtype=dtype), (temperature, softcap, -100)
        for term in terms:
            op.linear_cross_entropy_fwd(hidden, weight, labels, *(None,) * 6, *scale, *term, *execution)
            op.cross_entropy_fwd(logits, labels[:64], None, *scale, *term)
            op.cross_entropy_bwd(flat[:64], logits, labels[:64], None, *(flat[:64],) * 4, *scale, *term)


def ppo(op) -> None:
    x, mask, number, limits = new(512, 1024), new(512, 1024, dtype=BOOL), new(1)[0], (0.2, 0.2, None, 0.2)
    for mode in op.AGG_MODES:
        op.ppo_fwd(x, x, x, mask, None, None, None, None, None, *limits, mode)
        op.ppo_fwd(x, x, x, mask, x, x, x, None, number, *limits, mode)
        op.ppo_fwd(x, x, x, mask, x, None, x, x, None, *limits, mode)
    one = new(1, 1)
    op.ppo_fwd(one, one, one, new(1, 1, dtype=BOOL), one, one, one, one, None, *limits, "token-mean")
    op.ppo_bwd(number, None, None, one, one, one, 0.1)
    short, mask = new(512, 100, dtype=BF16), new(512, 100, dtype=BOOL)
    op.ppo_fwd(short, short, short, mask, short, short, short, short, None, *limits, "seq-mean-token-mean")
    for values in (x, new(0)):
        op.ppo_bwd(number, None, None, x, values, values, 0.1)
        op.ppo_bwd(None, number, number, x, values, values, 0.1)


def policy(op) -> None:
    x, mask, number = new(512, 1024), new(512, 1024, dtype=BOOL), new(1)[0]
    alone = Tensors(mask, x, x, x)
    whole = alone._replace(ref_log_probs=x, weights=x, coefficients=x, entropy=x)
    modes = {"loss_agg_mode": AGG_MODES.index("seq-mean-token-mean")}
    for term in range(len(TERMS)):
        op.policy_fwd(alone, Settings(term=term))
        op.policy_fwd(whole, Settings(term=term, kl_estimator=2, log_ratio_clamp=20.0, **modes))
    for estimator in range(len(ESTIMATORS)):
        for gradient in range(len(KL_GRADIENTS)):
            op.policy_fwd(alone._replace(ref_log_probs=x), Settings(kl_estimator=estimator, kl_gradient=gradient))
    op.policy_fwd(whole, Settings(term=TERMS.index("sequence"), d=1.0))
    for mode in range(len(AGG_MODES)):
        given = alone._replace(entropy=x, normalizer=number if mode != AGG_MODES.index("token-sum") else None)
        op.policy_fwd(given, Settings(loss_agg_mode=mode))
        op.policy_fwd(Tensors(mask, values=x, old_values=x, returns=x), Settings(loss_agg_mode=mode))
    for mode in range(len(AGG_MODES)):
        op.policy_fwd(Tensors(new(1, 1, dtype=BOOL), *(new(1, 1),) * 3), Settings(loss_agg_mode=mode))
    short, mask = new(512, 100, dtype=BF16), new(512, 100, dtype=BOOL)
    op.policy_fwd(Tensors(mask, *(short,) * 6, entropy=short), Settings(term=TERMS.index("gmpo"), **modes))
    for entropy in (x, new(0)):
        op.policy_bwd(number, None, None, x, new(0), entropy, 1.0)


# op -> calls of its Triton functions at usual sizes, which between them launch every specialisation
CALLS: dict[str, Callable] = {
    "logprobs": logprobs, "bradley_terry": bradley_terry, "preference": preference, "kl": kl, "linear": linear,
    "cross_entropy": cross_entropy, "advantages": advantages, "ppo": ppo, "policy": policy,
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel in one specialisation: types and constants of its parameters, which of them 16 divides, its warps."""

    kernel: object
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]
    warps: int
    registers: int | None  # a thread's bound on NVIDIA

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"


def described(kernel, args, options) -> Launch:
    warps, registers = options.pop("num_warps", 4), options.pop("registers", None)
    values = dict(zip(kernel.arg_names, args)) | options
    types, constants, aligned = [], [], []
    constexpr = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    plain = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        special = type(value) is int and name not in plain
        if name in constexpr or value is None or (special and value == 1):
            types.append((name, "constexpr"))
            constants.append((name, value))
            continue
        if isinstance(value, torch.Tensor):
            types.append((name, POINTERS[value.dtype]))
        elif isinstance(value, bool):
            types.append((name, "i1"))
        elif isinstance(value, int):
            types.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
        else:
            types.append((name, "fp32"))
        if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            aligned.append(index)
    return Launch(kernel, tuple(types), tuple(constants), tuple(aligned), warps, registers)


def launches(op: str) -> list[Launch]:
    """What the op's CALLS launch, each specialisation once."""
    found: dict[Launch, None] = {}

    def record(kernel, programs, *args, **options):
        found[described(kernel, args, dict(options))] = None

    run, _launch.run = _launch.run, record
    try:
        CALLS[op](importlib.import_module(f"rlhf_kernels.triton.{op}"))
    finally:
        _launch.run = run
    return list(found)


def compiled(launch: Launch, target: str):
    """The compiled kernel; raises what the compiler raises."""
    attributes = {(index,): [["tt.divisibility", 16]] for index in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.types), dict(launch.constants), attributes)
    options = {"num_warps": launch.warps, "enable_fp_fusion": False}
    if launch.registers is not None and not target.startswith("gfx"):
        options["maxnreg"] = launch.registers
    return triton.compile(source, target=TARGETS[target], options=options)


# kernels with code of its own for the last program, whose loads and stores are masked: not what the others run
ENDS_APART = {"policy.product_kernel"}
# kernels that are one loop over their pieces, which writes results too: what is before and behind it runs once
WALKS = {"policy.loss_kernel"}


@dataclass(frozen=True)
class Counts:
    """Of a compiled kernel: registers a thread, bytes; and of its machine code, as this module's text says."""

    registers: int
    shared: int
    spilled: int
    per_entry: float | None = None  # instructions; None where a program has no entries, and on AMD
    barriers: int = 0
    widest_load: int = 0  # bits a thread
    code: machine_code.Code | None = None


def entries(launch: Launch) -> float | None:
    """How many entries a thread takes a turn, if the program has a size in entries and they occupy its threads."""
    sizes = dict(launch.constants)
    tile = sizes["ROWS"] * sizes["COLUMNS"] if {"ROWS", "COLUMNS"} <= set(sizes) else None
    size = sizes.get("BLOCK", sizes.get("PIECE", tile))
    return None if size is None or size < 32 * launch.warps else size / (32 * launch.warps)


def counts(launch: Launch, target: str) -> Counts:
    """What the launch's kernel takes of a processor on this target."""
    kernel = compiled(launch, target)
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]

        def number(field):
            return int(re.search(rf"\.{field}:\s+(\d+)", text)[1])

        return Counts(number("vgpr_count"), kernel.metadata.shared, number("private_segment_fixed_size"))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool) if tool.exists() else "cuobjdump", "-res-usage", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        (machine,) = machine_code.kernels(cubin)
    registers, stack, local = (int(re.search(rf"{field}:(\d+)", done.stdout)[1]) for field in ("REG", "STACK", "LOCAL"))
    code, taken, turns = machine.once(cheapest=launch.name in ENDS_APART), entries(launch), machine.loops()
    if launch.name in WALKS:
        code = next(turn for turn in turns if turn.stores)
    elif turns and launch.name not in ENDS_APART and 4 * sum(turns[0].loads) >= sum(code.loads) > 0:
        code = turns[0]
    per_entry = None if taken is None else code.instructions / taken
    return Counts(
        registers, kernel.metadata.shared, stack + local, per_entry, code.count("BAR"), 8 * max(code.loads, default=0),
        code,
    )  # fmt: skip


FIELDS = ("kernel", "target", "variants", "registers", "shared", "spilled", "least", "most", "barriers", "load")


def report(ops: list[str], targets: list[str]) -> Iterator[tuple]:
    """Rows of FIELDS: most registers, shared memory and spilled bytes of all specialisations of a kernel; fewest and
    most instructions an entry; most barriers; bits of the narrowest of their widest loads."""
    for op in ops:
        jobs = [(launch, target) for launch in launches(op) for target in targets]
        with ThreadPoolExecutor(max_workers=2) as pool:
            results = list(pool.map(lambda job: counts(*job), jobs))
        found: dict[tuple[str, str], list[Counts]] = {}
        for (launch, target), result in zip(jobs, results):
            found.setdefault((launch.name, target), []).append(result)
        for (name, target), all_of in found.items():
            most = [max(getattr(x, field) for x in all_of) for field in ("registers", "shared", "spilled", "barriers")]
            per_entry = [x.per_entry for x in all_of if x.per_entry is not None]
            limits = [round(f(per_entry), 1) if per_entry else None for f in (min, max)]
            yield name, target, len(all_of), *most[:3], *limits, most[3], min(x.widest_load for x in all_of)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(CALLS)}; all by default")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="all by default")
    parser.add_argument("--json", action="store_true", help="a list of rows instead of a table")
    options = parser.parse_args(arguments)
    if _launch.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set, so there is nothing to compile; unset it")
    if unknown := sorted(set(options.ops) - set(CALLS)):
        parser.error(f"unknown op {unknown[0]}; known: {', '.join(CALLS)}")
    line = "{:44}{:9}{:>9}{:>10}{:>8}{:>8}{:>8}{:>8}{:>9}{:>6}"
    if not options.json:
        print(line.format(*FIELDS))
    rows = []
    for row in report(options.ops or list(CALLS), options.target or list(TARGETS)):
        rows.append(dict(zip(FIELDS, row)))
        if not options.json:
            print(line.format(*("" if x is None else x for x in row)), flush=True)
    if options.json:
        print(json.dumps(rows))
    return 1 if any(row["spilled"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
