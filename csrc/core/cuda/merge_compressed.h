// SPDX-License-Identifier: Apache-2.0
// The merge of weights that are not dense (merge_compressed.cu), for merge.cu.
#pragma once

#include <lors/merge.h>

namespace lors::cuda {

Status merge_compressed(const MergeArgs& args, const CudaHost& host);

}  // namespace lors::cuda
