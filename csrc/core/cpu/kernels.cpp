// SPDX-License-Identifier: Apache-2.0
// The table of kernels for the instruction set this file is compiled for, named LORS_CPU_TABLE (see CMakeLists.txt). No
// standard containers or algorithms: the linker would merge their inline functions across instruction sets, and run the wrong
// ones.
#include "kernels.h"

#include "bfloat16_pairs.h"
#include "contract_kernel.h"
#include "dot_kernel.h"
#include "draw_kernel.h"
#include "fused_linear_kernel.h"
#include "merge_kernel.h"
#include "pack_kernel.h"

#define LORS_STRING_(x) #x
#define LORS_STRING(x) LORS_STRING_(x)
#define LORS_JOIN_(a, b) a##b
#define LORS_JOIN(a, b) LORS_JOIN_(a, b)

namespace lors::cpu {

extern const KernelTable LORS_JOIN(table_, LORS_CPU_TABLE);
const KernelTable LORS_JOIN(table_, LORS_CPU_TABLE) = {
    LORS_STRING(LORS_CPU_TABLE),
    kMergePanel<float>,
    pack,
    merge,
    contract_rows,
    contract_columns,
    store_out,
    kFusedRows,
    kFusedColumns,
    kFusedDepth,
    kFusedDepth * kFusedBlockColumns,
    pack_activation,
    fused_matmul,
    kLanes<float>,
    pack_dot,
    dot,
    kPairsAreExact,
    multiply,
    draw,
    kDotsStored,
};

}  // namespace lors::cpu
