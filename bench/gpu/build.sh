#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds lors_cuda without installing it: bench/gpu/build.sh WORK ARCH puts the package with its compiled libraries into
# WORK/site, for PYTHONPATH. With cmake and ninja if both are there, else with g++ and nvcc alone. ARCH "none": the CPU backend.
# Needs a torch (its headers), no GPU. LORS_GPU_PLAIN=1 takes the second way in any case.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mkdir -p "$1" && cd "$1" && pwd)
arch=$2
python=${PYTHON:-python3}
jobs=${LORS_GPU_JOBS:-$(nproc)}
torch=$("$python" -c "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')")
[ -n "$torch" ] || { echo "torch was not found by $python; install it first." >&2; exit 1; }
if [ "$arch" != none ] && ! command -v nvcc >/dev/null; then
  echo 'nvcc was not found; install the CUDA toolkit and put its bin folder on PATH.' >&2
  exit 1
fi

with_cmake() {
  local cuda=ON
  [ "$arch" = none ] && cuda=OFF
  cmake -S "$root" -B "$work/cmake" -G Ninja -DLORS_CUDA=$cuda "-DLORS_CUDA_ARCHS=$arch" "-DLORS_TORCH_DIR=$torch" &&
    cmake --build "$work/cmake" -j "$jobs" || return 1
  cp "$work"/cmake/_ops*.so "$work/site/lors_cuda/"
  core=("$work/cmake/liblors_core_cuda.a")
}

# The same as CMakeLists.txt, in as few words as serve: one object per source, then two links.
with_compilers() {
  local out=$work/plain nvcc_root='' version=''
  mkdir -p "$out"
  local cxx=(g++ -std=c++20 -O3 -DNDEBUG -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -Wno-psabi -I "$root/csrc/core/include"
    -I "$root/csrc/core" -I "$out")
  local bind=("${cxx[@]}" -isystem "$torch/include" -DTORCH_TARGET_VERSION=0x020a000000000000ULL -DTORCH_STABLE_ONLY)
  local link=(-shared -Wl,--no-as-needed -Wl,--allow-shlib-undefined "$torch/lib/libtorch.so")
  if [ "$arch" != none ]; then
    version=$(nvcc --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
    # nvcc says where it lives: it may be a link or a wrapper.
    nvcc_root=$(nvcc --dryrun -x cu - </dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
    nvcc_root=${nvcc_root:-$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")}
  fi
  sed -e "s/@LORS_VERSION@/$(sed -n 's/.*project(lors_cuda VERSION \([0-9.]*\).*/\1/p' "$root/CMakeLists.txt")/" \
    -e "s/@CMAKE_CXX_COMPILER_ID@ @CMAKE_CXX_COMPILER_VERSION@/GNU $(g++ -dumpfullversion)/" \
    -e "s/@LORS_CUDA_VERSION@/$version/" -e "s/@LORS_CUDA_ARCHS_TEXT@/${arch/none/}/" \
    "$root/csrc/torch/build_info.h.in" >"$out/build_info.h"

  # One line per object: name, then the command. xargs runs them side by side.
  {
    local source name table
    for source in "$root"/csrc/core/cpu/*.cpp; do
      name=$(basename "$source" .cpp)
      [ "$name" = kernels ] || echo "cpu_$name ${cxx[*]} -c $source"
    done
    # The tables of CMakeLists.txt.
    local avx512='-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512'
    for table in 'baseline' 'avx2 -mavx2 -mfma -mf16c' "avx512 $avx512" "avx512_bf16 $avx512 -mavx512bf16 -mavx512vbmi -mavx512vbmi2"; do
      name=${table%% *}
      [ "$(uname -m)" = x86_64 ] || [ "$name" = baseline ] || continue
      echo "kernels_$name ${cxx[*]} ${table#"$name"} -DLORS_CPU_TABLE=$name -c $root/csrc/core/cpu/kernels.cpp"
    done
    for source in "$root"/csrc/torch/*.cpp; do
      name=$(basename "$source" .cpp)
      [ "$name" = cuda_ops ] || echo "bind_$name ${bind[*]} -c $source"
    done
    if [ "$arch" != none ]; then
      echo "cudabind_cuda_ops ${bind[*]} -DUSE_CUDA -isystem $nvcc_root/include -c $root/csrc/torch/cuda_ops.cpp"
      for source in "$root"/csrc/core/cuda/*.cu; do
        echo "cuda_$(basename "$source" .cu) nvcc -std=c++20 -O3 -DNDEBUG -gencode arch=compute_$arch,code=sm_$arch -cudart static" \
          "-Xcompiler -fPIC,-fvisibility=hidden -I $root/csrc/core/include -DLORS_CUDA_ARCHS_TEXT='\"$arch\"' -c $source"
      done
    fi
  } >"$out/commands"
  rm -f "$out"/*.o
  OUT=$out xargs -a "$out/commands" -d '\n' -P "$jobs" -I{} bash -c \
    'read -r name command <<<"$1"; eval "$command -o $OUT/$name.o" || { echo "$name does not compile" >&2; exit 1; }' _ {}
  g++ -o "$work/site/lors_cuda/_ops.so" "$out"/cpu_*.o "$out"/kernels_*.o "$out"/bind_*.o "${link[@]}"
  [ "$arch" = none ] ||
    g++ -o "$work/site/lors_cuda/_ops_cuda.so" "$out"/cuda_*.o "$out"/cudabind_*.o "${link[@]}" \
      "$(find "$nvcc_root/" -name libcudart_static.a | head -1)" -lrt -lpthread -ldl
  core=("$out"/cuda_*.o)
}

rm -rf "$work/site"
mkdir -p "$work/site"
cp -r "$root/python/lors_cuda" "$work/site/"
rm -f "$work"/site/lors_cuda/*.so
if [ -n "${LORS_GPU_PLAIN:-}" ] || ! command -v cmake >/dev/null || ! command -v ninja >/dev/null; then
  with_compilers
elif ! with_cmake; then
  # A kernel that spills, say, stops CMake's build; slow numbers are better than none.
  echo 'CMake did not build it; trying the compilers alone.'
  with_compilers
fi
ls -l "$work"/site/lors_cuda/*.so
# The core without torch: what the sanitizers and profilers run.
if [ "$arch" != none ]; then
  nvcc -std=c++20 -O2 -gencode "arch=compute_$arch,code=sm_$arch" -cudart static -I "$root/csrc/core/include" \
    -o "$work/bench_cuda" "$root/bench/cpp/bench_cuda.cpp" "${core[@]}" || echo 'bench_cuda was not built; the rest was.'
fi
# An editable install comes before PYTHONPATH: everything after this would measure that one.
PYTHONPATH="$work/site" "$python" - "$work/site" <<'END'
import json, os, sys
import lors_cuda._library as library
print(library.__file__, json.dumps(library.build_info()))
if not os.path.samefile(sys.argv[1], os.path.dirname(os.path.dirname(library.__file__))):
    raise SystemExit("Python imports another lors_cuda, not the one built here; uninstall it, or set PYTHON to a Python without it.")
END
