// SPDX-License-Identifier: Apache-2.0
// SparseProducts over the fake cuSPARSELt: loading, versions, both sizes of objects, plans, capture, threads, refusals.
#include <dlfcn.h>
#include <lors/sparse24.h>

#include <cstring>
#include <memory>
#include <thread>

#include "fake_device.h"

namespace lors {
namespace {

using fake::Abi;
using fake::Buffer;
using fake::Problem;
using fake::Setting;

constexpr DType kDTypes[] = {DType::bfloat16, DType::float16};

class SparseProductTest : public testing::TestWithParam<Abi> {
 protected:
  void SetUp() override {
    fake::device = {};
    live_before_ = fake::live(GetParam());
  }
  void TearDown() override {
    made_.reset();
    EXPECT_EQ(fake::device.scratch, 0) << "scratch was not given back";
    EXPECT_EQ(fake::live(GetParam()), live_before_) << "objects of the library were not destroyed";
    EXPECT_EQ(fake::entered_twice(GetParam()), 0) << "the library was entered by two threads at once";
  }

  SparseProducts& open(int maximum = 8) {
    made_.reset();  // before the library it holds on to
    library_ = std::make_unique<cusparselt::Library>(fake::path(GetParam()));
    made_ = std::make_unique<SparseProducts>(*library_, maximum);
    return *made_;
  }
  int calls(const char* name) const { return fake::calls(GetParam(), name); }

  // The product of `problem`, compressed by the library and run.
  static Status product(SparseProducts& sparse, const Problem& problem, bool input_gradient, std::vector<uint16_t>& output,
                        bool add = false) {
    SparseProductSizes sizes;
    if (Status s = sparse.sizes(problem.N, problem.K, problem.dtype, sizes); !s.ok()) return s;
    Buffer compressed(sizes.compressed), activation(2 * problem.activation(input_gradient).size()), out(2 * output.size());
    std::memcpy(activation.data(), problem.activation(input_gradient).data(), 2 * problem.activation(input_gradient).size());
    Buffer merged(2 * problem.W.size());
    std::memcpy(merged.data(), problem.W.data(), 2 * problem.W.size());
    SparseProductCompressArgs compress{problem.N, problem.K, problem.dtype, input_gradient, merged.data(), compressed.data()};
    if (Status s = sparse.compress(compress, fake::host()); !s.ok()) return s;
    const SparseProductArgs args{problem.key(input_gradient), compressed.data(), activation.data(), out.data(), add};
    SparseProducts::Plan plan;
    if (Status s = sparse.prepare(args, fake::host(), plan); !s.ok()) return s;
    std::memcpy(out.data(), output.data(), 2 * output.size());
    if (Status s = sparse.run(args, plan, fake::host()); !s.ok()) return s;
    std::memcpy(output.data(), out.data(), 2 * output.size());
    return {};
  }

