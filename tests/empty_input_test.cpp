// SPDX-License-Identifier: MIT
//
// Tensors without entries: a batch in which no object was found, a sequence of
// no words. Plain autograd returns gradients of zeros, and so does all of this.

#include "support/modules.h"
#include "support/twins.h"

#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

namespace memcnn_test {
namespace {

using Additive = memcnn::AdditiveCoupling<LinearBranch>;
using Affine = memcnn::AffineCoupling<memcnn::AffineAdapterNaive<LinearBranch>>;

memcnn::CouplingOptions last_dim() {
  return memcnn::CouplingOptions().split_dim(-1);
}

/// Two couplings, and what runs them.
struct Couplings {
  Additive additive{LinearBranch(2), last_dim()};
  Affine affine{
      memcnn::AffineAdapterNaive(LinearBranch(2), last_dim()),
      last_dim()};
};

struct Way {
  std::string name;
  std::function<torch::Tensor(Couplings&, torch::Tensor)> run;
};

void PrintTo(const Way& way, std::ostream* stream) {
  *stream << way.name;
}

torch::Tensor wrapped(
    Couplings& couplings,
    const memcnn::InvertibleModuleWrapperOptions& options,
    bool inverse,
    torch::Tensor x) {
  memcnn::InvertibleModuleWrapper first(couplings.additive, options);
  memcnn::InvertibleModuleWrapper second(couplings.affine, options);
  return inverse ? first->inverse(second->inverse(x)) : second(first(x));
}

torch::Tensor in_sequence(
    Couplings& couplings,
    const memcnn::ReversibleSequenceOptions& options,
    bool inverse,
    torch::Tensor x) {
  memcnn::ReversibleSequence sequence(
      options, couplings.additive, couplings.affine);
  return inverse ? sequence->inverse(x) : sequence(x);
}

std::vector<Way> ways() {
  const memcnn::InvertibleModuleWrapperOptions freeing;
  const auto keeping = memcnn::InvertibleModuleWrapperOptions()
                           .keep_input(true)
                           .keep_input_inverse(true);
  const auto results =
      memcnn::InvertibleModuleWrapperOptions().memory_budget(1 << 20);
  const memcnn::ReversibleSequenceOptions bare;
  const auto budget =
      memcnn::ReversibleSequenceOptions().memory_budget(1 << 20);
  std::vector<Way> all;
  for (const bool inverse : {false, true}) {
    const std::string suffix = inverse ? "Inverse" : "";
    for (const auto& [name, options] :
         {std::pair{"Wrapper", freeing},
          std::pair{"KeepInput", keeping},
          std::pair{"Results", results}}) {
      all.push_back(
          {name + suffix,
           [options = options, inverse](Couplings& couplings, auto x) {
             return wrapped(couplings, options, inverse, x);
           }});
    }
    for (const auto& [name, options] :
         {std::pair{"Sequence", bare}, std::pair{"Budget", budget}}) {
      all.push_back(
          {name + suffix,
           [options = options, inverse](Couplings& couplings, auto x) {
             return in_sequence(couplings, options, inverse, x);
           }});
    }
  }
  all.push_back({"Checkpoint", [](Couplings& couplings, auto x) {
                   return memcnn::checkpoint(
                       couplings.affine,
                       memcnn::checkpoint(couplings.additive, x));
                 }});
  return all;
}

class EmptyInput : public testing::TestWithParam<Way> {};

/// Runs a layer of the given kind, the couplings, and backward.
void expect_zero_gradients(
    const Way& way,
    const std::vector<int64_t>& sizes,
    const std::function<torch::Tensor(torch::Tensor)>& activation) {
  Couplings couplings;
  torch::nn::Linear stem(3, 4);
  std::vector<int64_t> data_sizes = sizes;
  data_sizes.back() = 3;
  const torch::Tensor h = activation(stem(torch::randn(data_sizes)));
  const torch::Tensor y = way.run(couplings, h);
  EXPECT_EQ(y.sizes(), sizes);
  y.sum().backward();

  for (const auto& parameters :
       {stem->parameters(),
        couplings.additive->parameters(),
        couplings.affine->parameters()}) {
    for (const torch::Tensor& parameter : parameters) {
      ASSERT_TRUE(parameter.grad().defined());
      EXPECT_TRUE(parameter.grad().equal(torch::zeros_like(parameter)));
    }
  }
}

TEST_P(EmptyInput, HasGradientsOfZeros) {
  for (const std::vector<int64_t>& sizes :
       std::vector<std::vector<int64_t>>{{0, 4}, {2, 0, 4}}) {
    expect_zero_gradients(GetParam(), sizes, [](auto h) { return h; });
    // Its node saves its output, and is guarded against reading freed memory.
    expect_zero_gradients(
        GetParam(), sizes, [](auto h) { return torch::relu(h); });
  }
}

INSTANTIATE_TEST_SUITE_P(
    Ways,
    EmptyInput,
    testing::ValuesIn(ways()),
    [](const testing::TestParamInfo<Way>& way) { return way.param.name; });

TEST(EmptyTensor, IsKeptByTheWrapper) {
  memcnn::InvertibleModuleWrapper block(Couplings().additive);
  const torch::Tensor h = torch::zeros({0, 4}).requires_grad_() * 1;
  const torch::Tensor y = block(h);
  EXPECT_EQ(block->input_kept_because(), "it is empty");
  EXPECT_NO_THROW(h.sum());
}

TEST(EmptyTensor, ExactModeHasGradientsToo) {
  memcnn::ReversibleSequence exact(memcnn::AdditiveCoupling(
      LinearBranch(2), last_dim().fractional_bits(12)));
  const torch::Tensor x = torch::zeros({0, 4}).requires_grad_();
  exact(x * 1).sum().backward();
  EXPECT_EQ(x.grad().sizes(), x.sizes());
}

TEST(EmptyTensor, WithoutChannelsSaysWhatIsMissing) {
  Couplings couplings;
  for (const Way& way : ways()) {
    EXPECT_THROW(
        way.run(couplings, torch::zeros({2, 0}).requires_grad_() * 1),
        c10::ValueError)
        << way.name;
  }
}

} // namespace
} // namespace memcnn_test
