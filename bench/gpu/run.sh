#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What only a GPU can tell, in two plans of under nine minutes each on 16 cores: bench/gpu/run.sh PLAN OUTDIR [PART...]
#   first                whether it is right, how fast the kernels, layers and a model are
#   second               tests, sanitizers, other layouts and paths, profiles
#   --dry-run [PLAN]     print the plans; needs no GPU and runs nothing
# Uses the machine's own torch and nvcc, and no network. A part that fails or runs out of time leaves the others running. After
# every part all results are packed into OUTDIR/PLAN.tar.gz, the one file to bring back. Variables: PYTHON, LORS_GPU_SECONDS
# (for all parts), LORS_GPU_WORK (build folder, kept: the second plan finds what the first has built).
set -uo pipefail

self=$(readlink -f "$0")
root=$(cd "$(dirname "$self")/../.." && pwd)
export PYTHON=${PYTHON:-python3} WORK=${LORS_GPU_WORK:-$root/build/gpu}
total=${LORS_GPU_SECONDS:-530}
skipped=77 # a part's exit code where the machine lacks what it needs
[ -d /usr/local/cuda/bin ] && PATH=$PATH:/usr/local/cuda/bin

# name, most seconds, what it does. The limits of a plan add up to no more than `total`.
first='build 150 lors_cuda and bench_cuda for this GPU alone, into a folder of its own (bench/gpu/build.sh)
golden 20 what this GPU answers to the probes of tests/golden
core 25 GB/s of every kernel without torch (bench/cpp/bench_cuda.cpp)
check 80 every operator against float64, poisoned and repeated (bench/gpu/check.py)
kernels 80 each operator against torch and its floor (bench/gpu/kernels.py), T = 512, 2048, 8192
host 20 microseconds of Python per call: bench/linear.py on 64 x 64
model 60 training steps of a model against the peers (bench/model.py)
products 35 Y and dX with LORS_CUDA_FUSED always and never, T = 1 to 512: what paths.h may take
layers 60 forward and backward against the peers (bench/linear.py), T = 512, 2048, 8192'
second='build 150 as above, unless it is there
memcheck 40 compute-sanitizer, accesses out of bounds: golden probes, then every kernel without torch
racecheck 40 compute-sanitizer, races in shared memory: every kernel without torch
layouts 60 merge, Y and dX from explicit mask, 2:4 and bitmap, r = 16 and 64 (bench/gpu/kernels.py)
tests 100 the GPU cases of tests/python, where pytest and hypothesis are installed
decode 30 Y for 1, 4 and 16 tokens from every layout, by CUDA graph and eager
ncu 40 one profile of each kernel (Nsight Compute), where it is installed
sparse 25 2:4 forward on the sparse tensor cores and dense, T = 512, 2048, 8192
compiled 45 bench/linear.py against torch.compile'

on_site() { PYTHONPATH="$WORK/site" "$@"; }
bench() { on_site "$PYTHON" "$root/bench/$1" --device cuda "${@:2}"; }
kernels() { bench gpu/kernels.py --budget 1 --append --output "$OUT/kernels.json" "$@"; }

lacks() {
  echo "skipped: $*"
  exit $skipped
}

needs_core() { [ -x "$WORK/bench_cuda" ] || lacks 'bench_cuda was not built; see the part build.'; }

sanitize() {
  command -v compute-sanitizer >/dev/null || lacks 'compute-sanitizer is not installed.'
  needs_core
  compute-sanitizer --tool "$1" --error-exitcode 9 "${@:2}"
}