 private:
  int live_before_ = 0;
  std::unique_ptr<cusparselt::Library> library_;
  std::unique_ptr<SparseProducts> made_;
};
INSTANTIATE_TEST_SUITE_P(BothAbis, SparseProductTest, testing::Values(Abi::bytes512, Abi::bytes1024),
                         [](const auto& info) { return info.param == Abi::bytes512 ? "bytes512" : "bytes1024"; });

TEST_P(SparseProductTest, ProductsMeetTheFormula) {
  const Setting workspace("WORKSPACE", "1000");
  SparseProducts& sparse = open();
  unsigned seed = 1;
  for (const DType dtype : kDTypes)
    for (const auto& [N, K, T] : {std::tuple{16, 32, 8}, {48, 16, 24}, {32, 64, 40}}) {
      const Problem problem(N, K, T, dtype, false, ++seed), transposable(N, K, T, dtype, true, ++seed);
      std::vector<uint16_t> output(T * N, fake::narrow(0.375, dtype));
      ASSERT_EQ(product(sparse, problem, false, output).message(), "");
      problem.check(false, output);
      output.assign(T * N, fake::narrow(0.375, dtype));
      ASSERT_EQ(product(sparse, problem, false, output, true).message(), "");
      problem.check(false, output, 0.375);
      output.assign(T * K, 0);
      ASSERT_EQ(product(sparse, transposable, true, output).message(), "");
      transposable.check(true, output);
    }
}

TEST_P(SparseProductTest, OneSearchForEachProductAndTheLongestUnusedPlanGoes) {
  SparseProducts& sparse = open(2);
  const Problem problems[] = {
      {16, 32, 8, DType::bfloat16, false, 1}, {16, 32, 16, DType::bfloat16, false, 2}, {16, 32, 24, DType::bfloat16, false, 3}};
  const int before = calls("MatmulSearch");
  const auto run = [&](const Problem& p) {
    std::vector<uint16_t> output(p.T * p.N);
    EXPECT_EQ(product(sparse, p, false, output).message(), "");
    p.check(false, output);
  };
  for (int i = 0; i < 3; ++i) run(problems[0]);
  run(problems[1]);
  run(problems[0]);
  run(problems[2]);  // the plan of problems[1] goes
  EXPECT_TRUE(sparse.ready(problems[0].key(false)));
  EXPECT_FALSE(sparse.ready(problems[1].key(false)));
  EXPECT_TRUE(sparse.ready(problems[2].key(false)));
  EXPECT_EQ(calls("MatmulSearch") - before, 3);
  run(problems[1]);  // made again, by what the search had found
  EXPECT_EQ(calls("MatmulSearch") - before, 3);
  const SparseProductPlans info = sparse.plans();
  EXPECT_EQ(info.searches, 3);
  EXPECT_EQ(info.misses, 4);
  EXPECT_EQ(info.hits, 3);
  EXPECT_EQ(info.maximum, 2);
  ASSERT_EQ(info.plans.size(), 2u);
  EXPECT_EQ(info.plans[0].problem, problems[1].key(false));
  EXPECT_EQ(info.plans[1].problem, problems[2].key(false));
  sparse.clear();
  EXPECT_TRUE(sparse.plans().plans.empty());
  EXPECT_EQ(sparse.plans().hits + sparse.plans().misses + sparse.plans().searches, 0);
  run(problems[0]);
  EXPECT_EQ(calls("MatmulSearch") - before, 4) << "clear forgets what searches have found";
}

TEST_P(SparseProductTest, EveryPartOfAProductIsPartOfItsPlan) {
  SparseProducts& sparse = open(64);
  const SparseProductProblem base{32, 32, 8, DType::bfloat16, false};
  std::vector<SparseProductProblem> all(6, base);
  all[1].out_features = 48;
  all[2].in_features = 48;
  all[3].tokens = 16;
  all[4].dtype = DType::float16;
  all[5].input_gradient = true;
  for (const auto& p : all) {
    const Problem problem(p.out_features, p.in_features, p.tokens, p.dtype, true, 5);
    std::vector<uint16_t> output(p.tokens * problem.out(p.input_gradient));
    ASSERT_EQ(product(sparse, problem, p.input_gradient, output).message(), "");
    problem.check(p.input_gradient, output);
  }
  EXPECT_EQ(sparse.plans().plans.size(), all.size());
  EXPECT_EQ(sparse.plans().searches, static_cast<int64_t>(all.size()));
}

TEST_P(SparseProductTest, AWarmProductWaitsForNothingAndCanBeCaptured) {
  const Setting workspace("WORKSPACE", "256");
  SparseProducts& sparse = open(1);
  const Problem warm(16, 32, 8, DType::bfloat16, false, 1), cold(16, 32, 16, DType::bfloat16, false, 2);
  std::vector<uint16_t> output(8 * 16), longer(16 * 16);
  ASSERT_EQ(product(sparse, warm, false, output).message(), "");
  const int waits = fake::device.stream.waits;
  fake::device.stream.capturing = true;
  EXPECT_EQ(product(sparse, warm, false, output).message(), "");
  warm.check(false, output);
  EXPECT_EQ(fake::device.stream.waits, waits);
  EXPECT_NE(product(sparse, cold, false, longer).message().find("run it once before"), std::string::npos);
  fake::device.stream.capturing = false;
  // The graph still holds the plan: it stays, beyond the maximum and through clear.
  ASSERT_EQ(product(sparse, cold, false, longer).message(), "");
  EXPECT_TRUE(sparse.ready(warm.key(false)));
  sparse.clear();
  EXPECT_TRUE(sparse.ready(warm.key(false)));
  EXPECT_FALSE(sparse.ready(cold.key(false)));
}

TEST_P(SparseProductTest, ThreadsShareOneSearch) {
  const Setting workspace("WORKSPACE", "64");
  SparseProducts& sparse = open();
  const Problem problem(32, 32, 16, DType::bfloat16, false, 1);
  std::vector<std::vector<uint16_t>> outputs(4, std::vector<uint16_t>(16 * 32));
  std::vector<std::string> problems(4);
  // Each thread with a stream and memory of its own, as threads of torch have.
  std::vector<FakeStream> streams(4);
  std::vector<std::thread> threads;
  SparseProductSizes sizes;
  ASSERT_TRUE(sparse.sizes(32, 32, DType::bfloat16, sizes).ok());
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      CudaHost host{&streams[i],
                    [](int64_t bytes, void** handle) { return *handle = std::aligned_alloc(256, (bytes + 255) / 256 * 256); },
                    std::free};
      Buffer compressed(sizes.compressed), merged(2 * problem.W.size()), out(2 * outputs[i].size()), X(2 * problem.X.size());
      std::memcpy(merged.data(), problem.W.data(), 2 * problem.W.size());
      std::memcpy(X.data(), problem.X.data(), 2 * problem.X.size());
      for (int repeat = 0; repeat < 20 && problems[i].empty(); ++repeat) {
        SparseProducts::Plan plan;
        const SparseProductArgs args{problem.key(false), compressed.data(), X.data(), out.data(), false};
        Status s = sparse.compress({32, 32, DType::bfloat16, false, merged.data(), compressed.data()}, host);
        if (s.ok()) s = sparse.prepare(args, host, plan);
        if (s.ok()) s = sparse.run(args, plan, host);
        problems[i] = s.message();
      }
      std::memcpy(outputs[i].data(), out.data(), 2 * outputs[i].size());
    });
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(problems[i], "");
    problem.check(false, outputs[i]);
  }
  EXPECT_EQ(sparse.plans().searches, 1);
  EXPECT_EQ(sparse.plans().hits + sparse.plans().misses, 80);
}

