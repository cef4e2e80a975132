// SPDX-License-Identifier: Apache-2.0
// The fuzz target as libFuzzer calls it. Its own mutations seldom arrive at bytes that validate accepts, so that some inputs
// are fresh valid weights instead, for it to change.
#include <algorithm>
#include <random>

#include "layouts.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  lors::fuzz::run_one(data, size);
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  std::minstd_rand random(seed);
  if (random() % 4) return LLVMFuzzerMutate(data, size, max_size);
  const auto draw = [](void* context) { return uint32_t((*static_cast<std::minstd_rand*>(context))() << 1); };
  const std::vector<uint8_t> input = lors::fuzz::valid_input(draw, &random);
  if (input.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::copy(input.begin(), input.end(), data);
  return input.size();
}
