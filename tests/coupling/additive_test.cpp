// SPDX-License-Identifier: MIT

#include "../support/invertible_suite.h"
#include "../support/modules.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/coupling/additive.h>
#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace memcnn_test {

using testing::HasSubstr;

struct AdditiveConv {
  static constexpr const char* kName = "Conv";
  static constexpr const char* kReference = "additive";
  static auto make() {
    return memcnn::AdditiveCoupling(ConvBranch(2), ConvBranch(2));
  }
  static std::vector<int64_t> shape() {
    return {2, 4, 3, 3};
  }
  static std::string printed() {
    return "memcnn::AdditiveCoupling(split_dim=1)";
  }
};

/// Five channels: F maps the second half, of two, to the size of the first.
struct AdditiveUnequal {
  static constexpr const char* kName = "UnequalHalves";
  static auto make() {
    return memcnn::AdditiveCoupling(SmoothBranch(2, 3), SmoothBranch(3, 2));
  }
  static std::vector<int64_t> shape() {
    return {2, 5, 3, 3};
  }
  static std::string printed() {
    return "memcnn::AdditiveCoupling(split_dim=1)";
  }
};

struct AdditiveLastDim {
  static constexpr const char* kName = "LastDim";
  static auto make() {
    return memcnn::AdditiveCoupling(
        LinearBranch(3),
        LinearBranch(3),
        memcnn::CouplingOptions().split_dim(-1));
  }
  static std::vector<int64_t> shape() {
    return {2, 3, 6};
  }
  static std::string printed() {
    return "memcnn::AdditiveCoupling(split_dim=-1)";
  }
};

/// The two kinds of holder that are no ModuleHolder of a fixed forward.
struct AdditiveContainers {
  static constexpr const char* kName = "SequentialAndAnyModule";
  static auto make() {
    torch::nn::Sequential f(
        {{"wide", torch::nn::AnyModule(SmoothBranch(2, 3))},
         {"narrow", torch::nn::AnyModule(SmoothBranch(3, 2))}});
    return memcnn::AdditiveCoupling(f, torch::nn::AnyModule(SmoothBranch(2)));
  }
  static std::vector<int64_t> shape() {
    return {2, 4, 3, 3};
  }
  static std::string printed() {
    return "memcnn::AdditiveCoupling(split_dim=1)";
  }
};

/// One module in both places.
struct AdditiveShared {
  static constexpr const char* kName = "OneBranch";
  static auto make() {
    SmoothBranch branch(2);
    return memcnn::AdditiveCoupling(branch, branch);
  }
  static std::vector<int64_t> shape() {
    return {2, 4, 3, 3};
  }
  static std::string printed() {
    return "memcnn::AdditiveCoupling(split_dim=1)";
  }
};

MEMCNN_INVERTIBLE_SUITE(
    AdditiveCoupling,
    AdditiveConv,
    AdditiveUnequal,
    AdditiveLastDim,
    AdditiveContainers,
    AdditiveShared);
MEMCNN_REFERENCE_SUITE(AdditiveCoupling, AdditiveConv);

namespace {

/// Multiplies by a constant.
struct TimesImpl final : torch::nn::Cloneable<TimesImpl> {
  explicit TimesImpl(double factor_) : factor(factor_) {}
  void reset() override {}
  torch::Tensor forward(torch::Tensor x) {
    return x * factor;
  }
  double factor;
};
TORCH_MODULE(Times);

class AdditiveCoupling : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }
};

TEST_F(AdditiveCoupling, ForwardAndInverseFollowTheFormula) {
  memcnn::AdditiveCoupling coupling(Times(10), Times(100));
  const torch::Tensor x = torch::tensor({{1., 2.}, {3., 4.}});
  // y1 = x1 + 10 x2, y2 = x2 + 100 y1
  const torch::Tensor y = torch::tensor({{21., 2102.}, {43., 4304.}});
  EXPECT_TRUE(coupling(x).equal(y));
  EXPECT_TRUE(coupling->inverse(y).equal(x));
}

