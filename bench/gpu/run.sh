#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that only a GPU can tell, in one command and under nine minutes: bench/gpu/run.sh OUTDIR [PART...]
#   --dry-run            print the plan; needs no GPU and runs nothing
# Uses the machine's own torch and nvcc, and no network. A part that fails or runs out of time leaves the others running; its
# words are in OUTDIR/log.txt. Variables: PYTHON, LORS_GPU_SECONDS (for all parts), LORS_GPU_WORK (build folder, kept).
set -uo pipefail

self=$(readlink -f "$0")
root=$(cd "$(dirname "$self")/../.." && pwd)
export PYTHON=${PYTHON:-python3} WORK=${LORS_GPU_WORK:-$root/build/gpu}
total=${LORS_GPU_SECONDS:-520}
skipped=77 # a part's exit code where the machine lacks what it needs
[ -d /usr/local/cuda/bin ] && PATH=$PATH:/usr/local/cuda/bin

# name, most seconds, what it does. Correctness first: without it the timings mean nothing.
plan='build 170 lors_cuda for this GPU alone, into a folder of its own (bench/gpu/build.sh)
golden 50 what this GPU answers to the probes of tests/golden
check 75 every operator against float64, poisoned and repeated (bench/gpu/check.py), both matmul paths
kernels 100 each operator against torch and its floor (bench/gpu/kernels.py), T = 512, 2048, 8192
layers 100 forward and backward against the peers (bench/linear.py), T = 512, 2048, 8192
sparse 60 2:4 forward on the sparse tensor cores and dense, T = 512, 2048, 8192
tests 120 the GPU cases of tests/python, where pytest and hypothesis are installed
memcheck 60 compute-sanitizer: accesses out of bounds, where it is installed
racecheck 60 compute-sanitizer: races in shared memory
products 60 forward and input gradient with LORS_CUDA_FUSED always and never, T = 1 to 512
compiled 90 bench/linear.py against torch.compile
bench_cuda 60 the core without torch, where Google Benchmark is installed'

on_site() { PYTHONPATH="$WORK/site" "$@"; }
bench() { on_site "$PYTHON" "$root/bench/$1" --device cuda "${@:2}"; }

lacks() {
  echo "skipped: $*"
  exit $skipped
}

sanitize() {
  command -v compute-sanitizer >/dev/null || lacks 'compute-sanitizer is not installed.'
  local filter=()
  # Only our kernels: instrumenting torch's would take most of the time. The option's name has changed over the years.
  for option in --kernel-regex --kernel-name; do
    if grep -q -- "$option" <<<"$(compute-sanitizer --help 2>&1)"; then
      filter=("$option" kns=lors)
      break
    fi
  done
  # Without torch's caching allocator, so that accesses beyond a tensor are seen; with fused_linear, which has the most kernels.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 LORS_CUDA_FUSED=always on_site compute-sanitizer --tool "$1" --error-exitcode 9 \
    --target-processes application-only "${filter[@]}" "$PYTHON" "$root/bench/gpu/check.py" --device cuda --small
}

