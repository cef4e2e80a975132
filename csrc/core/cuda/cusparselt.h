// SPDX-License-Identifier: Apache-2.0
// cuSPARSELt as it is found at run time: opened on first use, its version known, every object owned. Called by
// sparse_product.cpp alone. Nothing here waits for a device, except Plan::search.
#pragma once

#include <lors/sparse_product.h>
#include <lors/status.h>
#include <lors/types.h>

#include <cstring>
#include <string>

#include "cusparselt_api.h"

namespace lors::cusparselt {

struct Version {
  int major = 0, minor = 0, patch = 0;
  auto operator<=>(const Version&) const = default;
  std::string text() const { return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch); }
};

// The library, or why there is none: `problem` is then a sentence, and `call` must not be touched.
struct Library {
  // `wanted`: null or empty: the copy that torch has loaded, else libcusparseLt.so.0 as the loader finds it; "off": none;
  // anything else: that file.
  explicit Library(const char* wanted);

  std::string problem;
  std::string origin;  // what was opened
  Version version;
  Functions call;
};

// The one of this process, as LORS_CUSPARSELT says; opened at the first call, never closed.
const Library& library();

// Memory for one object of the library, whatever its version: 1024 bytes that any known version fits, and as many again that
// must stay as they are, so that a later version with larger objects is noticed before it writes over anything.
class Opaque {
 public:
  Opaque() { std::memset(bytes_, kUntouched, sizeof bytes_); }
  Opaque(const Opaque&) = delete;
  Opaque& operator=(const Opaque&) = delete;

  void* get() { return bytes_; }
  const void* get() const { return bytes_; }
  bool fits() const;

 private:
  static constexpr int kSize = 1024, kUntouched = 0xa5;
  alignas(16) unsigned char bytes_[2 * kSize];
};

// "cuSPARSELt 0.8.1 answered CUSPARSE_STATUS_NOT_SUPPORTED to cusparseLtMatmulPlanInit: <what that means>."
Status answer(const Library& library, int status, const char* function);

// What ties a device to the library. Made with that device current; objects below keep a reference.
class Handle {
 public:
  explicit Handle(const Library& library) : library_(library) {}
  ~Handle();
  Status init();

  const Library& library() const { return library_; }
  const Functions& call() const { return library_.call; }
  const void* get() const { return opaque_.get(); }

 private:
  const Library& library_;
  Opaque opaque_;
  bool live_ = false;
};

// A matrix [rows, columns] in 16 bits, without gaps.
class Matrix {
 public:
  explicit Matrix(const Handle& handle) : handle_(handle) {}
  ~Matrix();
  Status init(int64_t rows, int64_t columns, DType dtype, int order, bool structured);
  const void* get() const { return opaque_.get(); }

 private:
  const Handle& handle_;
  Opaque opaque_;
  bool live_ = false;
};

using Algorithm = SparseProductAlgorithm;

// D = op(A) B^T of a structured A, row-major, and a row-major B [tokens, depth]; D [tokens, rows of op(A)] row-major too, which
// to the library is column-major. NOTE: the library may keep addresses of all of these in the plan, so none moves or dies
// first.
class Plan {
 public:
  explicit Plan(const Handle& handle) : handle_(handle), a_(handle), b_(handle), d_(handle) {}
  ~Plan();
  // A is [rows, columns]; `transposed`: op(A) = A^T. `known`: what an earlier search has found, or null.
  Status init(int64_t rows, int64_t columns, int64_t tokens, DType dtype, bool transposed, const Algorithm* known);
  // Tries every algorithm on these operands and keeps the fastest; overwrites `d`, waits for the device.
  Status search(const void* a, const void* b, void* d, void* workspace, void* stream, Algorithm& found);
  Status workspace_bytes(size_t& bytes) const;
  // d = op(a) b^T (+ d, if `add`), queued on `stream`.
  Status run(const void* a, const void* b, void* d, bool add, void* workspace, void* stream) const;

 private:
  const Handle& handle_;
  Matrix a_, b_, d_;
  Opaque matmul_, selection_, plan_;
  bool selected_ = false, planned_ = false;
};

}  // namespace lors::cusparselt
