// SPDX-License-Identifier: Apache-2.0
// What of cuSPARSELt's C interface is called, in our own declarations: its header is not needed to build. The library is opened
// at run time (cusparselt.h). tests/cpp/check_cusparselt_header.cpp holds every line to the real header, where there is one.
//
// NOTE: under one soname (libcusparseLt.so.0) its opaque structures are 1024 bytes in 0.7.1 and 512, aligned to 16, from 0.8
// on. They are never declared here: whoever makes one hands out an Opaque (cusparselt.h), which every version fits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lors::cusparselt {

// cusparseStatus_t
constexpr int kSuccess = 0;
// libraryPropertyType
constexpr int kMajorVersion = 0, kMinorVersion = 1, kPatchLevel = 2;
// cudaDataType
constexpr int kFloat16 = 2, kBFloat16 = 14;
// cusparseOrder_t
constexpr int kColumnMajor = 1, kRowMajor = 2;
// cusparseOperation_t
constexpr int kNonTranspose = 0, kTranspose = 1;
// cusparseLtSparsity_t
constexpr int kHalf = 0;
// cusparseComputeType: what sums run in
constexpr int kComputeFloat32 = 2;
// cusparseLtMatmulAlg_t
constexpr int kDefaultAlgorithm = 0;
// cusparseLtMatmulAlgAttribute_t, each the address of an int
constexpr int kConfigId = 0, kSplitK = 3, kSplitKMode = 4;

constexpr uint32_t kAlignment = 16;  // of every matrix, in bytes

// The functions by name, their parameters by kind: every enumeration is an int, every structure and stream a pointer.
// X(name, whether every version has it, parameters...)
#define LORS_CUSPARSELT_FUNCTIONS(X)                                                                                       \
  X(GetProperty, true, int property, int* value)                                                                           \
  X(Init, true, void* handle)                                                                                              \
  X(Destroy, true, const void* handle)                                                                                     \
  X(DenseDescriptorInit, true, const void* handle, void* matrix, int64_t rows, int64_t columns, int64_t leading,           \
    uint32_t alignment, int type, int order)                                                                               \
  X(StructuredDescriptorInit, true, const void* handle, void* matrix, int64_t rows, int64_t columns, int64_t leading,      \
    uint32_t alignment, int type, int order, int sparsity)                                                                 \
  X(MatDescriptorDestroy, true, const void* matrix)                                                                        \
  X(MatmulDescriptorInit, true, const void* handle, void* matmul, int operation_a, int operation_b, const void* a,         \
    const void* b, const void* c, const void* d, int compute)                                                              \
  X(MatmulAlgSelectionInit, true, const void* handle, void* selection, const void* matmul, int algorithm)                  \
  X(MatmulAlgSelectionDestroy, false, const void* selection)                                                               \
  X(MatmulAlgSetAttribute, true, const void* handle, void* selection, int attribute, const void* data, size_t bytes)       \
  X(MatmulAlgGetAttribute, true, const void* handle, const void* selection, int attribute, void* data, size_t bytes)       \
  X(MatmulPlanInit, true, const void* handle, void* plan, const void* matmul, const void* selection)                       \
  X(MatmulPlanDestroy, true, const void* plan)                                                                             \
  X(MatmulGetWorkspace, true, const void* handle, const void* plan, size_t* bytes)                                         \
  X(Matmul, true, const void* handle, const void* plan, const void* alpha, const void* a, const void* b, const void* beta, \
    const void* c, void* d, void* workspace, void** streams, int32_t count)                                                \
  X(MatmulSearch, true, const void* handle, void* plan, const void* alpha, const void* a, const void* b, const void* beta, \
    const void* c, void* d, void* workspace, void** streams, int32_t count)                                                \
  X(SpMMACompressedSize2, true, const void* handle, const void* matrix, size_t* compressed, size_t* scratch)               \
  X(SpMMACompress2, true, const void* handle, const void* matrix, int is_a, int operation, const void* dense,              \
    void* compressed, void* scratch, void* stream)

// The addresses of cusparseLt<name>; null: this version has it not.
struct Functions {
#define LORS_CUSPARSELT_MEMBER(name, required, ...) int (*name)(__VA_ARGS__) = nullptr;
  LORS_CUSPARSELT_FUNCTIONS(LORS_CUSPARSELT_MEMBER)
#undef LORS_CUSPARSELT_MEMBER
};

}  // namespace lors::cusparselt