// What our formats promise the library: where every group has two, its values are our slots, byte for byte.
TEST_P(SparseProductTest, ValuesOfAFullPatternAreOurSlots) {
  SparseProducts& sparse = open();
  const Problem problem(32, 64, 8, DType::bfloat16, true, 9);
  std::vector<uint16_t> values(problem.W.size() / 2);
  std::vector<uint8_t> metadata(problem.N * sparse24_metadata_bytes(problem.K));
  Sparse24CompressArgs ours;
  ours.out_features = problem.N;
  ours.in_features = problem.K;
  ours.weight = problem.W.data();
  ours.weight_dtype = problem.dtype;
  ours.values = values.data();
  ours.metadata = metadata.data();
  ASSERT_TRUE(sparse24_compress(ours, nullptr).ok());
  for (const std::string layout : {"values_first", "metadata_first", "tiled"}) {
    const Setting setting("LAYOUT", layout);
    SparseProductSizes sizes;
    ASSERT_TRUE(sparse.sizes(problem.N, problem.K, problem.dtype, sizes).ok());
    EXPECT_EQ(sizes.values, static_cast<int64_t>(2 * values.size()));
    Buffer compressed(sizes.compressed), merged(2 * problem.W.size());
    std::memcpy(merged.data(), problem.W.data(), 2 * problem.W.size());
    ASSERT_TRUE(
        sparse.compress({problem.N, problem.K, problem.dtype, false, merged.data(), compressed.data()}, fake::host()).ok());
    EXPECT_EQ(std::memcmp(compressed.data(), values.data(), sizes.values) == 0, layout == "values_first");
  }
}

