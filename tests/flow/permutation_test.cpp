// SPDX-License-Identifier: MIT
//
// Permutation and SwapHalves.

#include "../support/invertible_suite.h"
#include "../support/modules.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/allocation_meter.h>
#include <memcnn/coupling/additive.h>
#include <memcnn/flow/permutation.h>
#include <memcnn/sequence.h>
#include <torch/torch.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace memcnn_test {

using testing::HasSubstr;

struct PermutationOfChannels {
  static constexpr const char* kName = "Channels";
  static constexpr bool kUsesAutocast = false;
  static auto make() {
    return memcnn::Permutation({2, 4, 3, 0, 1});
  }
  static std::vector<int64_t> shape() {
    return {2, 5, 3, 3};
  }
  static std::string printed() {
    return "memcnn::Permutation(channels=5, dim=1)";
  }
};

struct PermutationOfLastDim {
  static constexpr const char* kName = "LastDim";
  static constexpr bool kUsesAutocast = false;
  static auto make() {
    return memcnn::Permutation(6, memcnn::PermutationOptions().dim(-1));
  }
  static std::vector<int64_t> shape() {
    return {2, 3, 6};
  }
  static std::string printed() {
    return "memcnn::Permutation(channels=6, dim=-1)";
  }
};

MEMCNN_INVERTIBLE_SUITE(
    Permutation,
    PermutationOfChannels,
    PermutationOfLastDim);

struct SwapChannels {
  static constexpr const char* kName = "Channels";
  static constexpr bool kUsesAutocast = false;
  static auto make() {
    return memcnn::SwapHalves();
  }
  static std::vector<int64_t> shape() {
    return {2, 4, 3, 3};
  }
  static std::string printed() {
    return "memcnn::SwapHalves(split_dim=1)";
  }
};

struct SwapLastDim {
  static constexpr const char* kName = "LastDim";
  static constexpr bool kUsesAutocast = false;
  static auto make() {
    return memcnn::SwapHalves(memcnn::SwapHalvesOptions().split_dim(-1));
  }
  static std::vector<int64_t> shape() {
    return {2, 3, 6};
  }
  static std::string printed() {
    return "memcnn::SwapHalves(split_dim=-1)";
  }
};

MEMCNN_INVERTIBLE_SUITE(SwapHalves, SwapChannels, SwapLastDim);

