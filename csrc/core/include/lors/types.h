// SPDX-License-Identifier: Apache-2.0
// What every kernel family shares: element types, weight layouts, and what a call takes from its caller.
// No torch header is included below csrc/core.
#pragma once

#include <cstdint>

namespace lors {

enum class DType : uint8_t { float64, float32, bfloat16, float16 };

constexpr int64_t dtype_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

constexpr const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

// How a frozen weight is stored (docs/formats.md). 2:4: sparse24.h. bitmap:
//   values       [row_offsets[N]]   the kept weights of row 0 by column, then of row 1, ...
//   mask         [N, ceil(K/32)]    bit k % 32 of word [n, k / 32] is column k; bits beyond K are 0
//   row_offsets  [N + 1] int64      where each row begins in values; row_offsets[0] = 0
enum class Layout : uint8_t { dense, sparse24, bitmap };

// A stack of `count` weights with an adapter each, experts of a mixture: weight, mask, adapters and bias lie one after another,
// those of expert e as rows e N to (e + 1) N of a weight [count N, K] and of all that goes with its rows, and as matrix e of
// lora_A [count, r, K], lora_B [count, N, r], bias [count, N].
struct Experts {
  int64_t count = 1;
  // [count], ascending, on the device: expert e has rows [offsets[e - 1], offsets[e]) of the activations; rows from the last
  // offset on have none. null: one expert has all rows. An expert without rows is not read.
  const int32_t* offsets = nullptr;
  // [tokens], on the device: row i of the input is its row gather[i] in memory. null: row i.
  const int32_t* gather = nullptr;
  // A call may serve some experts of a larger stack, `offsets` then being inside of the stack's: unless they are the first, the
  // offset before is where their rows begin; unless they are the last, the rows after theirs are left as they are.
  bool first = true, last = true;
};

// Threads and memory of the calling program. A null member, or a null CpuHost, means the calling thread alone and memory from
// the C library.
struct CpuHost {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  // Calls body(context, begin, end) over disjoint ranges that together cover [0, count), none shorter than `grain` except
  // the last, and returns when all are done.
  void (*run)(int64_t count, int64_t grain, Body body, void* context) = nullptr;
  // Returns `bytes` of 64-byte aligned memory, and in *handle what `release` takes to give it back. May be called inside run.
  void* (*allocate)(int64_t bytes, void** handle) = nullptr;
  void (*release)(void* handle) = nullptr;
};

// Stream and memory of the calling program, which has made the device current.
struct CudaHost {
  void* stream = nullptr;  // the cudaStream_t everything is queued on
  // Returns `bytes` (> 0) of device memory aligned to 256 bytes, and in *handle what `release` takes. `release` is called
  // once all work that uses the memory is queued, not when it has run.
  void* (*allocate)(int64_t bytes, void** handle) = nullptr;
  void (*release)(void* handle) = nullptr;
};

// Number of 32-bit words in one row of a packed mask over `in_features` columns.
constexpr int64_t mask_words(int64_t in_features) { return (in_features + 31) / 32; }

// Number of bytes in one row of 2:4 metadata over `in_features` columns.
constexpr int64_t sparse24_metadata_bytes(int64_t in_features) { return (in_features + 7) / 8; }

}  // namespace lors