TEST_P(SparseProductTest, RefusesVersions) {
  struct Case {
    const char* version;
    int major, minor;
    bool serves;
  };
  for (const Case& c : {Case{"0.7.1", 8, 0, true},
                        {"0.7.0", 8, 0, false},
                        {"0.6.3", 8, 0, false},
                        {"0.8.0", 8, 6, true},
                        {"0.8.0", 8, 9, false},
                        {"0.8.0", 9, 0, false},
                        {"0.7.1", 9, 0, false},
                        {"0.8.1", 9, 0, true},
                        {"0.10.0", 9, 0, true},
                        {"0.8.0", 10, 0, true},
                        {"0.8.1", 7, 5, false},
                        {"1.0.0", 12, 0, true}}) {
    const Setting version("VERSION", c.version);
    fake::device.major = c.major;
    fake::device.minor = c.minor;
    SparseProducts& sparse = open();
    const Status s = sparse.serves();
    EXPECT_EQ(s.ok(), c.serves) << c.version << " on " << c.major << "." << c.minor << ": " << s.message();
    if (c.serves) {
      EXPECT_EQ(sparse.version(), c.version);
    } else {
      EXPECT_NE(s.message().find(c.major < 8 ? "begin with 8.0" : "too old"), std::string::npos) << s.message();
    }
  }
}

TEST_P(SparseProductTest, RefusesWhatTheHardwareDoesNotTake) {
  const SparseProducts& sparse = open();
  const auto why = [&](int64_t N, int64_t K, int64_t T, DType dtype) {
    return sparse.serves({N, K, T, dtype, false}).message();
  };
  EXPECT_EQ(why(16, 16, 8, DType::float16), "");
  EXPECT_NE(why(16, 16, 8, DType::float32).find("bfloat16 and float16 only"), std::string::npos);
  EXPECT_NE(why(16, 16, 8, DType::float64).find("bfloat16 and float16 only"), std::string::npos);
  EXPECT_NE(why(24, 16, 8, DType::float16).find("out_features in multiples of 16, and it is 24"), std::string::npos);
  EXPECT_NE(why(16, 20, 8, DType::float16).find("in_features in multiples of 16, and it is 20"), std::string::npos);
  EXPECT_NE(why(16, 16, 12, DType::float16).find("tokens in multiples of 8, and it is 12"), std::string::npos);
  EXPECT_NE(why(1 << 16, 1 << 15, 8, DType::float16).find("2^31"), std::string::npos);
  EXPECT_EQ(why((1 << 16) - 16, 1 << 15, 8, DType::float16), "");
  EXPECT_NE(why(16, 1 << 16, 1 << 15, DType::float16).find("2^31"), std::string::npos);
  EXPECT_EQ(why(16, 1 << 16, (1 << 15) - 8, DType::float16), "");
}

TEST_P(SparseProductTest, EveryFailureIsASentenceAndLeavesNothing) {
  const Problem problem(16, 32, 8, DType::bfloat16, false, 1);
  std::vector<uint16_t> output(8 * 16);
  for (const std::string name : {"Init", "StructuredDescriptorInit", "DenseDescriptorInit", "MatmulDescriptorInit",
                                 "MatmulAlgSelectionInit", "MatmulPlanInit", "MatmulGetWorkspace", "MatmulSearch",
                                 "MatmulAlgGetAttribute", "Matmul", "SpMMACompressedSize2", "SpMMACompress2"}) {
    const Setting fails("FAIL", name);
    SparseProducts& sparse = open();
    const Status s = product(sparse, problem, false, output);
    EXPECT_NE(s.message().find("cuSPARSELt 0.8.1 answered CUSPARSE_STATUS_"), std::string::npos) << name << ": " << s.message();
    EXPECT_NE(s.message().find("to cusparseLt" + name + ": "), std::string::npos) << s.message();
    EXPECT_TRUE(sparse.plans().plans.empty() || name == "Matmul") << name;
  }
}

