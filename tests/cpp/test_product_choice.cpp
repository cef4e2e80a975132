// SPDX-License-Identifier: Apache-2.0
// Which way a 2:4 product is taken: the faster one, once measured; as asked; never under capture; never a wrong one.
#include <cstring>
#include <memory>
#include <thread>

#include "fake_device.h"

namespace lors {
namespace {

using fake::Abi;
using fake::Problem;

constexpr Abi kAbi = Abi::bytes512;

// Both ways of one product, each taking some time of the fake device. The "dense" one is a formula, the sparse one the
// library's.
class ProductChoiceTest : public testing::Test {
 protected:
  void SetUp() override {
    fake::device = {};
    unsetenv("LORS_SPARSE_PRODUCT");
  }
  void TearDown() override {
    unsetenv("LORS_SPARSE_PRODUCT");
    EXPECT_EQ(fake::device.scratch, 0);
  }

  ProductRequest request(const Problem& problem, std::string_view products = "auto", bool input_gradient = false) {
    X_ = std::make_unique<fake::Buffer>(2 * problem.activation(input_gradient).size());
    std::memcpy(X_->data(), problem.activation(input_gradient).data(), 2 * problem.activation(input_gradient).size());
    out_ = std::make_unique<fake::Buffer>(2 * problem.T * problem.out(input_gradient));
    problem_ = &problem;
    ProductRequest made;
    made.key.problem = problem.key(input_gradient);
    made.products = products;
    made.activation = X_->data();
    made.output = out_->data();
    return made;
  }

  ProductWays ways(const ProductRequest& r) {
    const bool input_gradient = r.key.problem.input_gradient;
    return {
        [this, input_gradient] {
          ++dense_runs;
          fake::device.stream.milliseconds += dense_ms;
          auto* out = static_cast<uint16_t*>(out_->data());
          const int64_t columns = problem_->out(input_gradient);
          for (int64_t i = 0; i < problem_->T * columns; ++i)
            out[i] = dense_flip ^ fake::narrow(problem_->expected(input_gradient, i / columns, i % columns), problem_->dtype);
          return Status();
        },
        [this, input_gradient, r] {
          ++sparse_runs;
          SparseProductSizes sizes;
          if (Status s = sparse.sizes(problem_->N, problem_->K, problem_->dtype, sizes); !s.ok()) return s;
          fake::Buffer merged(2 * problem_->W.size()), compressed(sizes.compressed);
          std::memcpy(merged.data(), problem_->W.data(), 2 * problem_->W.size());
          if (Status s = sparse.compress(
                  {problem_->N, problem_->K, problem_->dtype, input_gradient, merged.data(), compressed.data()}, fake::host());
              !s.ok())
            return s;
          SparseProducts::Plan plan;
          const SparseProductArgs args{r.key.problem, compressed.data(), r.activation, out_->data(), false};
          if (Status s = sparse.prepare(args, fake::host(), plan); !s.ok()) return s;
          return sparse.run(args, plan, fake::host());
        }};
  }

  // Takes the product; whether its last run was sparse.
  bool take(const ProductRequest& r) {
    const int before = sparse_runs;
    dense_runs = 0;
    const Status s = choices.take(r, ways(r), fake::host());
    message = s.message();
    if (s.ok()) {
      std::vector<uint16_t> out(problem_->T * problem_->out(r.key.problem.input_gradient));
      std::memcpy(out.data(), out_->data(), 2 * out.size());
      problem_->check(r.key.problem.input_gradient, out);
    }
    return sparse_runs > before;
  }

  cusparselt::Library library{fake::path(kAbi)};
  SparseProducts sparse{library, 8};
  ProductChoices choices{sparse};
  double dense_ms = 1;
  uint16_t dense_flip = 0;  // bits of the dense way's results that come out wrong
  int dense_runs = 0, sparse_runs = 0;
  std::string message;
  Problem problem{32, 64, 16, DType::bfloat16, true, 3};

