// SPDX-License-Identifier: Apache-2.0
// The example of docs/reference/cpp.md, which includes the lines between the markers.
#include <gtest/gtest.h>
#include <lors/merge.h>

#include <string>
#include <vector>

namespace {

TEST(Example, Merge) {
  // --8<-- [start:merge]
  const std::vector<float> weight = {1, 0, 2, 0};  // [N, K] = [2, 2], two zeros
  const std::vector<float> lora_A = {1, 1};        // [r, K] = [1, 2]
  const std::vector<float> lora_B = {2, 4};        // [N, r] = [2, 1]
  std::vector<float> merged(4);

  lors::MergeArgs args;
  args.out_features = 2;
  args.in_features = 2;
  args.r = 1;
  args.weight = weight.data();
  args.lora_A = lora_A.data();
  args.lora_B = lora_B.data();
  args.scaling = 0.5;
  args.merged = merged.data();

  const lors::Status status = lors::merge(args, nullptr);  // no host: this thread, the C library's memory
  const std::string problem = status.message();            // empty; otherwise a sentence
  // merged is {2, 0, 4, 0}
  // --8<-- [end:merge]
  EXPECT_TRUE(status.ok());
  EXPECT_EQ(problem, "");
  EXPECT_EQ(merged, (std::vector<float>{2, 0, 4, 0}));
}

}  // namespace