# Runs one part; its exit code is the part's.
part() {
  local result=0
  cd "$root" || exit
  case $1 in
    build) [ -x "$WORK/bench_cuda" ] && [ "$PLAN" = second ] || "$root/bench/gpu/build.sh" "$WORK" "$ARCH" ;;
    golden)
      nvcc -std=c++20 -gencode "arch=compute_$ARCH,code=sm_$ARCH" -I csrc/core/include -I csrc/core/cuda tests/golden/record.cu \
        -o "$WORK/golden_record" && "$WORK/golden_record" >"$OUT/golden.json" && "$PYTHON" -m json.tool "$OUT/golden.json" >/dev/null
      ;;
    core)
      needs_core
      "$WORK/bench_cuda" --check || result=1
      "$WORK/bench_cuda" | tee "$OUT/core.txt" || result=1
      ;;
    check)
      # The paths of few tokens first: the large cases of the last run take the longest.
      for fused in always never; do
        LORS_CUDA_FUSED=$fused bench gpu/check.py --small --append --output "$OUT/check.json" || result=1
      done
      bench gpu/check.py --append --output "$OUT/check.json" || result=1
      ;;
    kernels)
      kernels --shape 4096 4096 --rank 16 64 || result=1
      kernels --shape 4096 4096 --tokens 512 --calls eager || result=1
      for shape in '14336 4096' '4096 14336' '1024 4096'; do
        # shellcheck disable=SC2086
        kernels --shape $shape || result=1
      done
      ;;
    host) bench linear.py --shape 64 64 --tokens 8 --rank 4 --budget 2 --append --output "$OUT/linear.json" ;;
    model)
      "$PYTHON" -c 'import peft, transformers' || lacks 'peft or transformers is not installed.'
      local methods=(frozen official lors_cuda lors_cuda_24 lors_cuda_prefetch lors_cuda_24_prefetch)
      bench model.py --dtype bfloat16 --tokens 1x512 --budget 1 --methods "${methods[@]}" --output "$OUT/model.json"
      ;;
    products)
      for fused in always never; do
        LORS_CUDA_FUSED=$fused kernels --only forward input_gradient --shape 4096 4096 --tokens 1 16 64 128 256 512 || result=1
      done
      ;;
    layers)
      local peers=(official lors_cuda lors_cuda_exact sqft sqft_checkpointed peft_lora frozen_linear)
      for shape in '4096 4096' '14336 4096'; do
        # shellcheck disable=SC2086
        bench linear.py --shape $shape --budget 3 --peers "${peers[@]}" --append --output "$OUT/linear.json" || result=1
      done
      ;;
    memcheck)
      if [ -x "$WORK/golden_record" ]; then sanitize memcheck "$WORK/golden_record" >/dev/null || result=1; fi
      (sanitize memcheck "$WORK/bench_cuda" --check) || exit
      ;;
    racecheck) (sanitize racecheck "$WORK/bench_cuda" --check) || exit ;;
    layouts)
      for rank in 16 64; do
        kernels --only merge forward input_gradient --shape 4096 4096 --tokens 512 --rank $rank --layout mask 2:4 bitmap || result=1
      done
      ;;
    tests)
      "$PYTHON" -c 'import pytest, hypothesis' || lacks 'pytest or hypothesis is not installed; see the part check instead.'
      local parallel=()
      "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
      OMP_NUM_THREADS=2 on_site "$PYTHON" -m pytest tests/python -k '[cuda or test_cuda_ops' -q -rf -o addopts= -p no:cacheprovider \
        --continue-on-collection-errors "--junitxml=$OUT/tests.xml" "${parallel[@]}" | tee "$OUT/tests.txt" || return
      # Without a usable GPU every case is skipped, and pytest reports success.
      grep -q '[0-9] passed' "$OUT/tests.txt" || { echo 'no GPU case ran: all were skipped.' && return 1; }
      ;;
    decode)
      for fused in always never; do
        LORS_CUDA_FUSED=$fused kernels --only forward --shape 4096 4096 --tokens 1 4 16 --layout dense 2:4 bitmap \
          --calls graph eager || result=1
      done
      ;;
    ncu)
      command -v ncu >/dev/null || lacks 'Nsight Compute (ncu) is not installed.'
      needs_core
      for kernel in merge merge_from_sparse24 merge_from_bitmap sparse24_merge adapter_grad_lors masked_contract \
        fused_linear fused_linear_input_gradient; do
        ncu --kernel-name regex:. --set basic --section MemoryWorkloadAnalysis --section SchedulerStats "$WORK/bench_cuda" --once $kernel \
          >"$OUT/ncu-$kernel.txt" || result=1
      done
      ;;
    sparse) kernels --only forward24 --shape 4096 4096 ;;
    compiled) bench linear.py --budget 3 --peers lors_cuda compiled --append --output "$OUT/linear.json" ;;
  esac || result=$?
  return $result
}

if [ "${1:-}" = --part ]; then
  part "$2"
  exit
fi

usage() {
  echo 'usage: bench/gpu/run.sh first|second OUTDIR [PART...], or bench/gpu/run.sh --dry-run [first|second]' >&2
  exit 2
}

if [ "${1:-}" = --dry-run ]; then
  echo 'describe: the machine as JSON; stops here with exit code 1 where torch cannot use a GPU'
  for PLAN in ${2:-first second}; do
    [ "$PLAN" = first ] || [ "$PLAN" = second ] || usage
    printf '\n%s\n' "$PLAN"
    while read -r name seconds what; do printf '%-10s at most %3d s  %s\n' "$name" "$seconds" "$what"; done <<<"${!PLAN}"
  done
  echo "Each plan takes at most $total s (LORS_GPU_SECONDS): a part that no time is left for is reported so."
  exit 0
fi
[ $# -ge 2 ] && { [ "$1" = first ] || [ "$1" = second ]; } && [[ "$2" != -* ]] || usage
export PLAN=$1
plan=${!PLAN}
wanted=" ${*:3} "
known=$(cut -d' ' -f1 <<<"$plan")
for name in "${@:3}"; do
  grep -qx -- "$name" <<<"$known" || { echo "the plan $PLAN has no part '$name'; its parts are: ${known//$'\n'/ }." >&2; exit 2; }
done

export OUT=$WORK/$PLAN
mkdir -p "$2" && bring=$(cd "$2" && pwd)/$PLAN.tar.gz && rm -rf "$OUT" && mkdir -p "$OUT" || exit 1
log=$OUT/log.txt
# Written beside it and renamed: whatever kills this script, the last whole archive stays.
pack() { tar -C "$WORK" -czf "$bring.new" "$PLAN" && mv "$bring.new" "$bring"; }
if ! "$PYTHON" "$root/bench/gpu/describe.py" "$OUT/machine.json" >"$log" 2> >(tee -a "$log" >&2); then
  pack
  echo "Nothing was run; machine.json in $bring describes this machine." >&2
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
  pack
done <<<"$plan"
"$PYTHON" "$root/bench/gpu/summary.py" "$OUT" "${results[@]}" | tee "$OUT/summary.txt"
code=${PIPESTATUS[0]}
pack
exit "$code"
