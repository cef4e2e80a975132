// SPDX-License-Identifier: Apache-2.0
// Functions of the core with a table of kernels of the caller's choosing: the public ones pass this processor's, the tests
// each.
#pragma once

#include <lors/fused_linear.h>
#include <lors/merge.h>

#include "kernels.h"

namespace lors::cpu {

Status merge_with(const KernelTable& table, const MergeArgs& args, const CpuHost* host);
Status fused_linear_with(const KernelTable& table, const FusedLinearArgs& args, const CpuHost* host);

}  // namespace lors::cpu