TEST_F(AdditiveCoupling, LeavesItsInputAsItIs) {
  memcnn::AdditiveCoupling coupling(Times(10), Times(100));
  const torch::NoGradGuard no_grad;
  const torch::Tensor x = torch::randn({2, 4});
  const torch::Tensor copy = x.clone();
  coupling(x);
  EXPECT_TRUE(x.equal(copy));
  coupling->inverse(x);
  EXPECT_TRUE(x.equal(copy));
}

TEST_F(AdditiveCoupling, OddSizeMakesTheFirstHalfLarger) {
  memcnn::AdditiveCoupling coupling(
      torch::nn::Linear(2, 3), torch::nn::Linear(3, 2));
  coupling->to(torch::kDouble);
  const torch::NoGradGuard no_grad;
  const torch::Tensor x = torch::randn({4, 5}, torch::kDouble);
  const auto halves = x.chunk(2, 1);
  ASSERT_EQ(halves[0].size(1), 3);
  const torch::Tensor y1 = halves[0] + coupling->f->forward(halves[1]);
  const torch::Tensor y2 = halves[1] + coupling->g->forward(y1);
  EXPECT_LT(
      relative_error(coupling(x), torch::cat({y1, y2}, 1)), kRoundTripFloat64);
}

TEST_F(AdditiveCoupling, SplitsAlongAnyDimension) {
  const torch::NoGradGuard no_grad;
  const torch::Tensor x = torch::randn({2, 3, 4, 6}, torch::kDouble);
  memcnn::AdditiveCoupling channels(Times(2), Times(3));
  // Along dimension d the result is that along dimension 1 of the tensor with
  // both dimensions swapped.
  for (const int64_t dim : {0, 2, 3, -1, -2, -4}) {
    memcnn::AdditiveCoupling coupling(
        Times(2), Times(3), memcnn::CouplingOptions().split_dim(dim));
    const torch::Tensor y = coupling(x);
    EXPECT_TRUE(y.equal(channels(x.transpose(1, dim)).transpose(1, dim)))
        << dim;
    EXPECT_LT(relative_error(coupling->inverse(y), x), kRoundTripFloat64)
        << dim;
  }
}

TEST_F(AdditiveCoupling, WithoutGCopiesFDeeply) {
  ConvBranch f(2);
  memcnn::AdditiveCoupling coupling(f);
  EXPECT_EQ(coupling->f.ptr(), f.ptr());
  EXPECT_NE(coupling->g.ptr(), f.ptr());
  EXPECT_NE(coupling->g->conv.ptr(), f->conv.ptr());
  EXPECT_FALSE(coupling->g->conv->weight.is_same(f->conv->weight));
  EXPECT_TRUE(all_equal(coupling->g->parameters(), f->parameters()));
  EXPECT_EQ(coupling->parameters().size(), 2 * f->parameters().size());

  f->eval();
  memcnn::AdditiveCoupling along_rows(
      f, memcnn::CouplingOptions().split_dim(2));
  EXPECT_EQ(along_rows->options().split_dim(), 2);
  static_assert(
      std::is_same_v<
          decltype(along_rows->options()),
          const memcnn::CouplingOptions&>,
      "options are fixed at construction");
  EXPECT_FALSE(along_rows->g->is_training());
  EXPECT_FALSE(along_rows->g->norm->is_training());

  // A container, whose own clone() does not keep the mode.
  torch::nn::Sequential container(SmoothBranch(2));
  container->eval();
  EXPECT_FALSE(memcnn::AdditiveCoupling(container)->g->is_training());
}

TEST_F(AdditiveCoupling, ChildrenAreNamedAsInMemCNN) {
  memcnn::AdditiveCoupling coupling(ConvBranch(2), SmoothBranch(2));
  const auto children = coupling->named_children();
  EXPECT_EQ(children.keys(), (std::vector<std::string>{"Fm", "Gm"}));
  EXPECT_EQ(children["Fm"], coupling->f.ptr());
  EXPECT_EQ(children["Gm"], coupling->g.ptr());
}

