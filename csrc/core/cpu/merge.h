// SPDX-License-Identifier: Apache-2.0
// The merges with a table of kernels of the caller's choosing: the public functions pass this processor's, the tests each.
#pragma once

#include <lors/merge.h>
#include <lors/sparse24.h>

#include "kernels.h"

namespace lors::cpu {

Status merge_with(const KernelTable& table, const MergeArgs& args, const CpuHost* host);
Status sparse24_merge_with(const KernelTable& table, const Sparse24MergeArgs& args, const CpuHost* host);

}  // namespace lors::cpu
