#!/usr/bin/env bash
# Two versions of the package on a GPU, one after the other and again: A B A B, so that a drift of the machine shows.
#
#     [PYTHON=python3] benchmarks/gpu_compare.sh [--dry-run] A B OUTDIR [OPTIONS]
#
# A and B are commits, or folders with a checkout each (whose native modules are used where they import). The rows are
# those of this checkout, in which A and B are called alike. OPTIONS go to `python -m benchmarks.gpu`; without them:
# --calls ours --seconds 55, with which the four turns take about four minutes. OUTDIR gets log.txt, compare.txt and
# a-1.json, b-1.json, a-2.json, b-2.json. --dry-run, on any machine: what would run, its arguments checked.
set -uo pipefail
HERE=$(cd "$(dirname "$0")/.." && pwd)
DRY=()
if [ "${1:-}" = --dry-run ]; then
    DRY=(--dry-run)
    shift
fi
if [ $# -lt 3 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
mkdir -p "$3"
OUT=$(cd "$3" && pwd)
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
LOG=$OUT/log.txt
: >"$LOG"
status=0

prepare() { # SIDE VERSION: a folder with the version's package, built, and this checkout's benchmarks
    local side=$WORK/$1 tree=$2
    mkdir -p "$side"
    if [ ! -d "$tree" ]; then
        tree=$WORK/tree-$1
        mkdir "$tree"
        git -C "$HERE" archive "$2" | tar -x -C "$tree" || exit 1
    fi
    tree=$(cd "$tree" && pwd)
    ln -s "$tree/rlhf_kernels" "$side/rlhf_kernels"
    ln -s "$HERE/benchmarks" "$side/benchmarks"
    [ ${#DRY[@]} -gt 0 ] && return
    (cd "$side" && "$PYTHON" -c 'from rlhf_kernels import _cpu, _cuda') >>"$LOG" 2>&1 && return
    (cd "$tree" && RLHF_KERNELS_WERROR=0 timeout 150 "$PYTHON" setup.py -q build_ext --inplace) >>"$LOG" 2>&1
}

A=$1 B=$2
prepare a "$A"
prepare b "$B"
shift 3
[ $# -gt 0 ] || set -- --calls ours --seconds 55
for turn in 1 2; do
    for side in a b; do
        echo "== $side-$turn" | tee -a "$LOG"
        (cd "$WORK/$side" && PYTHONPATH=$WORK/$side timeout --signal=INT --kill-after=10 120 \
            "$PYTHON" -m benchmarks.gpu "$OUT" --name "$side-$turn" "$@" ${DRY[@]+"${DRY[@]}"}) >>"$LOG" 2>&1
        code=$?
        echo "== $side-$turn: exit $code" | tee -a "$LOG"
        [ $code -eq 0 ] || status=1
    done
done
cd "$HERE" && "$PYTHON" -m benchmarks.gpu_compare "$OUT" "$A" "$B" ${DRY[@]+"${DRY[@]}"} | tee "$OUT/compare.txt"
exit $status