TEST_F(AdditiveCoupling, OneModuleAsBothBranchesHasItsParametersOnce) {
  SmoothBranch branch(2);
  memcnn::AdditiveCoupling coupling(branch, branch);
  EXPECT_EQ(coupling->parameters().size(), branch->parameters().size());
  EXPECT_EQ(coupling->children().size(), 1u);

  const auto copy =
      std::dynamic_pointer_cast<decltype(coupling)::Impl>(coupling->clone());
  ASSERT_NE(copy, nullptr);
  EXPECT_EQ(copy->f.ptr(), copy->g.ptr());
  EXPECT_NE(copy->f.ptr(), branch.ptr());
}

TEST_F(AdditiveCoupling, AnyModuleAndTypedBranchesAgree) {
  SmoothBranch f(2);
  SmoothBranch g(2);
  const torch::NoGradGuard no_grad;
  const torch::Tensor x = torch::randn({2, 4, 3, 3});
  const torch::Tensor y = memcnn::AdditiveCoupling(f, g)(x);
  using torch::nn::AnyModule;
  EXPECT_TRUE(memcnn::AdditiveCoupling(AnyModule(f), AnyModule(g))(x).equal(y));
  EXPECT_TRUE(memcnn::AdditiveCoupling(
                  torch::nn::Sequential(f), torch::nn::Sequential(g))(x)
                  .equal(y));
}

TEST_F(AdditiveCoupling, CloneKeepsTheKeysOfANamedSequential) {
  auto coupling = AdditiveContainers::make();
  const auto keys = coupling->named_parameters().keys();
  ASSERT_EQ(keys.front(), "Fm.wide.conv.weight");
  EXPECT_EQ(coupling->clone()->named_parameters().keys(), keys);
}

/// Clones into a copy that shares its child, as Cloneable does where reset()
/// registers what the constructor got.
struct SharingImpl final : torch::nn::Cloneable<SharingImpl> {
  explicit SharingImpl(torch::nn::Linear inner_) : inner(std::move(inner_)) {
    reset();
  }
  void reset() override {
    register_module("inner", inner);
  }
  torch::Tensor forward(torch::Tensor x) {
    return inner(x);
  }
  torch::nn::Linear inner;
};
TORCH_MODULE(Sharing);

struct NotCloneableImpl final : torch::nn::Module {
  torch::Tensor forward(torch::Tensor x) {
    return x * 2;
  }
};
TORCH_MODULE(NotCloneable);

TEST_F(AdditiveCoupling, CloneStopsAtABranchThatCannotBeCloned) {
  memcnn::AdditiveCoupling coupling{NotCloneable(), NotCloneable()};
  EXPECT_THAT(
      [&] { coupling->clone(); },
      ThrowsError<c10::Error>(HasSubstr("clone()"), HasSubstr("NotCloneable")));
  EXPECT_THROW(memcnn::AdditiveCoupling copied{NotCloneable()}, c10::Error);
}

TEST_F(AdditiveCoupling, CloneStopsAtABranchWhoseCloneWouldShare) {
  memcnn::AdditiveCoupling coupling(
      Sharing(torch::nn::Linear(2, 2)), Sharing(torch::nn::Linear(2, 2)));
  EXPECT_THAT(
      [&] { coupling->clone(); },
      ThrowsError<c10::Error>(
          HasSubstr("memcnn: expected clone() of"),
          HasSubstr("Sharing"),
          HasSubstr("shared with the original"),
          HasSubstr("torch::nn::Cloneable")));
}

// Bad input. Both couplings share these checks.

