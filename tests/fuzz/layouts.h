// SPDX-License-Identifier: Apache-2.0
// What is fuzzed: any bytes, read as a compressed weight. If validate accepts them, everything that trusts it must be safe and
// consistent on them; if it refuses them, nothing else looks at them. Buffers are exactly sized, for the address sanitizer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lors::fuzz {

// Returns whether the bytes were a valid weight; prints a sentence and aborts if something is inconsistent.
bool run_one(const uint8_t* data, size_t size);

// Bytes that run_one reads as a valid weight; all but the draw is deterministic. `draw` returns 32 random bits.
std::vector<uint8_t> valid_input(uint32_t (*draw)(void* context), void* context);

}  // namespace lors::fuzz
