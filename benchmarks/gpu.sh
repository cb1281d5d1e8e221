#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: build in place, tests, sanitizers on small calls, measurements.
#
#     [PYTHON=python3] [ARCHS=90a] benchmarks/gpu.sh OUTDIR
#
# Needs torch, triton, pybind11, ninja, pytest and nvcc on the machine, no network and nothing beside the checkout. OUTDIR gets
# <device>.json, table.txt and the logs. The exit status tells whether tests and sanitizers passed; figures are taken
# even if they did not, since a wrong kernel's time may tell why.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ $# -ne 1 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
OUT=$1
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
CAPABILITY='import sys, torch
torch.cuda.is_available() or sys.exit("gpu.sh: torch finds no GPU")
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + "a" * (major == 9))'
ARCHS=${ARCHS:-$("$PYTHON" -c "$CAPABILITY")} || exit 1
export RLHF_KERNELS_CUDA_ARCHS=$ARCHS RLHF_KERNELS_WERROR=0
step build 120 "$PYTHON" setup.py -q build_ext --inplace
step backends 20 "$PYTHON" -c 'import rlhf_kernels as r; b = r.backends(); print(b); assert set(b["kl"].values()) == {"available"}'
step tests 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --maxfail=40 \
    tests/kernels/test_{logprobs,linear,kl,advantages,ppo,policy,policy_walk,bradley_terry,preference,gpu}.py
if command -v compute-sanitizer >/dev/null; then
    step memcheck 45 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m benchmarks.gpu --check
    step racecheck 45 compute-sanitizer --tool racecheck --error-exitcode 9 "$PYTHON" -m benchmarks.gpu --check
fi
step table 140 "$PYTHON" -m benchmarks.gpu "$OUT" --seconds 110
grep -E "TB/s|of the roof|failed|FAILED" "$OUT/table.log" | tee "$OUT/table.txt"
exit $status