 private:
  const Problem* problem_ = nullptr;
  std::unique_ptr<fake::Buffer> X_, out_;
};

TEST_F(ProductChoiceTest, TheFasterWayIsMeasuredOnceAndTakenAfterwards) {
  for (const bool input_gradient : {false, true}) {
    choices.clear();
    const fake::Setting cost("MILLISECONDS", "0.25");
    take(request(problem, "auto", input_gradient));
    ASSERT_EQ(message, "");
    ASSERT_EQ(choices.all().size(), 1u);
    const auto [key, choice] = choices.all()[0];
    EXPECT_EQ(key.problem, problem.key(input_gradient));
    EXPECT_TRUE(choice.sparse);
    EXPECT_DOUBLE_EQ(choice.dense_us, 1000);
    EXPECT_DOUBLE_EQ(choice.sparse_us, 250);
    const int waits = fake::device.stream.waits;
    for (int i = 0; i < 3; ++i) {
      EXPECT_TRUE(take(request(problem, "auto", input_gradient)));
      EXPECT_EQ(dense_runs, 0);
    }
    EXPECT_EQ(fake::device.stream.waits, waits) << "a known product waits for nothing";
  }
}

TEST_F(ProductChoiceTest, ASlowerSparseWayIsNotTaken) {
  for (const char* milliseconds : {"1.0", "3"}) {  // equal is not faster
    choices.clear();
    const fake::Setting cost("MILLISECONDS", milliseconds);
    take(request(problem));
    EXPECT_FALSE(choices.all().at(0).second.sparse);
    EXPECT_FALSE(take(request(problem)));
    EXPECT_EQ(dense_runs, 1);
    EXPECT_TRUE(take(request(problem, "sparse"))) << "but it is, where it is asked for";
  }
}

TEST_F(ProductChoiceTest, WhatIsAskedForIsDone) {
  const fake::Setting cost("MILLISECONDS", "0.1");
  EXPECT_FALSE(take(request(problem, "dense")));
  EXPECT_TRUE(choices.all().empty());
  EXPECT_TRUE(take(request(problem, "sparse")));
  EXPECT_EQ(dense_runs, 1) << "once, to compare with";
  EXPECT_TRUE(take(request(problem, "sparse")));
  EXPECT_EQ(dense_runs, 0);
  EXPECT_TRUE(choices.all().empty()) << "what is faster is still open";
  take(request(problem, "quick"));
  EXPECT_EQ(message, "products is 'quick'; it must be auto, dense or sparse.");
}

TEST_F(ProductChoiceTest, TheEnvironmentSaysWhatAutoIs) {
  setenv("LORS_SPARSE_PRODUCT", "dense", 1);
  EXPECT_FALSE(take(request(problem)));
  EXPECT_TRUE(take(request(problem, "sparse"))) << "an argument is stronger";
  setenv("LORS_SPARSE_PRODUCT", "sparse", 1);
  EXPECT_TRUE(take(request(problem)));
  const Problem odd(32, 64, 12, DType::bfloat16, false, 1);
  take(request(odd));
  EXPECT_EQ(message.find("LORS_SPARSE_PRODUCT is 'sparse', but "), 0u) << message;
  setenv("LORS_SPARSE_PRODUCT", "always", 1);
  take(request(problem));
  EXPECT_EQ(message, "LORS_SPARSE_PRODUCT is 'always'; it must be auto, dense or sparse.");
  setenv("LORS_SPARSE_PRODUCT", "", 1);
  take(request(problem));
  EXPECT_EQ(message, "");
}

TEST_F(ProductChoiceTest, WhereItCannotServeAutoIsDenseAndSparseSaysWhy) {
  struct Case {
    Problem problem;
    const char* why;
  };
  for (const Case& c : {Case{{32, 64, 12, DType::bfloat16, false, 1}, "tokens in multiples of 8"},
                        Case{{24, 64, 8, DType::bfloat16, false, 1}, "out_features in multiples of 16"}}) {
    EXPECT_FALSE(take(request(c.problem)));
    EXPECT_EQ(message, "");
    EXPECT_FALSE(take(request(c.problem, "sparse")));
    EXPECT_NE(message.find(c.why), std::string::npos) << message;
    EXPECT_NE(message.find("products is 'sparse', but"), std::string::npos);
  }
  ProductRequest shifted = request(problem);
  shifted.activation = static_cast<const char*>(shifted.activation) + 2;
  EXPECT_FALSE(take(shifted));
  EXPECT_TRUE(choices.all().empty());
  shifted.products = "sparse";
  EXPECT_FALSE(take(shifted));
  EXPECT_NE(message.find("multiple of 16 bytes"), std::string::npos) << message;
}

// As a second thread would, while the first one measures: it neither waits nor measures.
TEST_F(ProductChoiceTest, WhoMeetsAKindThatIsBeingMeasuredTakesTheDenseWay) {
  const fake::Setting cost("MILLISECONDS", "0.1");
  const ProductRequest r = request(problem);
  const ProductWays plain = ways(r);
  int meetings = 0;
  ProductWays meeting = plain;
  meeting.sparse = [&] {
    if (meetings++ == 0) {
      const int before = sparse_runs;
      EXPECT_TRUE(choices.take(r, plain, fake::host()).ok());
      EXPECT_EQ(sparse_runs, before);
    }
    return plain.sparse();
  };
  EXPECT_TRUE(choices.take(r, meeting, fake::host()).ok());
  EXPECT_GT(meetings, 1);
  EXPECT_EQ(choices.all().size(), 1u);
  EXPECT_EQ(sparse.plans().searches, 1);
}

TEST_F(ProductChoiceTest, AFailureDuringTheMeasurementLeavesTheDenseWayAndAReason) {
  for (const std::string name : {"MatmulSearch", "MatmulPlanInit", "Matmul", "SpMMACompress2"}) {
    choices.clear();
    sparse.clear();
    {
      const fake::Setting fails("FAIL", name);
      take(request(problem));
    }
    EXPECT_EQ(message, "");
    ASSERT_EQ(choices.all().size(), 1u);
    EXPECT_FALSE(choices.all()[0].second.sparse);
    EXPECT_NE(choices.all()[0].second.note.find("cusparseLt" + name), std::string::npos) << choices.all()[0].second.note;
    EXPECT_FALSE(take(request(problem))) << "not tried again";
    EXPECT_FALSE(take(request(problem, "sparse")));
    EXPECT_NE(message.find(name), std::string::npos) << message;
  }
}

TEST_F(ProductChoiceTest, OutOfMemoryDuringTheMeasurementDecidesNothing) {
  const fake::Setting cost("MILLISECONDS", "0.1");
  fake::device.out_of_memory = true;
  take(request(problem));
  EXPECT_EQ(message, "");
  EXPECT_EQ(dense_runs, 2) << "the output is the dense one's again";
  EXPECT_THROW(take(request(problem, "sparse")), std::runtime_error);
  EXPECT_TRUE(choices.all().empty());
  fake::device.out_of_memory = false;
  EXPECT_TRUE(take(request(problem)));
  EXPECT_TRUE(choices.all().at(0).second.sparse);
}

TEST_F(ProductChoiceTest, AWrongProductIsNeverUsed) {
  const fake::Setting wrong("WRONG", "1");
  for (const char* products : {"auto", "sparse"}) {
    choices.clear();
    take(request(problem, products));
    EXPECT_EQ(message.empty(), products == std::string("auto"));
    ASSERT_EQ(choices.all().size(), 1u);
    EXPECT_FALSE(choices.all()[0].second.sparse);
    EXPECT_NE(choices.all()[0].second.note.find("by more than rounding"), std::string::npos);
  }
}

// Gradients in float16 may be so small that only their last bits are left: two roundings of them are far apart, and right.
TEST_F(ProductChoiceTest, TinyResultsAreNoDisagreement) {
  Problem tiny(32, 64, 16, DType::float16, false, 5);
  for (uint16_t& x : tiny.X) x = fake::narrow(fake::widen(x, tiny.dtype) * 0x1p-22, tiny.dtype);
  const fake::Setting cost("MILLISECONDS", "0.1");
  dense_flip = 1;
  EXPECT_TRUE(take(request(tiny)));
  EXPECT_EQ(choices.all().at(0).second.note, "");
  dense_flip = 8;  // but more than the last bit is one
  choices.clear();
  const ProductRequest r = request(tiny);
  EXPECT_TRUE(choices.take(r, ways(r), fake::host()).ok());
  EXPECT_NE(choices.all().at(0).second.note, "");
}

// The dense one stops at 65504, the sparse one rounds up to infinity; but infinity is no rounding of a small number.
TEST_F(ProductChoiceTest, OverflowOfOneAtTheEdgeIsNoDisagreement) {
  Problem edge(32, 64, 16, DType::float16, true, 5);
  std::fill(edge.X.begin(), edge.X.end(), fake::narrow(0.25, edge.dtype));
  std::fill(edge.W.begin(), edge.W.end(), uint16_t{0});
  for (int64_t n = 0; n < edge.N; ++n) {
    edge.W[n * edge.K] = fake::narrow(1, edge.dtype);
    edge.X[n % edge.T * edge.K] = fake::narrow(4, edge.dtype);
  }
  edge.W[0] = fake::narrow(16384, edge.dtype);
  edge.W[1] = fake::narrow(96, edge.dtype);  // 65536 - 12: with 0.25 above the largest, below the next
  edge.X[1] = fake::narrow(-0.125, edge.dtype);
  const fake::Setting cost("MILLISECONDS", "0.1");
  EXPECT_TRUE(take(request(edge)));
  EXPECT_EQ(choices.all().at(0).second.note, "");
  choices.clear();
  ProductRequest r = request(edge);
  ProductWays wrong = ways(r);
  const auto dense = wrong.dense;
  wrong.dense = [&] {
    const Status s = dense();
    static_cast<uint16_t*>(const_cast<void*>(r.output))[0] = fake::narrow(60000, edge.dtype);
    return s;
  };
  EXPECT_TRUE(choices.take(r, wrong, fake::host()).ok());
  EXPECT_NE(choices.all().at(0).second.note, "");
}

TEST_F(ProductChoiceTest, AResultThatShowsNothingDecidesNothing) {
  const fake::Setting cost("MILLISECONDS", "0.1"), wrong("WRONG", "1");
  for (const uint16_t activation : {uint16_t{0}, uint16_t{0x7fc0}}) {  // zeros and NaN
    Problem silent = problem;
    std::fill(silent.X.begin(), silent.X.end(), activation);
    for (const char* products : {"auto", "sparse"}) {
      for (const bool bias : {false, true}) {
        ProductRequest r = request(silent, products);
        r.key.bias = bias;
        ProductWays both = ways(r);
        both.dense = [&] {
          ++dense_runs;
          for (int64_t i = 0; i < silent.T * silent.N; ++i)
            static_cast<uint16_t*>(const_cast<void*>(r.output))[i] = activation ? activation
                                                                     : bias     ? fake::narrow(1 + i % silent.N, silent.dtype)
                                                                                : 0;
          return Status();
        };
        dense_runs = 0;
        EXPECT_EQ(choices.take(r, both, fake::host()).message(), "");
        EXPECT_EQ(dense_runs, 1);
      }
    }
    EXPECT_EQ(sparse_runs, 0);
  }
  EXPECT_TRUE(choices.all().empty());
  take(request(problem, "sparse"));
  EXPECT_NE(message.find("by more than rounding"), std::string::npos) << "nor was it taken as compared";
}

TEST_F(ProductChoiceTest, ALoadedChoiceIsComparedOnce) {
  const ProductChoice loaded{true, 2, 1, ""};
  for (const char* products : {"auto", "sparse"}) {
    choices.clear();
    choices.set(request(problem).key, loaded);
    EXPECT_TRUE(take(request(problem, products)));
    EXPECT_EQ(dense_runs, 1);
    EXPECT_TRUE(take(request(problem, products)));
    EXPECT_EQ(dense_runs, 0);
    EXPECT_EQ(choices.all().at(0).second.sparse_us, 1) << "and not timed again";
    choices.set(request(problem).key, loaded);
    const fake::Setting wrong("WRONG", "1");
    take(request(problem, products));
    EXPECT_EQ(message.empty(), products == std::string("auto"));
    EXPECT_NE(choices.all().at(0).second.note.find("by more than rounding"), std::string::npos);
  }
}

TEST_F(ProductChoiceTest, ForcedWhileAnotherMeasuresIsComparedToo) {
  const fake::Setting wrong("WRONG", "1");
  const ProductRequest r = request(problem), forced = [&] {
    ProductRequest made = r;
    made.products = "sparse";
    return made;
  }();
  const ProductWays plain = ways(r);
  ProductWays meeting = plain;
  std::string refused;
  meeting.sparse = [&] {
    refused = choices.take(forced, plain, fake::host()).message();
    return plain.sparse();
  };
  EXPECT_TRUE(choices.take(r, meeting, fake::host()).ok());
  EXPECT_NE(refused.find("by more than rounding"), std::string::npos) << refused;
}

TEST_F(ProductChoiceTest, WithoutTokensThereIsNothingToChoose) {
  const Problem empty(32, 64, 0, DType::bfloat16, true, 3);
  for (const char* products : {"auto", "sparse"}) {
    EXPECT_FALSE(take(request(empty, products)));
    EXPECT_EQ(message, "");
    EXPECT_EQ(dense_runs, 1);
  }
}

TEST_F(ProductChoiceTest, NothingIsMeasuredUnderCapture) {
  const fake::Setting cost("MILLISECONDS", "0.1");
  fake::device.stream.capturing = true;
  EXPECT_FALSE(take(request(problem)));
  EXPECT_TRUE(choices.all().empty());
  EXPECT_FALSE(take(request(problem, "sparse")));
  EXPECT_NE(message.find("run it once before the capture"), std::string::npos) << message;
  fake::device.stream.capturing = false;
  take(request(problem));
  fake::device.stream.capturing = true;
  const int waits = fake::device.stream.waits;
  EXPECT_TRUE(take(request(problem)));
  EXPECT_EQ(fake::device.stream.waits, waits);
  EXPECT_EQ(fake::calls(kAbi, "MatmulSearch") > 0, true);
  fake::device.stream.capturing = false;
  // A choice that was loaded, without a plan yet: dense under capture, sparse before.
  ProductKey key = request(problem).key;
  key.bias = true;
  choices.set(key, {true, 2, 1, ""});
  SparseProducts other(library, 4);
  ProductChoices fresh(other);
  fresh.set(request(problem).key, {true, 2, 1, ""});
  fake::device.stream.capturing = true;
  const ProductRequest r = request(problem);
  const int before = sparse_runs;
  EXPECT_TRUE(fresh.take(r, ways(r), fake::host()).ok());
  EXPECT_EQ(sparse_runs, before);
}

TEST_F(ProductChoiceTest, EveryPartOfTheKeyIsMeasuredByItself) {
  const fake::Setting cost("MILLISECONDS", "0.1");
  for (const bool in_place : {false, true})
    for (const bool bias : {false, true}) {
      ProductRequest r = request(problem);
      r.key.in_place = in_place;
      r.key.bias = bias;
      take(r);
    }
  EXPECT_EQ(choices.all().size(), 4u);
  EXPECT_EQ(sparse.plans().searches, 1) << "the plan is the same";
}

TEST_F(ProductChoiceTest, OnlySoManyTokenCountsOfOneShape) {
  const fake::Setting cost("MILLISECONDS", "0.1");
  for (int i = 1; i <= ProductChoices::kTokenCounts + 2; ++i) {
    const Problem other(32, 64, 8 * i, DType::bfloat16, false, i);
    take(request(other));
    ASSERT_EQ(message, "");
    EXPECT_EQ(take(request(other)), i <= ProductChoices::kTokenCounts) << i;
  }
  EXPECT_EQ(choices.all().size(), static_cast<size_t>(ProductChoices::kTokenCounts));
  const Problem another(48, 64, 8, DType::bfloat16, false, 1);
  take(request(another));
  EXPECT_TRUE(take(request(another))) << "of another shape";
  const Problem long_one(32, 64, 160, DType::bfloat16, false, 1);
  EXPECT_TRUE(take(request(long_one, "sparse"))) << "where it is asked for, every one";
}

}  // namespace
}  // namespace lors