TEST_F(AdditiveCoupling, RejectsHalvesThatFDoesNotFit) {
  // Three channels, and F maps the half of one to one, not to two.
  memcnn::AdditiveCoupling coupling(Times(1), Times(1));
  const auto call = [&] {
    coupling(torch::ones({2, 3, 5, 5}));
  };
  EXPECT_THAT(
      call,
      ThrowsError<c10::ValueError>(
          HasSubstr("AdditiveCoupling::forward(): expected F to return the "
                    "sizes [2, 2, 5, 5] of the half that it updates, but got "
                    "sizes [2, 1, 5, 5]"),
          HasSubstr("for an argument of sizes [2, 1, 5, 5] (split_dim 1)"),
          HasSubstr("Give an even size in that dim")));
  EXPECT_THAT(
      [&] {
        coupling->inverse(torch::ones({2, 3, 5, 5}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("AdditiveCoupling::inverse(): expected G to return the "
                    "sizes [2, 1, 5, 5]")));
}

TEST_F(AdditiveCoupling, RejectsABroadcastValue) {
  // A value that could be added, but is not of the half's sizes.
  struct MeanImpl : torch::nn::Cloneable<MeanImpl> {
    void reset() override {}
    torch::Tensor forward(torch::Tensor x) {
      return x.mean({1}, /*keepdim=*/true);
    }
  };
  using Mean = torch::nn::ModuleHolder<MeanImpl>;
  memcnn::AdditiveCoupling coupling(
      Mean(std::make_shared<MeanImpl>()), Times(1));
  EXPECT_THROW(coupling(torch::ones({2, 4})), c10::ValueError);
}

TEST_F(AdditiveCoupling, RejectsAMissingDimension) {
  memcnn::AdditiveCoupling coupling(
      Times(1), Times(1), memcnn::CouplingOptions().split_dim(-3));
  EXPECT_THAT(
      [&] {
        coupling(torch::ones({2, 4}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("AdditiveCoupling::forward(): expected an input with a dim "
                    "-3 to split, but got sizes [2, 4], Float, cpu"),
          HasSubstr("CouplingOptions().split_dim()")));
}

TEST_F(AdditiveCoupling, RejectsASizeThatCannotBeSplit) {
  memcnn::AdditiveCoupling coupling(Times(1), Times(1));
  for (const int64_t channels : {0, 1}) {
    const auto call = [&] {
      coupling(torch::ones({2, channels, 5}));
    };
    EXPECT_THAT(
        call,
        ThrowsError<c10::ValueError>(
            HasSubstr("expected at least 2 entries in dim 1 to split into two "
                      "halves, but got "),
            HasSubstr("input sizes [2, ")));
  }
}

TEST_F(AdditiveCoupling, RejectsAnUndefinedTensor) {
  memcnn::AdditiveCoupling coupling(Times(1), Times(1));
  EXPECT_THAT(
      [&] { coupling(torch::Tensor()); },
      ThrowsError<c10::ValueError>(
          HasSubstr("AdditiveCoupling::forward(): expected a tensor, but got "
                    "an undefined one")));
}

TEST_F(AdditiveCoupling, RejectsAWiderDtypeFromABranch) {
  struct WidensImpl : torch::nn::Cloneable<WidensImpl> {
    void reset() override {}
    torch::Tensor forward(torch::Tensor x) {
      return x.to(torch::kDouble);
    }
  };
  using Widens = torch::nn::ModuleHolder<WidensImpl>;
  memcnn::AdditiveCoupling coupling(
      Times(1), Widens(std::make_shared<WidensImpl>()));
  EXPECT_THAT(
      [&] {
        coupling(torch::ones({2, 4}));
      },
      ThrowsError<c10::TypeError>(
          HasSubstr("AdditiveCoupling::forward(): expected G to return no "
                    "wider dtype than its input's Float, but got Double")));
}

TEST_F(AdditiveCoupling, RejectsABranchThatChangesItsArgument) {
  struct InPlaceImpl : torch::nn::Cloneable<InPlaceImpl> {
    void reset() override {}
    torch::Tensor forward(torch::Tensor x) {
      return x.relu_();
    }
  };
  using InPlace = torch::nn::ModuleHolder<InPlaceImpl>;
  memcnn::AdditiveCoupling coupling(
      InPlace(std::make_shared<InPlaceImpl>()), Times(1));
  EXPECT_THAT(
      [&] {
        coupling(torch::ones({2, 4}));
      },
      ThrowsError<c10::Error>(
          HasSubstr("AdditiveCoupling::forward(): expected F to leave its "
                    "argument as it is, but got a change in place")));
}

TEST_F(AdditiveCoupling, NamesTheBranchThatFails) {
  memcnn::AdditiveCoupling coupling(
      torch::nn::Linear(7, 7), torch::nn::Linear(2, 2));
  EXPECT_THAT(
      [&] {
        coupling(torch::ones({3, 4}));
      },
      ThrowsError<c10::Error>(
          HasSubstr("in F of AdditiveCoupling::forward(): argument sizes [3, "
                    "2], Float, cpu, split_dim 1")));
}

} // namespace
} // namespace memcnn_test