TEST_P(SparseProductTest, WithoutMemoryForTheWorkspaceThereIsNoPlan) {
  const Setting workspace("WORKSPACE", "4096");
  SparseProducts& sparse = open();
  const Problem problem(16, 32, 8, DType::bfloat16, false, 1);
  Buffer compressed(4096), X(2 * problem.X.size()), out(2 * 8 * 16);
  const SparseProductArgs args{problem.key(false), compressed.data(), X.data(), out.data(), false};
  SparseProducts::Plan plan;
  fake::device.out_of_memory = true;
  EXPECT_THROW((void)sparse.prepare(args, fake::host(), plan), std::runtime_error);
  EXPECT_FALSE(sparse.ready(problem.key(false)));
  fake::device.out_of_memory = false;
  EXPECT_TRUE(sparse.prepare(args, fake::host(), plan).ok());  // and the lock is free
}

TEST_P(SparseProductTest, AnAlgorithmThatIsNoneIsSearchedAgain) {
  SparseProducts& sparse = open();
  const Problem problem(16, 32, 8, DType::bfloat16, false, 1);
  std::vector<uint16_t> output(8 * 16);
  sparse.know(problem.key(false), {2, 1, 0});
  ASSERT_TRUE(product(sparse, problem, false, output).ok());
  EXPECT_EQ(sparse.plans().searches, 0);
  sparse.clear();
  sparse.know(problem.key(false), {99, 1, 0});
  ASSERT_TRUE(product(sparse, problem, false, output).ok());
  problem.check(false, output);
  EXPECT_EQ(sparse.plans().searches, 1);
  SparseProductAlgorithm found;
  ASSERT_TRUE(sparse.algorithm(problem.key(false), found));
  EXPECT_LE(found.config, 3);
}

TEST(CusparseltLibrary, SaysWhyItIsNotThere) {
  EXPECT_EQ(cusparselt::Library("off").problem, "cuSPARSELt is turned off (LORS_CUSPARSELT=off).");
  const cusparselt::Library absent("/nonexistent/libcusparseLt.so.0");
  EXPECT_NE(absent.problem.find("could not be loaded"), std::string::npos) << absent.problem;
  EXPECT_NE(absent.problem.find("nvidia-cusparselt-cu12"), std::string::npos);
  // A library, but another one.
  const cusparselt::Library other("libm.so.6");
  EXPECT_NE(other.problem.find("has no function cusparseLtGetProperty"), std::string::npos) << other.problem;
  const Setting fails("FAIL", "GetProperty");
  EXPECT_NE(cusparselt::Library(fake::path(Abi::bytes512)).problem.find("did not tell its version"), std::string::npos);
}

TEST(CusparseltLibrary, TheCopyThatIsLoadedAlreadyComesFirst) {
  ASSERT_NE(dlopen(LORS_FAKE_SONAME, RTLD_LAZY | RTLD_LOCAL), nullptr) << dlerror();
  for (const char* wanted : {static_cast<const char*>(nullptr), ""}) {
    const cusparselt::Library library(wanted);
    EXPECT_EQ(library.problem, "");
    EXPECT_EQ(library.origin, "libcusparseLt.so.0, loaded with torch");
  }
}

TEST(CusparseltLibrary, LargerObjectsThanKnownAreNoticed) {
  fake::device = {};
  const cusparselt::Library library(fake::path(Abi::bytes1536));
  ASSERT_EQ(library.problem, "");
  EXPECT_NE(SparseProducts(library, 4).serves().message().find("larger objects than this build"), std::string::npos);
}

TEST(CusparseltLibrary, PlansHaveAMaximum) {
  const cusparselt::Library library(fake::path(Abi::bytes512));
  EXPECT_NE(SparseProducts(library, 0).serves().message().find("LORS_SPARSE_PLANS"), std::string::npos);
}

}  // namespace
}  // namespace lors
