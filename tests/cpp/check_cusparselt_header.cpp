// SPDX-License-Identifier: Apache-2.0
// Compiled where the real cusparseLt.h is found (LORS_CUSPARSELT_INCLUDE), never run: csrc/core/cuda/cusparselt_api.h against
// it.
#include <cusparseLt.h>

#include <type_traits>
#include <utility>

#include "cuda/cusparselt_api.h"

namespace lors::cusparselt {
namespace {

static_assert(kSuccess == CUSPARSE_STATUS_SUCCESS);
static_assert(kMajorVersion == MAJOR_VERSION && kMinorVersion == MINOR_VERSION && kPatchLevel == PATCH_LEVEL);
static_assert(kFloat16 == CUDA_R_16F && kBFloat16 == CUDA_R_16BF);
static_assert(kColumnMajor == CUSPARSE_ORDER_COL && kRowMajor == CUSPARSE_ORDER_ROW);
static_assert(kNonTranspose == CUSPARSE_OPERATION_NON_TRANSPOSE && kTranspose == CUSPARSE_OPERATION_TRANSPOSE);
static_assert(kHalf == CUSPARSELT_SPARSITY_50_PERCENT);
static_assert(kComputeFloat32 == CUSPARSE_COMPUTE_32F);
static_assert(kDefaultAlgorithm == CUSPARSELT_MATMUL_ALG_DEFAULT);
static_assert(kConfigId == CUSPARSELT_MATMUL_ALG_CONFIG_ID && kSplitK == CUSPARSELT_MATMUL_SPLIT_K);
static_assert(kSplitKMode == CUSPARSELT_MATMUL_SPLIT_K_MODE);

template <typename T>
constexpr bool kFits = sizeof(T) <= 1024 && alignof(T) <= 16;
static_assert(kFits<cusparseLtHandle_t> && kFits<cusparseLtMatDescriptor_t> && kFits<cusparseLtMatmulDescriptor_t>);
static_assert(kFits<cusparseLtMatmulAlgSelection_t> && kFits<cusparseLtMatmulPlan_t>);

// How a parameter is passed: the kind and the width, not the name.
template <typename T>
using Kind = std::conditional_t<std::is_pointer_v<T>, void*, std::conditional_t<std::is_enum_v<T>, int, T>>;
template <typename Result, typename... Parameters>
auto kinds(Result (*)(Parameters...)) -> Kind<Result> (*)(Kind<Parameters>...);
template <typename A, typename B>
constexpr bool kSameKinds = std::is_same_v<decltype(kinds(std::declval<A>())), decltype(kinds(std::declval<B>()))>;

static_assert(sizeof(cusparseStatus_t) == sizeof(int) && sizeof(cudaDataType) == sizeof(int));
static_assert(sizeof(cusparseOrder_t) == sizeof(int) && sizeof(cusparseComputeType) == sizeof(int));
static_assert(sizeof(cusparseLtSplitKMode_t) == sizeof(int) && sizeof(cudaStream_t) == sizeof(void*));
#define LORS_CHECK(name, required, ...) static_assert(kSameKinds<decltype(&cusparseLt##name), decltype(Functions::name)>);
#if CUSPARSELT_VER_MINOR < 8  // the one function that is not in every version
#define cusparseLtMatmulAlgSelectionDestroy cusparseLtMatDescriptorDestroy
#endif
LORS_CUSPARSELT_FUNCTIONS(LORS_CHECK)

}  // namespace
}  // namespace lors::cusparselt
