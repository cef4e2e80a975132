// SPDX-License-Identifier: Apache-2.0
// The tilings of the CUDA kernels: pure functions, so they are tested without CUDA.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <string_view>
#include <thread>
#include <vector>

#include "cuda/adapter_grad_lors_config.h"
#include "cuda/fused_linear_config.h"
#include "cuda/fused_linear_fast_config.h"
#include "cuda/masked_contract_config.h"
#include "cuda/merge_config.h"
#include "cuda/merge_fast_config.h"
#include "cuda/paths.h"
#include "cuda/shared_limit.h"

namespace lors::cuda {
namespace {

constexpr DeviceLimits kHopper{132, 227 * 1024}, kAmpere{108, 163 * 1024}, kAda{128, 99 * 1024};
constexpr Layout kLayouts[] = {Layout::dense, Layout::sparse24, Layout::bitmap};

TEST(MergeConfig, CoversTheWeightAndFitsTheDevice) {
  for (const DeviceLimits limits : {kHopper, kAmpere, kAda})
    for (const int64_t N : {1, 17, 1000, 14336})
      for (const int64_t K : {1, 255, 257, 4096, 14336})
        for (const int64_t r : {1, 16, 17, 64, 256, 300})
          for (const int terms : {1, 2, 3})
            for (const int size : {2, 4})
              for (const Layout layout : kLayouts) {
                const MergeConfig c = merge_config(N, K, r, terms, terms, layout, size, limits);
                ASSERT_TRUE(c.columns == 256 || c.columns == 512);
                ASSERT_TRUE(c.panel_rows >= kMergeStepRows && c.panel_rows <= kMergePanelRows);
                ASSERT_EQ(c.panel_rows & (c.panel_rows - 1), 0);
                ASSERT_EQ(c.rows % c.panel_rows, 0);
                ASSERT_TRUE(c.chunk >= 16 && c.chunk % 16 == 0);
                ASSERT_LE(c.shared_bytes, limits.shared_bytes);
                ASSERT_EQ(c.tile_at, merge_shared_bytes(c.columns, c.panel_rows, c.chunk, terms, terms));
                ASSERT_EQ(c.shared_bytes, c.tile_at + merge_tile_bytes(layout, c.columns, c.panel_rows, size));
                // The sums of every layout are the dense one's.
                ASSERT_EQ(c.chunk, merge_config(N, K, r, terms, terms, Layout::dense, size, limits).chunk);
                ASSERT_GE(c.column_blocks * c.columns, K);
                ASSERT_GE(c.blocks / c.column_blocks * c.rows, N);
                ASSERT_LT((c.column_blocks - 1) * c.columns, K);
              }
}

TEST(MergeConfig, LargeBlocksWhereTheyStillFillTheDevice) {
  const MergeConfig large = merge_config(4096, 4096, 16, 1, 1, Layout::dense, 2, kHopper);
  EXPECT_EQ(large.columns, 512);
  EXPECT_EQ(large.rows, 256);
  const MergeConfig small = merge_config(1024, 1024, 16, 1, 1, Layout::dense, 2, kHopper);
  EXPECT_GE(small.blocks * small.columns, 512 * 16);
  EXPECT_LT(small.rows, 256);
}

TEST(MergeConfig, OneWaveOfTallBlocksWhereTheWeightIsLarge) {
  for (const Layout layout : kLayouts) {
    const MergeConfig c = merge_config(14336, 4096, 16, 1, 1, layout, 2, kHopper);
    EXPECT_EQ(c.columns, 512);
    EXPECT_LE(c.blocks, kHopper.multiprocessors);
    EXPECT_GE(c.blocks * 10, kHopper.multiprocessors * 9);
  }
}

TEST(MergeConfig, AllRanksAtOnceUnlessTheyDoNotFit) {
  EXPECT_GE(merge_config(4096, 4096, 64, 1, 1, Layout::dense, 2, kAda).chunk, 64);
  EXPECT_GE(merge_config(4096, 4096, 256, 1, 1, Layout::dense, 2, kHopper).chunk, 256);
  const MergeConfig chunked = merge_config(4096, 4096, 512, 3, 3, Layout::dense, 2, kAda);
  EXPECT_LT(chunked.chunk, 512);
  EXPECT_EQ(chunked.rows, kMergeStepRows);
}

TEST(MergeConfig, SaysSoWhereNothingFits) { EXPECT_EQ(merge_config(64, 64, 16, 3, 3, Layout::dense, 2, {1, 1024}).columns, 0); }

TEST(MergeConfig, CountsBeyond31Bits) {
  const MergeConfig c = merge_config(int64_t{1} << 22, int64_t{1} << 16, 16, 1, 1, Layout::dense, 2, kHopper);
  EXPECT_EQ(c.blocks, (int64_t{1} << 22) / c.rows * ((int64_t{1} << 16) / c.columns));
}

MergeArgs fast_merge(int64_t N, int64_t K, int64_t r) {
  MergeArgs args;
  args.out_features = N;
  args.in_features = K;
  args.r = r;
  args.weight_dtype = args.merged_dtype = args.round_to = DType::bfloat16;
  return args;
}

TEST(MergeFastConfig, CoversTheWeightAndLeavesRoomForTwoBlocks) {
  constexpr uint32_t kMask = 0;
  for (const DeviceLimits limits : {kHopper, kAmpere, kAda})
    for (const int64_t N : {1, 17, 1000, 14336})
      for (const int64_t K : {8, 256, 264, 4096, 14336})
        for (const int64_t r : {1, 16, 17, 64})
          for (const int terms : {1, 2, 3})
            for (const Layout layout : kLayouts)
              for (const bool has_mask : {false, true}) {
                MergeArgs args = fast_merge(N, K, r);
                args.weight_layout = layout;
                if (has_mask || layout == Layout::bitmap) args.mask = &kMask;
                const MergeConfig c = merge_fast_config(args, terms, terms, limits);
                if (c.columns == 0) {  // only where the adapters and a bitmap's values take too much shared memory for two
                  const int64_t values = layout == Layout::bitmap ? 38 * 1024 : 0;
                  ASSERT_GT(2 * 264 * ((r + 15) / 16 * 16) * terms + values, limits.shared_bytes / 2 - 16 * 1024);
                  continue;
                }
                ASSERT_TRUE(c.columns == 256 || c.columns == 512);
                ASSERT_LE(2 * (c.shared_bytes + 1024), limits.shared_bytes + 1024);
                ASSERT_EQ(c.panel_rows % merge_fast_step(c.columns), 0);
                ASSERT_LE(c.panel_rows, kMergePanelRows);
                ASSERT_EQ(c.rows % c.panel_rows, 0);
                ASSERT_GE(c.column_blocks * c.columns, K);
                ASSERT_LT((c.column_blocks - 1) * c.columns, K);
                ASSERT_GE(c.blocks / c.column_blocks * c.rows, N);
                // The general kernel sums the same ranks together.
                ASSERT_EQ(c.chunk, merge_config(N, K, r, terms, terms, layout, 2, limits).chunk);
              }
}

TEST(MergeFastConfig, OneWaveOfTwoBlocksPerMultiprocessor) {
  for (const int64_t N : {4096, 14336}) {
    const MergeConfig c = merge_fast_config(fast_merge(N, 4096, 16), 1, 1, kHopper);
    EXPECT_LE(c.blocks, 2 * kHopper.multiprocessors);
    EXPECT_GE(c.blocks * 10, 2 * kHopper.multiprocessors * 9);
  }
}

TEST(MergeFastConfig, LeavesTheRestToTheGeneralKernel) {
  const auto served = [](const MergeArgs& args) { return merge_fast_config(args, 1, 1, kHopper).columns != 0; };
  const MergeArgs good = fast_merge(64, 64, 16);
  ASSERT_TRUE(served(good));
  for (const int64_t r : {0, 65}) EXPECT_FALSE(served(fast_merge(64, 64, r)));
  EXPECT_FALSE(served(fast_merge(64, 68, 16)));
  MergeArgs other = good;
  other.merged_dtype = DType::float16;
  EXPECT_FALSE(served(other));
  other = good;
  other.weight_dtype = other.merged_dtype = DType::float32;
  EXPECT_FALSE(served(other));
  other = good;
  other.weight = reinterpret_cast<const void*>(uintptr_t{8});
  EXPECT_FALSE(served(other));
  other = good;
  other.merged = reinterpret_cast<void*>(uintptr_t{8});
  EXPECT_FALSE(served(other));
}

FusedLinearArgs fast_fused(int64_t tokens, int64_t N, int64_t K, int64_t r, bool gradient) {
  FusedLinearArgs args;
  args.tokens = tokens;
  args.out_features = N;
  args.in_features = K;
  args.r = r;
  args.input_gradient = gradient;
  args.weight_dtype = args.activation_dtype = args.round_to = args.output_dtype = DType::bfloat16;
  return args;
}

TEST(FusedFastConfig, CoversTheWeightAndFitsTheDevice) {
  for (const DeviceLimits limits : {kHopper, kAmpere})
    for (const int64_t N : {1, 17, 1000, 14336})
      for (const int64_t K : {8, 256, 264, 4096, 14336})
        for (const int64_t r : {1, 16, 64})
          for (const bool gradient : {false, true})
            for (const Layout layout : kLayouts) {
              FusedLinearArgs args = fast_fused(16, N, K, r, gradient);
              args.weight_layout = layout;
              const MergeConfig c = fused_fast_config(args, 1, 1, limits);
              if (layout == Layout::bitmap && r == 64 && c.columns == 0) continue;  // its values leave too little memory
              ASSERT_TRUE(c.columns == 256 || c.columns == 512);
              ASSERT_LE(c.shared_bytes, limits.shared_bytes);
              const int behind = c.tile_at + fast_tile_bytes(args, c.columns, c.panel_rows, kFusedFastThreads);
              const int activation = 2 * kFusedFastTokens * (c.panel_rows + kFusedFastPad);
              const int sums = 4 * kFusedFastTokens * (kFusedFastWarps / (c.columns / 64)) * (c.columns + kFusedFastSumsPad);
              ASSERT_GE(c.shared_bytes, behind + (gradient ? activation : kFusedFastSumsBytes + kFusedFastActivationBytes));
              ASSERT_TRUE(!gradient || c.shared_bytes >= sums);
              ASSERT_EQ(c.panel_rows % merge_fast_step(c.columns, kFusedFastThreads), 0);
              ASSERT_EQ(c.rows % c.panel_rows, 0);
              ASSERT_GE(c.column_blocks * c.columns, K);
              ASSERT_LT((c.column_blocks - 1) * c.columns, K);
              ASSERT_GE(c.blocks / c.column_blocks * c.rows, N);
            }
}

TEST(FusedFastConfig, OneWaveOfOneBlockPerMultiprocessor) {
  for (const bool gradient : {false, true}) {
    const MergeConfig c = fused_fast_config(fast_fused(16, 4096, 4096, 16, gradient), 1, 1, kHopper);
    EXPECT_LE(c.blocks, kHopper.multiprocessors);
    EXPECT_GE(c.blocks * 10, kHopper.multiprocessors * 9);
  }
}

TEST(FusedFastConfig, OfExpertsCountsTheirRowsInTheMean) {
  for (const bool gradient : {false, true}) {
    FusedLinearArgs args = fast_fused(160, 1024, 4096, 16, gradient);
    args.weight_layout = Layout::sparse24;
    args.experts.count = 10;
    const MergeConfig c = fused_fast_config(args, 1, 1, kHopper);
    ASSERT_NE(c.columns, 0);
    EXPECT_EQ(fused_fast_blocks(args, c), c.blocks * 19);  // 10 experts begin a tile, and 150 rows fill 9 more
    FusedLinearArgs one = fast_fused(16, 1024, 4096, 16, gradient);
    one.weight_layout = Layout::sparse24;
    EXPECT_LT(c.blocks, fused_fast_config(one, 1, 1, kHopper).blocks);  // which has the device to itself
    args.tokens = 161;
    EXPECT_EQ(fused_fast_config(args, 1, 1, kHopper).columns, 0);
  }
}

// No routing has more tiles, and one has as many.
TEST(Experts, HaveAtMostSoManyTiles) {
  for (int64_t rows = 0; rows <= 12; ++rows)
    for (int64_t groups = 1; groups <= 3; ++groups)
      for (const int64_t tile : {1, 2, 4, 5}) {
        int64_t most = 0;
        for (int64_t a = 0; a <= rows; ++a)
          for (int64_t b = 0; a + b <= rows; ++b) {
            const int64_t counts[3] = {groups == 1 ? rows : a,
                                       groups == 2   ? rows - a
                                       : groups == 1 ? 0
                                                     : b,
                                       groups == 3 ? rows - a - b : 0};
            int64_t tiles = 0;
            for (const int64_t count : counts) tiles += (count + tile - 1) / tile;
            most = std::max(most, tiles);
          }
        EXPECT_EQ(most_tiles(rows, groups, tile), most) << rows << " rows, " << groups << " groups, tiles of " << tile;
      }
}

TEST(FusedFastConfig, LeavesTheRestToTheGeneralKernel) {
  const auto served = [](const FusedLinearArgs& args) { return fused_fast_config(args, 1, 1, kHopper).columns != 0; };
  const FusedLinearArgs good = fast_fused(16, 64, 64, 16, false);
  ASSERT_TRUE(served(good));
  EXPECT_FALSE(served(fast_fused(17, 64, 64, 16, false)));
  EXPECT_FALSE(served(fast_fused(0, 64, 64, 16, false)));
  for (const int64_t r : {0, 65}) EXPECT_FALSE(served(fast_fused(16, 64, 64, r, false)));
  EXPECT_FALSE(served(fast_fused(16, 64, 68, 16, false)));
  FusedLinearArgs other = good;
  other.activation_dtype = DType::float16;
  EXPECT_FALSE(served(other));
  other = good;
  other.weight_dtype = other.activation_dtype = DType::float32;
  EXPECT_FALSE(served(other));
  other = good;
  other.weight = reinterpret_cast<const void*>(uintptr_t{8});
  EXPECT_FALSE(served(other));
}

TEST(LorsConfig, CoversTokensAndFeaturesAndFitsTheDevice) {
  for (const DeviceLimits limits : {kHopper, kAmpere, kAda})
    for (const int64_t tokens : {1, 17, 512, 8192, 1 << 20})
      for (const int64_t features : {1, 129, 4096, 128256})
        for (const int width : {16, 32, 64, 128})
          for (const int size : {2, 4})
            for (const int wanted : {1, 2, 3}) {
              LorsShape shape;
              shape.tokens = tokens;
              shape.features[0] = wanted & 1 ? features : 0;
              shape.features[1] = wanted & 2 ? 4096 : 0;
              shape.size = shape.factor_size[0] = shape.factor_size[1] = size;
              shape.terms = size == 4 ? 3 : 2;
              shape.width = width;
              const ProjectConfig p = project_config(shape, limits);
              const GradientConfig g = gradient_config(shape, limits);
              if (width == 16 || (size == 2 && width <= 32)) {
                ASSERT_TRUE(p.token_tiles && g.feature_groups);
              }
              ASSERT_LE(p.shared_bytes, limits.shared_bytes);
              ASSERT_LE(g.shared_bytes, limits.shared_bytes);
              if (p.token_tiles) {
                ASSERT_GE(p.blocks * 16 * p.token_tiles, tokens);
                ASSERT_LT((p.blocks - 1) * 16 * p.token_tiles, tokens);
              }
              if (!g.feature_groups) continue;
              ASSERT_LE(g.warps(width), kLorsWarps);
              ASSERT_EQ(g.step_tokens % (16 * g.token_groups), 0);
              ASSERT_EQ(g.range_tokens % g.step_tokens, 0);
              ASSERT_GE(g.ranges * g.range_tokens, tokens);
              ASSERT_LT((g.ranges - 1) * g.range_tokens, tokens);
              for (const int side : {0, 1}) {
                ASSERT_GE(g.tiles[side] * 64 * g.feature_groups, shape.features[side]);
                // Partial sums are at most an eighth of what a block reads.
                if (g.ranges > 1) {
                  ASSERT_GE(g.range_tokens, 16 * width);
                }
              }
            }
}

TEST(LorsConfig, RangesOfAClusterAreFewAndLeaveRoomForMBarriers) {
  for (const DeviceLimits limits : {kHopper, DeviceLimits{1000, 227 * 1024}})
    for (const int64_t tokens : {1, 512, 8192, 1 << 20})
      for (const int width : {16, 32, 64}) {
        LorsShape shape;
        shape.tokens = tokens;
        shape.features[0] = shape.features[1] = 512;
        shape.width = width;
        const GradientConfig base = gradient_config(shape, limits);
        shape.clusters = true;
        const GradientConfig g = gradient_config(shape, limits);
        ASSERT_LE(g.ranges, kMostRanges);
        ASSERT_LE(g.shared_bytes, limits.shared_bytes);
        ASSERT_GE(g.shared_bytes, g.mbarriers_at + 8 * lors_stages(shape.size));
        ASSERT_GE(g.mbarriers_at, lors_stages(shape.size) * g.stage);
        ASSERT_EQ(g.mbarriers_at % 8, 0);
        ASSERT_EQ(g.stage % 16, 0);
        ASSERT_EQ(g.terms_at % 16, 0);
        if (base.ranges <= kMostRanges) {
          ASSERT_EQ(g.ranges, base.ranges);
        }
      }
}

TEST(LorsConfig, ClustersAreForBfloat16OnHopperAndDataCentreBlackwell) {
  using enum DType;
  for (const int architecture : {90, 100, 103}) EXPECT_TRUE(gradients_in_clusters(architecture, bfloat16, true));
  for (const int architecture : {0, 80, 86, 89, 120}) EXPECT_FALSE(gradients_in_clusters(architecture, bfloat16, true));
  EXPECT_FALSE(gradients_in_clusters(90, bfloat16, false));
  EXPECT_FALSE(gradients_in_clusters(90, float16, true));
  EXPECT_FALSE(gradients_in_clusters(90, float32, true));
}

TEST(LorsConfig, SixtyFourRanksInOnePassOfOneRange) {
  LorsShape shape;
  shape.tokens = 2048;
  shape.features[0] = shape.features[1] = 4096;
  shape.terms = token_terms(1, 2048, 4096);
  EXPECT_EQ(shape.terms, 2);
  for (const int64_t r : {16, 64}) {
    shape.width = lors_width(r);
    for (const DeviceLimits limits : {kHopper, kAmpere}) {
      EXPECT_GT(project_config(shape, limits).token_tiles, 0);
      EXPECT_EQ(gradient_config(shape, limits).ranges, 1);
    }
  }
}

TEST(ContractConfig, CoversTheGradientAndFitsTheDevice) {
  for (const DeviceLimits limits : {kHopper, kAmpere, kAda}) {
    for (const int terms_A : {1, 2, 3})
      for (const int terms_B : {1, 2, 3}) ASSERT_LE(contract_shared(terms_A, terms_B).total, limits.shared_bytes);
    for (const int64_t rows : {1, 129, 4096})
      for (const int64_t columns : {1, 257, 14336})
        for (const int64_t r : {1, 16, 64, 256}) {
          const ContractConfig c = contract_config(rows, columns, r, true, true, limits);
          ASSERT_GE(c.row_tiles * kContractRows, rows);
          ASSERT_GE(c.column_tiles * kContractColumns, columns);
          ASSERT_GE(c.width, r);
          ASSERT_TRUE(c.panel_tiles >= 1 && c.panel_tiles <= c.row_tiles);
        }
  }
}

TEST(GradientPanels, StayInHalfOfTheCache) {
  for (const int64_t l2 : {4096, 6 << 20, 40 << 20, 50 << 20})
    for (const int64_t N : {1, 100, 4096, 14336})
      for (const int64_t K : {1, 4096, 14336, 128256}) {
        const int64_t rows = gradient_panel_rows(N, K, l2);
        ASSERT_TRUE(rows >= 1 && rows <= N);
        if (rows > 1) {
          ASSERT_LE(rows * K * 4, l2 / 2);
        }
      }
  EXPECT_EQ(gradient_panel_rows(4096, 4096, 50 << 20), 1408);  // three panels on an H100
}

TEST(Paths, OnlyWhatIsOnRecordIsTaken) {
  using enum DType;
  using enum Layout;
  using enum Path;
  constexpr PathRecord records[] = {{{bfloat16, dense, false, 4096, 1024, 1}, 16, fused_linear, "a.json"},
                                    {{bfloat16, sparse24, false, 4096, 1024, 2048}, 8192, sparse_matmul, "b.json"}};
  const auto path = [&](PathShape shape) { return recorded_path(records, shape); };
  for (const int64_t tokens : {1, 7, 16}) EXPECT_EQ(path({bfloat16, dense, false, 4096, 1024, tokens}), fused_linear);
  for (const int64_t tokens : {2048, 8192}) EXPECT_EQ(path({bfloat16, sparse24, false, 4096, 1024, tokens}), sparse_matmul);
  // One step outside of a record, in each direction.
  for (const PathShape& shape :
       {PathShape{bfloat16, dense, false, 4096, 1024, 0}, PathShape{bfloat16, dense, false, 4096, 1024, 17},
        PathShape{float16, dense, false, 4096, 1024, 1}, PathShape{bfloat16, bitmap, false, 4096, 1024, 1},
        PathShape{bfloat16, dense, true, 4096, 1024, 1}, PathShape{bfloat16, dense, false, 4097, 1024, 1},
        PathShape{bfloat16, dense, false, 4096, 1025, 1}, PathShape{bfloat16, sparse24, false, 4096, 1024, 2047},
        PathShape{bfloat16, sparse24, false, 4096, 1024, 8193}})
    EXPECT_EQ(path(shape), merge_matmul);
}

TEST(Paths, EveryRecordNamesItsSource) {
  for (const int architecture : {80, 86, 89, 90, 100, 120})
    for (const PathRecord& record : path_records(architecture)) {
      EXPECT_TRUE(std::string_view(record.source).ends_with(".json"));
      EXPECT_LE(record.shape.tokens, record.last);
      EXPECT_EQ(record.path == Path::sparse_matmul, record.shape.layout == Layout::sparse24);
    }
}

// What launch.h relies on: no thread goes on to its launch before the limit is raised, and each pair costs one call.
TEST(SharedLimit, IsRaisedOncePerKernelAndDeviceBeforeAnyLaunch) {
  static const int kernels[2] = {};
  std::atomic<int> calls[2][2] = {}, late = 0;
  bool raised[2][2] = {};
  std::vector<std::thread> threads;
  for (int t = 0; t < 16; ++t)
    threads.emplace_back([&, kernel = t % 2, device = t / 2 % 2] {
      const int error = once_per_kernel(&kernels[kernel], device, 0, [&] {
        if (++calls[kernel][device] == 1) return 7;  // fails at first: must be tried again
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        raised[kernel][device] = true;
        return 0;
      });
      if (error == 0 && !raised[kernel][device]) ++late;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(late, 0);
  for (const auto& of_kernel : calls)
    for (const auto& count : of_kernel) EXPECT_EQ(count, 2);
}

}  // namespace
}  // namespace lors::cuda