# Runs one part; its exit code is the part's.
part() {
  cd "$root" || exit
  case $1 in
    build) "$root/bench/gpu/build.sh" "$WORK" "$ARCH" ;;
    golden)
      nvcc -std=c++20 -gencode "arch=compute_$ARCH,code=sm_$ARCH" -I csrc/core/include -I csrc/core/cuda tests/golden/record.cu \
        -o "$WORK/golden_record" && "$WORK/golden_record" >"$OUT/golden.json" && "$PYTHON" -m json.tool "$OUT/golden.json" >/dev/null
      ;;
    check)
      local result=0
      bench gpu/check.py --output "$OUT/check.json" || result=1
      for fused in always never; do
        LORS_CUDA_FUSED=$fused bench gpu/check.py --small --append --output "$OUT/check.json" || result=1
      done
      return $result
      ;;
    kernels) bench gpu/kernels.py --budget 2 --output "$OUT/kernels.json" ;;
    layers)
      local peers=(official lors_cuda lors_cuda_exact sqft sqft_checkpointed peft_lora frozen_linear) result=0
      for shape in '4096 4096' '14336 4096'; do
        # shellcheck disable=SC2086
        bench linear.py --shape $shape --budget 3 --peers "${peers[@]}" --append --output "$OUT/linear.json" || result=1
      done
      return $result
      ;;
    sparse) bench gpu/kernels.py --budget 2 --only forward24 --append --output "$OUT/kernels.json" ;;
    tests)
      "$PYTHON" -c 'import pytest, hypothesis' || lacks 'pytest or hypothesis is not installed; see the part check instead.'
      local parallel=()
      "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
      # The oracles are float64 on the CPU: eight processes with all cores each would slow one another down.
      OMP_NUM_THREADS=2 on_site "$PYTHON" -m pytest tests/python -k '[cuda or test_cuda_ops' -q -o addopts= -p no:cacheprovider \
        --continue-on-collection-errors "${parallel[@]}" | tee "$WORK/pytest.txt" || return
      # Without a usable GPU every case is skipped, and pytest reports success.
      grep -q '[0-9] passed' "$WORK/pytest.txt" || { echo 'no GPU case ran: all were skipped.' && return 1; }
      ;;
    memcheck | racecheck) sanitize "$1" ;;
    products)
      local result=0
      for fused in always never; do
        LORS_CUDA_FUSED=$fused bench gpu/kernels.py --budget 2 --only forward input_gradient --shape 4096 4096 \
          --tokens 1 16 64 128 256 512 --append --output "$OUT/kernels.json" || result=1
      done
      return $result
      ;;
    compiled) bench linear.py --budget 3 --peers lors_cuda compiled --append --output "$OUT/linear.json" ;;
    bench_cuda)
      [ -x "$WORK/cmake/bench/cpp/bench_cuda" ] || lacks 'bench_cuda was not built: Google Benchmark or cmake is not installed.'
      "$WORK/cmake/bench/cpp/bench_cuda" --benchmark_filter=bfloat16 --benchmark_min_time=0.05 \
        --benchmark_out_format=json "--benchmark_out=$OUT/bench_cuda.json"
      ;;
  esac
}

if [ "${1:-}" = --part ]; then
  part "$2"
  exit
fi

dry=
[ "${1:-}" = --dry-run ] && dry=1 && shift
if [ $# = 0 ] && [ -z "$dry" ] || [[ "${1:-}" = -* ]]; then
  echo 'usage: bench/gpu/run.sh [--dry-run] OUTDIR [PART...]' >&2
  exit 2
fi
wanted=" ${*:2} "
known=$(cut -d' ' -f1 <<<"$plan")
for name in "${@:2}"; do
  grep -qx -- "$name" <<<"$known" || { echo "there is no part '$name'; the parts are: ${known//$'\n'/ }." >&2; exit 2; }
done
if [ -n "$dry" ]; then
  echo "describe: the machine as JSON; stops here with exit code 1 where torch cannot use a GPU"
  while read -r name seconds what; do
    [ "$wanted" = '  ' ] || [[ "$wanted" = *" $name "* ]] || continue
    printf '%-10s at most %3d s  %s\n' "$name" "$seconds" "$what"
  done <<<"$plan"
  echo "All together at most $total s (LORS_GPU_SECONDS): a part that no time is left for is reported so."
  exit 0
fi

mkdir -p "$1" "$WORK" && OUT=$(cd "$1" && pwd) || exit 1
export OUT
log=$OUT/log.txt
rm -f "$OUT"/{machine,golden,check,kernels,linear,bench_cuda,summary}.json "$log"
if ! "$PYTHON" "$root/bench/gpu/describe.py" "$OUT/machine.json" >"$log" 2> >(tee -a "$log" >&2); then
  echo "Nothing was run; $OUT/machine.json describes this machine." >&2
  exit 1
fi
ARCH=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["architecture"])' "$OUT/machine.json")
export ARCH

results=()
built=1
while read -r name seconds what; do
  [ "$wanted" = '  ' ] || [[ "$wanted" = *" $name "* ]] || continue
  left=$((total - SECONDS))
  if [ $built = 0 ] && [ "$name" != golden ]; then
    results+=("$name,no build,0")
    continue
  fi
  if [ $left -lt 10 ]; then
    results+=("$name,no time left,0")
    continue
  fi
  started=$SECONDS
  printf '\n==== %s: %s\n' "$name" "$what" >>"$log"
  echo "$name ..." >&2
  timeout -k 5 "$((seconds < left ? seconds : left))" bash "$self" --part "$name" >>"$log" 2>&1 </dev/null
  code=$?
  case $code in
    0) status=ok ;;
    "$skipped") status="skipped" ;;
    124 | 137) status="out of time" ;;
    *) status="failed ($code)" ;;
  esac
  printf '==== %s: %s, %d s\n' "$name" "$status" "$((SECONDS - started))" >>"$log"
  results+=("$name,$status,$((SECONDS - started))")
  [ "$name" = build ] && [ $code != 0 ] && built=0
done <<<"$plan"
"$PYTHON" "$root/bench/gpu/summary.py" "$OUT" "${results[@]}"