namespace {

using Tensors = std::vector<torch::Tensor>;

TEST(Permutation, TakesEntriesInTheOrderOfItsIndices) {
  const torch::Tensor x = torch::tensor({{10.f, 11.f, 12.f}});
  memcnn::Permutation permutation({2, 0, 1});
  const torch::Tensor y = torch::tensor({{12.f, 10.f, 11.f}});
  EXPECT_TRUE(permutation(x).equal(y));
  EXPECT_TRUE(permutation->inverse(y).equal(x));
}

TEST(Permutation, IsDrawnOnceFromTheDefaultGenerator) {
  torch::manual_seed(3);
  memcnn::Permutation first(20);
  memcnn::Permutation second(20);
  torch::manual_seed(3);
  EXPECT_TRUE(memcnn::Permutation(20)->permutation.equal(first->permutation));
  EXPECT_FALSE(second->permutation.equal(first->permutation));
  EXPECT_TRUE(std::get<0>(first->permutation.sort())
                  .equal(torch::arange(20, torch::kLong)));

  const auto state = at::globalContext().defaultGenerator(torch::kCPU);
  const torch::Tensor before = state.get_state();
  first->clone();
  EXPECT_TRUE(state.get_state().equal(before)) << "clone() drew";
}

TEST(Permutation, IsSaved) {
  torch::manual_seed(1);
  memcnn::Permutation saved(20);
  memcnn::Permutation loaded(20);
  ASSERT_FALSE(loaded->permutation.equal(saved->permutation));
  std::stringstream stream;
  torch::save(saved, stream);
  torch::load(loaded, stream);
  const torch::Tensor x = torch::randn({2, 20});
  EXPECT_TRUE(loaded(x).equal(saved(x)));
}

// bfloat16 has no 257.
TEST(Permutation, KeepsItsIndicesInNarrowDtypes) {
  torch::manual_seed(1);
  torch::nn::Sequential model(memcnn::Permutation(1000));
  const torch::Tensor x = torch::randn({2, 1000}).to(torch::kBFloat16);
  const torch::Tensor y = model->forward(x);
  model->to(torch::kBFloat16);
  EXPECT_TRUE(model->forward(x).equal(y));
  model->to(torch::kCPU, torch::kHalf);
  EXPECT_TRUE(model->forward(x).equal(y));
}

TEST(Permutation, KeepsTheMemoryFormat) {
  constexpr auto kChannelsLast = torch::MemoryFormat::ChannelsLast;
  const torch::Tensor x = torch::randn({2, 4, 3, 3}).contiguous(kChannelsLast);
  EXPECT_TRUE(memcnn::Permutation(4)(x).is_contiguous(kChannelsLast));
  EXPECT_TRUE(memcnn::SwapHalves()(x).is_contiguous(kChannelsLast));
}

TEST(Permutation, RejectsWhatIsNone) {
  for (const auto& indices :
       std::vector<std::vector<int64_t>>{{0, 0, 2}, {0, 1, 3}, {-1, 0, 1}}) {
    EXPECT_THAT(
        [&] { memcnn::Permutation permutation(indices); },
        ThrowsError<c10::ValueError>(
            HasSubstr("Permutation::Permutation(): expected each index from 0 "
                      "to 2 once, but got")));
  }
  EXPECT_THAT(
      [] { memcnn::Permutation permutation(0); },
      ThrowsError<c10::ValueError>(
          HasSubstr("Permutation::Permutation(): expected a number of channels "
                    "above 0, but got 0")));
}

TEST(Permutation, RejectsOtherInputs) {
  EXPECT_THAT(
      [] {
        memcnn::Permutation(4)(torch::ones({2, 5, 3}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("Permutation::forward(): expected 4 entries in dim 1, but "
                    "got sizes [2, 5, 3]")));
  const std::string no_dim =
      "Permutation::forward(): expected an input with a dim ";
  for (const int64_t dim : {0, -3, 3}) {
    EXPECT_THAT(
        [&] {
          memcnn::Permutation(
              4, memcnn::PermutationOptions().dim(dim))(torch::ones({4, 4, 4}));
        },
        ThrowsError<c10::ValueError>(HasSubstr(
            no_dim + std::to_string(dim) + " that is not the samples', 0")));
  }
}

TEST(SwapHalves, ExchangesTheHalves) {
  const torch::Tensor x = torch::tensor({{1.f, 2.f, 3.f, 4.f}});
  const torch::Tensor y = torch::tensor({{3.f, 4.f, 1.f, 2.f}});
  EXPECT_TRUE(memcnn::SwapHalves()(x).equal(y));
  EXPECT_TRUE(memcnn::SwapHalves()->inverse(y).equal(x));
}

TEST(SwapHalves, CopiesNothingBetweenCouplings) {
  memcnn::SwapHalves swap;
  memcnn::Invertible& block = *swap;
  const torch::Tensor a = torch::randn({2, 3});
  const torch::Tensor b = torch::randn({2, 3});
  memcnn::Recording off = memcnn::Recording::off();
  const Tensors halves = block.run(memcnn::Direction::kForward, {a, b}, off);
  ASSERT_EQ(halves.size(), 2u);
  EXPECT_TRUE(halves[0].is_same(b));
  EXPECT_TRUE(halves[1].is_same(a));

  torch::manual_seed(1);
  const auto peak = [](bool swaps) {
    memcnn::ReversibleSequence sequence(
        memcnn::AdditiveCoupling(SmoothBranch(4)));
    if (swaps) {
      sequence->push_back(memcnn::SwapHalves());
    }
    sequence->push_back(memcnn::AdditiveCoupling(SmoothBranch(4)));
    const torch::Tensor x = leaf({2, 8, 16, 16}, torch::kFloat);
    const memcnn::AllocationMeter meter;
    sequence(x).sum().backward();
    return meter.peak_bytes();
  };
  EXPECT_EQ(peak(true), peak(false));
}

TEST(SwapHalves, RejectsAnOddSize) {
  EXPECT_THAT(
      [] {
        memcnn::SwapHalves()(torch::ones({2, 5}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr(
              "SwapHalves::forward(): expected an even size in dim 1, but "
              "got 5"),
          HasSubstr("use a Permutation")));
  torch::manual_seed(1);
  memcnn::ReversibleSequence sequence(
      memcnn::AdditiveCoupling(SmoothBranch(2, 3), SmoothBranch(3, 2)),
      memcnn::SwapHalves());
  EXPECT_THAT(
      [&] {
        sequence(leaf({2, 5, 3, 3}, torch::kFloat));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("block 1 (SwapHalves)"),
          HasSubstr("expected an even size in dim 1, but got 5")));
}

} // namespace
} // namespace memcnn_test
