// SPDX-License-Identifier: Apache-2.0
// Scratch memory of the CPU operators, kept between calls: fresh memory costs a page fault and a zeroed page per 4 KiB, which
// can take longer than the merge that writes into it. Results never use it. Blocks are torch's, so that its profilers see
// them when they are made.
#pragma once

#include <cstdint>

namespace lors::binding {

// At least `bytes` of memory aligned to 64 bytes, or to a page from 256 KiB on, for CpuHost::allocate. Thread-safe. Of blocks
// that are kept there are never more than were once in use together, none larger than the largest ever asked for.
void* take_scratch(int64_t bytes, void** handle);
void return_scratch(void* handle);

// Frees the blocks that no call uses, and returns their bytes.
int64_t release_scratch();

}  // namespace lors::binding
