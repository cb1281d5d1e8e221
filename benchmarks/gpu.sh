#!/usr/bin/env bash
# Everything that needs a GPU, in about five and a half minutes, what tells most first: small calls of every kernel,
# times beside eager PyTorch, tests, a profile, sanitizers, times of torch.compile.
#
#     [PYTHON=python3] [ARCHS=90a] benchmarks/gpu.sh [--dry-run] OUTDIR
#
# Needs torch, triton and pytest, no network and nothing beside the checkout. The native modules are built in place where
# they do not import (pybind11, ninja, nvcc). pytest-xdist, compute-sanitizer and ncu are used where they are there.
# OUTDIR gets log.txt, table.txt, tests.xml, <device>.json and compile.json; the last two are written after each row.
# Each step has a limit of its own, and the next one follows whatever came of it. The exit status tells whether all but
# the times of torch.compile and the profile passed. --dry-run, on any machine: what would run, its arguments checked.
set -uo pipefail
cd "$(dirname "$0")/.."
usage() {
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
DRY=
if [ "${1:-}" = --dry-run ]; then
    DRY=1
    shift
fi
[ $# -eq 1 ] && [ "${1#-}" = "$1" ] || usage
OUT=$1
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/log.txt
: >"$LOG"
status=0

say() { echo "== $*" | tee -a "$LOG"; }

limited() { # SECONDS COMMAND...: interrupted at the limit, so that pytest still writes its summary
    timeout --signal=INT --kill-after=10 "$@"
}

step() { # NAME SECONDS COMMAND...: run, add to the log, remember a failure
    local name=$1 limit=$2 began=$SECONDS code before
    shift 2
    say "$name, at most $limit s: $*"
    before=$(wc -l <"$LOG")
    limited "$limit" "$@" >>"$LOG" 2>&1
    code=$?
    tail -n +$((before + 1)) "$LOG" | tail -n 12
    say "$name: exit $code after $((SECONDS - began)) s"
    [ $code -eq 0 ] || status=1
}

if [ -n "$DRY" ]; then
    limited() { # the measurements read their arguments, pytest collects, the rest is only said
        shift
        case "$1 $2 $3" in
            "$PYTHON -m pytest") "$@" --collect-only ;;
            "$PYTHON -m benchmarks.gpu") "$@" --dry-run ;;
        esac
    }
fi

CAPABILITY='import sys, torch
torch.cuda.is_available() or sys.exit("gpu.sh: torch finds no GPU")
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + "a" * (major == 9))'
BACKENDS='import rlhf_kernels as r; b = r.backends(); print(b); assert set(b["kl"].values()) == {"available"}'
if [ -n "$DRY" ]; then ARCHS=${ARCHS:-90a}; fi
ARCHS=${ARCHS:-$("$PYTHON" -c "$CAPABILITY")} || exit 1
export RLHF_KERNELS_CUDA_ARCHS=$ARCHS RLHF_KERNELS_WERROR=0
NATIVE='from rlhf_kernels import _cpu, _cuda'
if [ -z "$DRY" ] && "$PYTHON" -c "$NATIVE" >>"$LOG" 2>&1; then
    say "build: the native modules are there"
else
    step build 120 "$PYTHON" setup.py -q build_ext --inplace
fi
step backends 15 "$PYTHON" -c "$BACKENDS"
step check 35 "$PYTHON" -m benchmarks.gpu --check
step table 80 "$PYTHON" -m benchmarks.gpu "$OUT" --calls ours eager --seconds 65

WORKERS=()
if [ -n "$DRY" ] || "$PYTHON" -c 'import xdist' 2>>"$LOG"; then WORKERS=(-n 12 --dist=load); fi
step tests 90 "$PYTHON" -m pytest -q -m "gpu and not slow" -p no:cacheprovider --tb=line "${WORKERS[@]}" \
    --junitxml="$OUT/tests.xml" $(grep -lE "backend_name|mark.gpu" tests/kernels/test_*.py)

passed=$status
if [ -n "$DRY" ] || command -v ncu >/dev/null; then
    step profile 25 ncu --clock-control none --profile-from-start off --section SpeedOfLight \
        --section SchedulerStats --section WarpStateStats "$PYTHON" -m benchmarks.gpu --profile
fi
status=$passed

# PyTorch's own allocator hands out pieces of large blocks, of which memcheck would know only the blocks. What torch and
# Triton try, and handle when it fails, is no error of ours. Only csrc/cuda manages shared memory itself.
if [ -n "$DRY" ] || command -v compute-sanitizer >/dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    sanitize() { # NAME SECONDS OPTIONS...
        local tool=$1 limit=$2
        shift 2
        step "$tool" "$limit" compute-sanitizer --tool "$tool" --report-api-errors no --kernel-regex kns=_kernel \
            --error-exitcode 9 "$@" "$PYTHON" -m benchmarks.gpu --check
    }
    sanitize memcheck 25
    RLHF_KERNELS_BACKEND=cuda sanitize racecheck 15
    sanitize initcheck 15
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi

passed=$status
step compile 30 "$PYTHON" -m benchmarks.gpu "$OUT" --calls compile --seconds 20 --name compile
status=$passed
grep -E "TB/s|of the roof|failed|FAILED" "$LOG" | sort -u >"$OUT/table.txt"
cat "$OUT/table.txt"
exit $status
