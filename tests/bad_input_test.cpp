// SPDX-License-Identifier: MIT
//
// What a library user can get wrong, and the wording of what they are told. The
// errors of the training program have tests of their own (tests/examples).

#include "support/modules.h"
#include "support/probes.h"
#include "support/throws_error.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

using testing::HasSubstr;
using testing::StrEq;

template <class Function>
torch::nn::Functional as_branch(Function function) {
  return torch::nn::Functional(std::move(function));
}

torch::nn::Functional identity() {
  return as_branch([](const torch::Tensor& x) { return x * 1; });
}

TEST(BadInput, OddChannelsWithoutAFittingF) {
  memcnn::AdditiveCoupling coupling(identity(), identity());
  EXPECT_THAT(
      [&] {
        coupling(torch::ones({2, 3, 5, 5}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("AdditiveCoupling::forward(): expected F to return the "
                    "sizes [2, 2, 5, 5] of the half that it updates, but got "
                    "sizes [2, 1, 5, 5]"),
          HasSubstr("Give an even size in that dim, or a branch that maps one "
                    "half to the sizes of the other.")));
  EXPECT_THROW(coupling(torch::ones({2, 3, 5, 5})), c10::ValueError);
}

TEST(BadInput, OddChannelsForAConvolution) {
  // F itself refuses them: its message is kept, and the place is added.
  memcnn::AdditiveCoupling coupling(ConvBranch(2), ConvBranch(2));
  EXPECT_THAT(
      [&] {
        coupling(torch::ones({2, 3, 5, 5}));
      },
      ThrowsError<c10::Error>(
          HasSubstr("channels"),
          HasSubstr("in F of AdditiveCoupling::forward(): argument sizes [2, "
                    "1, 5, 5]")));
}

TEST(BadInput, BranchThatChangesTheShape) {
  memcnn::AdditiveCoupling coupling(
      identity(),
      as_branch([](const torch::Tensor& x) { return x.flatten(1); }));
  EXPECT_THAT(
      [&] {
        coupling(torch::ones({2, 4, 3}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("AdditiveCoupling::forward(): expected G to return the "
                    "sizes [2, 2, 3]"),
          HasSubstr("but got sizes [2, 6]")));
  EXPECT_THAT(
      [&] {
        coupling->inverse(torch::ones({2, 4, 3}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "AdditiveCoupling::inverse(): expected G to return the sizes")));
}

TEST(BadInput, BranchThatWidensTheDtype) {
  memcnn::AdditiveCoupling coupling(
      as_branch([](const torch::Tensor& x) { return x.to(torch::kDouble); }),
      identity());
  EXPECT_THAT(
      [&] {
        coupling(torch::ones({2, 4}));
      },
      ThrowsError<c10::TypeError>(
          HasSubstr("expected F to return no wider dtype than its input's "
                    "Float, but got Double")));
}

TEST(BadInput, AdapterOfAnotherSplitDim) {
  const auto make = [](int64_t adapter_dim, int64_t coupling_dim) {
    const memcnn::CouplingOptions adapter =
        memcnn::CouplingOptions().split_dim(adapter_dim);
    memcnn::AffineCoupling coupling(
        memcnn::AffineAdapterSigmoid(identity(), adapter),
        memcnn::AffineAdapterSigmoid(identity(), adapter),
        memcnn::CouplingOptions().split_dim(coupling_dim));
  };
  EXPECT_NO_THROW(make(2, 2));
  EXPECT_THAT(
      [&] { make(1, 2); },
      ThrowsError<c10::ValueError>(
          HasSubstr("AffineCoupling::AffineCoupling(): expected the adapter F "
                    "to have the coupling's split_dim, but got 1 (coupling 2)"),
          HasSubstr("Give each coupling an adapter of its own, without "
                    "CouplingOptions: it takes its coupling's.")));
}

TEST(BadInput, AdapterWhoseFReturnsAnOddSize) {
  memcnn::AffineCoupling coupling{
      memcnn::AffineAdapterSigmoid{as_branch([](const torch::Tensor& x) {
        return torch::cat({x, x, x}, 1);
      })},
      memcnn::AffineAdapterSigmoid{identity()}};
  EXPECT_THAT(
      [&] {
        coupling(torch::ones({2, 2, 3}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("AffineAdapterSigmoid::forward(): expected f to return an "
                    "even size in dim 1"),
          HasSubstr("but got sizes [2, 3, 3]")));
}

TEST(BadInput, AdapterWhoseFReturnsTooFewChannels) {
  memcnn::AffineCoupling coupling{
      memcnn::AffineAdapterSigmoid{identity()},
      memcnn::AffineAdapterSigmoid{identity()}};
  EXPECT_THAT(
      [&] {
        coupling(torch::ones({2, 4, 3}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "AffineCoupling::forward(): expected F to return the sizes [2, 2, 3] "
          "of the half that it updates, but got sizes [2, 1, 3]")));
}

TEST(BadInput, IntegerTensor) {
  memcnn::AdditiveCoupling coupling(identity(), identity());
  memcnn::InvertibleModuleWrapper block(coupling);
  memcnn::ReversibleSequence sequence(coupling, coupling);
  const torch::Tensor x = torch::ones({2, 4}, torch::kLong);
  for (const auto& call : std::vector<std::function<void()>>{
           [&] { coupling(x); },
           [&] { block(x); },
           [&] {
             sequence(x);
           }}) {
    EXPECT_THAT(
        call,
        ThrowsError<c10::TypeError>(
            HasSubstr("AdditiveCoupling"),
            HasSubstr(": expected a tensor of floating point values, but got "
                      "sizes [2, 4], Long, cpu"),
            HasSubstr("Convert it with to(torch::kFloat).")));
  }
}

TEST(BadInput, UndefinedTensor) {
  memcnn::AdditiveCoupling coupling(ConvBranch(2), ConvBranch(2));
  memcnn::InvertibleModuleWrapper block(coupling);
  memcnn::ReversibleSequence sequence(coupling, coupling);
  EXPECT_THAT(
      [&] { coupling(torch::Tensor()); },
      ThrowsError<c10::ValueError>(
          HasSubstr("AdditiveCoupling::forward(): expected a tensor, but got "
                    "an undefined one")));
  EXPECT_THAT(
      [&] { block(torch::Tensor()); },
      ThrowsError<c10::ValueError>(
          HasSubstr("InvertibleModuleWrapper::forward(): expected tensors, but "
                    "got an undefined one")));
  EXPECT_THAT(
      [&] { sequence(torch::Tensor()); },
      ThrowsError<c10::ValueError>(
          HasSubstr("ReversibleSequence::forward(): expected tensors, but got "
                    "an undefined one")));
}

TEST(BadInput, SplitDimThatTheInputLacks) {
  memcnn::AdditiveCoupling coupling(
      identity(), identity(), memcnn::CouplingOptions().split_dim(2));
  EXPECT_THAT(
      [&] {
        coupling(torch::ones({2, 4}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr(
              "expected an input with a dim 2 to split, but got sizes [2, 4]"),
          HasSubstr("CouplingOptions().split_dim()")));
  memcnn::AdditiveCoupling channels(identity(), identity());
  EXPECT_THAT(
      [&] {
        channels(torch::ones({2, 1}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("expected at least 2 entries in dim 1 to split into two "
                    "halves, but got 1")));
}

/// An affine branch that multiplies by a fixed number.
struct ConstantScaleImpl final : torch::nn::Cloneable<ConstantScaleImpl> {
  explicit ConstantScaleImpl(double scale_) : scale(scale_) {}
  void reset() override {}
  memcnn::ScaleShift forward(torch::Tensor x) {
    return {torch::full_like(x, scale), x};
  }
  double scale;
};
TORCH_MODULE(ConstantScale);

TEST(BadInput, ZeroScaleInAnAffineInverse) {
  memcnn::AffineCoupling coupling{ConstantScale(0.), ConstantScale(1.)};
  const torch::Tensor y = coupling(torch::ones({2, 4}));
  EXPECT_THAT(
      [&] { coupling->inverse(y); },
      ThrowsError<c10::ValueError>(
          HasSubstr("AffineCoupling::inverse(): expected a scale without "
                    "zeros, but got one with 4"),
          HasSubstr("as AffineAdapterSigmoid does")));
  // Likewise where backward needs the inverse.
  memcnn::InvertibleModuleWrapper block(coupling);
  const torch::Tensor z = block(torch::ones({2, 4}).requires_grad_() * 1);
  EXPECT_THAT(
      [&] { z.sum().backward(); },
      ThrowsError<c10::ValueError>(
          HasSubstr("expected a scale without zeros")));
}

TEST(BadInput, ModuleWithoutInverseIsNotInvertible) {
  const auto report =
      memcnn::check_invertible_module(torch::nn::Linear(4, 4), {2, 4});
  EXPECT_FALSE(report.invertible);
  EXPECT_THAT(report.reason, HasSubstr("has no member inverse"));
}

torch::Tensor flat(const torch::Tensor& y) {
  return y.flatten();
}

torch::Tensor widened(const torch::Tensor& y) {
  return (y / 2).to(torch::kDouble);
}

torch::Tensor elsewhere(const torch::Tensor& y) {
  return (y / 2).to(torch::kMeta);
}

struct WrongInput {
  WrongInverseImpl::Map inverse;
  const char* got;
};

const WrongInput kWrongInputs[] = {
    {flat, "sizes [8], Float, cpu"},
    {widened, "sizes [2, 4], Double, cpu"},
    {elsewhere, "sizes [2, 4], Float, meta"}};

TEST(BadInput, InverseThatRebuildsAnotherInput) {
  for (const WrongInput& wrong : kWrongInputs) {
    memcnn::InvertibleModuleWrapper block{WrongInverse(wrong.inverse)};
    const torch::Tensor x = torch::ones({2, 4}).requires_grad_();
    const torch::Tensor y = block(x * 1);
    EXPECT_THAT(
        [&] { y.sum().backward(); },
        ThrowsError<c10::Error>(StrEq(
            std::string("memcnn_test::WrongInverseImpl::backward(): expected "
                        "inverse() to rebuild an input of sizes [2, 4], Float, "
                        "cpu, but got ") +
            wrong.got +
            ". Let it undo forward(); is_invertible_module() checks that.")));
  }
}

TEST(BadInput, InverseThatRebuildsAnotherInputInASequence) {
  for (const WrongInput& wrong : kWrongInputs) {
    memcnn::ReversibleSequence sequence(
        memcnn::AdditiveCoupling(identity(), identity()),
        WrongInverse(wrong.inverse),
        memcnn::AdditiveCoupling(identity(), identity()));
    const torch::Tensor y = sequence(torch::ones({2, 4}).requires_grad_() * 1);
    EXPECT_THAT(
        [&] { y.sum().backward(); },
        ThrowsError<c10::Error>(
            HasSubstr(
                "to rebuild an input of sizes [2, 4], Float, cpu, but "
                "got " +
                std::string(wrong.got)),
            HasSubstr("ReversibleSequence::backward(): block 1 (")));
  }
}

/// Its backward step returns what it is told for the input.
struct WrongStepImpl final : torch::nn::Cloneable<WrongStepImpl>,
                             memcnn::Invertible {
  explicit WrongStepImpl(WrongInverseImpl::Map wrong_)
      : wrong(std::move(wrong_)) {}
  void reset() override {}
  torch::Tensor forward(torch::Tensor x) {
    return x * 2;
  }
  torch::Tensor inverse(torch::Tensor y) {
    return y / 2;
  }
  std::vector<torch::Tensor> run(
      memcnn::Direction direction,
      std::vector<torch::Tensor> inputs,
      memcnn::Recording&) override {
    return {
        direction == memcnn::Direction::kForward ? forward(inputs[0])
                                                 : inverse(inputs[0])};
  }
  memcnn::BeforeRun backward_step(
      memcnn::Direction,
      memcnn::AfterRun after,
      memcnn::Recording&,
      memcnn::ParameterGradients&) override {
    return {{wrong(after.outputs[0])}, {after.grad_outputs[0] * 2}};
  }
  torch::nn::Module& module() override {
    return *this;
  }
  std::string type_name() const override {
    return "WrongStep";
  }

  WrongInverseImpl::Map wrong;
};
TORCH_MODULE(WrongStep);

TEST(BadInput, BackwardStepThatRebuildsAnotherInput) {
  for (const WrongInput& wrong : kWrongInputs) {
    memcnn::InvertibleModuleWrapper block{WrongStep(wrong.inverse)};
    const torch::Tensor y = block(torch::ones({2, 4}).requires_grad_() * 1);
    EXPECT_THAT(
        [&] { y.sum().backward(); },
        ThrowsError<c10::Error>(HasSubstr(
            "WrongStep::backward(): expected backward_step() to rebuild an "
            "input of sizes [2, 4], Float, cpu, but got " +
            std::string(wrong.got))));
  }
}

TEST(BadInput, ReadOfAFreedInput) {
  memcnn::AdditiveCoupling coupling(SmoothBranch(2), SmoothBranch(2));
  memcnn::InvertibleModuleWrapper block(coupling);
  const torch::Tensor x = torch::ones({2, 4, 3, 3}).requires_grad_() * 1;
  const torch::Tensor y = block(x);
  EXPECT_THAT(
      [&] { x.sum(); },
      ThrowsError<c10::Error>(
          StrEq("memcnn: InvertibleModuleWrapper::forward(): expected its "
                "input not to be read between the call and its backward pass, "
                "but got a read of the freed tensor (sizes [2, 4, 3, 3], "
                "Float, cpu, block AdditiveCoupling). Set "
                "InvertibleModuleWrapperOptions().keep_input(true) on that "
                "block, or read the tensor before it.")));
}

TEST(BadInput, BlockOfASequenceIsNamed) {
  memcnn::ReversibleSequence sequence(
      memcnn::AdditiveCoupling(identity(), identity()),
      memcnn::AdditiveCoupling(
          torch::nn::AnyModule(Throwing(2, 2)),
          torch::nn::AnyModule(Throwing(2, 0))));
  const torch::Tensor y = sequence(torch::ones({3, 4}).requires_grad_() * 1);
  EXPECT_THAT(
      [&] { y.sum().backward(); },
      ThrowsError<c10::Error>(
          HasSubstr(
              "ReversibleSequence::backward(): block 1 (AdditiveCoupling): "),
          HasSubstr("the branch gave up")));
}

} // namespace
} // namespace memcnn_test
