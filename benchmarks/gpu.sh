#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: build in place, tests, sanitizers on small calls, measurements.
#
#     benchmarks/gpu.sh OUTDIR          PYTHON=python3 by default; ARCHS=90a to build for one architecture
#
# Needs torch, triton, pybind11, pytest and nvcc on the machine, no network and nothing beside the checkout. OUTDIR gets
# <device>.json, table.txt and the logs. The exit status tells whether tests and sanitizers passed; figures are taken
# even if they did not, since a wrong kernel's time may tell why.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:?usage: benchmarks/gpu.sh OUTDIR}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
status=0
step() { # NAME SECONDS COMMAND...: run, keep the log, remember a failure
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
    local code=$?
    tail -n 12 "$OUT/$name.log"
    echo "== $name: exit $code after $((SECONDS - began)) s"
    [ $code -eq 0 ] || status=1
}
ARCHS=${ARCHS:-$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}{"a" if a == 9 else ""}")')}
export RLHF_KERNELS_CUDA_ARCHS=$ARCHS RLHF_KERNELS_WERROR=0
step build 150 "$PYTHON" setup.py -q build_ext --inplace
step backends 60 "$PYTHON" -c 'import rlhf_kernels; print(rlhf_kernels.backends())'
step tests 200 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --maxfail=40 \
    tests/test_{logprobs,linear,kl,advantages,ppo,bradley_terry,preference,gpu}.py
if command -v compute-sanitizer >/dev/null; then
    step memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m benchmarks.gpu --check
    step racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 "$PYTHON" -m benchmarks.gpu --check
fi
step table 200 "$PYTHON" -m benchmarks.gpu "$OUT" --seconds 150
grep -E "TB/s|of the roof|failed|FAILED" "$OUT/table.log" | tee "$OUT/table.txt"
exit $status
