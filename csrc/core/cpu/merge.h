// SPDX-License-Identifier: Apache-2.0
// The merge with a table of kernels of the caller's choosing: the public function passes this processor's, the tests each.
#pragma once

#include <lors/merge.h>

#include "kernels.h"

namespace lors::cpu {

Status merge_with(const KernelTable& table, const MergeArgs& args, const CpuHost* host);

}  // namespace lors::cpu
