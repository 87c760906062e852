// SPDX-License-Identifier: MIT
//
// Each dear operator in a branch: its result is kept and taken, and the
// gradients are those of plain autograd.

#include "support/counted_operators.h"
#include "support/keeping_chain.h"
#include "support/tolerances.h"
#include "support/twins.h"

#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cstdint>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

namespace memcnn_test {
namespace {

using Counts = CountedOperators::Counts;
using torch::Tensor;
using Tensors = std::vector<Tensor>;

/// A branch that is one function of its argument, half of (2, 8, ...), and of
/// parameters of these sizes.
struct Case {
  std::string name;
  std::vector<int64_t> sizes; // of the argument of the coupling
  std::vector<std::vector<int64_t>> weights;
  FunctionBranchImpl::Function function;
  Counts runs; // of its dear operators
};

void PrintTo(const Case& each, std::ostream* stream) {
  *stream << each.name;
}

Tensor attention(const Tensor& x, const Tensors& w, bool causal) {
  return at::scaled_dot_product_attention(
      x * w[0], x, x + w[0], /*attn_mask=*/{}, /*dropout_p=*/0, causal);
}

std::vector<Case> convolutions_of_images() {
  const std::vector<int64_t> image = {2, 8, 6, 6};
  const Counts once = {{"aten::convolution", 1}};
  return {
      {"Conv2d",
       image,
       {{4, 4, 3, 3}, {4}},
       [](auto x, auto& w) { return torch::conv2d(x, w[0], w[1], 1, 1); },
       once},
      {"Conv2dWithoutBias",
       image,
       {{4, 4, 3, 3}},
       [](auto x, auto& w) { return torch::conv2d(x, w[0], {}, 1, 1); },
       once},
      {"Conv2dOfASum",
       image,
       {{4, 4, 3, 3}, {4, 4, 3, 3}},
       [](auto x, auto& w) { return torch::conv2d(x, w[0] + w[1], {}, 1, 1); },
       once},
      {"Conv2dOfGroups",
       image,
       {{4, 2, 3, 3}, {4}},
       [](auto x, auto& w) {
         return torch::conv2d(x, w[0], w[1], 1, 1, 1, /*groups=*/2);
       },
       once},
      {"Conv2dOfEachChannel",
       image,
       {{4, 1, 3, 3}, {4}},
       [](auto x, auto& w) {
         return torch::conv2d(x, w[0], w[1], 1, 1, 1, /*groups=*/4);
       },
       once},
      {"Conv2dDilated",
       image,
       {{4, 4, 3, 3}, {4}},
       [](auto x, auto& w) {
         return torch::conv2d(x, w[0], w[1], 1, /*padding=*/2, /*dilation=*/2);
       },
       once},
      {"Conv2dPaddedToTheSameSize",
       image,
       {{4, 4, 3, 3}, {4}},
       [](auto x, auto& w) { return torch::conv2d(x, w[0], w[1], 1, "same"); },
       once},
      {"Conv2dInChannelsLast",
       image,
       {{4, 4, 3, 3}, {4}},
       [](auto x, auto& w) {
         return torch::conv2d(
             x.contiguous(torch::MemoryFormat::ChannelsLast), w[0], w[1], 1, 1);
       },
       once}};
}

std::vector<Case> other_convolutions() {
  const std::vector<int64_t> line = {2, 8, 6};
  const std::vector<int64_t> image = {2, 8, 6, 6};
  const std::vector<int64_t> volume = {2, 8, 4, 4, 4};
  const Counts once = {{"aten::convolution", 1}};
  return {
      {"Conv1d",
       line,
       {{4, 4, 3}, {4}},
       [](auto x, auto& w) { return torch::conv1d(x, w[0], w[1], 1, 1); },
       once},
      {"Conv3d",
       volume,
       {{4, 4, 3, 3, 3}, {4}},
       [](auto x, auto& w) { return torch::conv3d(x, w[0], w[1], 1, 1); },
       once},
      {"ConvTranspose1d",
       line,
       {{4, 4, 3}, {4}},
       [](auto x, auto& w) {
         return torch::conv_transpose1d(x, w[0], w[1], 1, 1);
       },
       once},
      {"ConvTranspose2dOfGroups",
       image,
       {{4, 2, 3, 3}, {4}},
       [](auto x, auto& w) {
         return torch::conv_transpose2d(x, w[0], w[1], 1, 1, 0, /*groups=*/2);
       },
       once},
      {"ConvTranspose3d",
       volume,
       {{4, 4, 3, 3, 3}, {4}},
       [](auto x, auto& w) {
         return torch::conv_transpose3d(x, w[0], w[1], 1, 1);
       },
       once},
      {"Conv2dDownAndUp",
       image,
       {{8, 4, 2, 2}, {8, 4, 2, 2}},
       [](auto x, auto& w) {
         return torch::conv_transpose2d(
             torch::tanh(torch::conv2d(x, w[0], {}, 2)), w[1], {}, 2);
       },
       {{"aten::convolution", 2}}},
      {"ComplexConv2d", // of real and imaginary parts
       image,
       {{4, 4, 3, 3}, {4, 4, 3, 3}},
       [](auto x, auto& w) {
         return torch::real(torch::conv2d(
             torch::complex(x, x), torch::complex(w[0], w[1]), {}, 1, 1));
       },
       {{"aten::convolution", 3}}}};
}

std::vector<Case> linear_layers() {
  const std::vector<int64_t> rows = {3, 8};
  const std::vector<int64_t> sequences = {2, 8, 4};
  return {
      {"LinearOfRows",
       rows,
       {{4, 4}, {4}},
       [](auto x, auto& w) { return torch::linear(x, w[0], w[1]); },
       {{"aten::addmm", 1}}},
      {"LinearOfSequences",
       sequences,
       {{4, 4}, {4}},
       [](auto x, auto& w) { return torch::linear(x, w[0], w[1]); },
       {{"aten::addmm", 1}}},
      {"LinearOfImages",
       {2, 8, 3, 4},
       {{4, 4}, {4}},
       [](auto x, auto& w) { return torch::linear(x, w[0], w[1]); },
       {{"aten::addmm", 1}}},
      {"LinearWithoutBias",
       rows,
       {{4, 4}},
       [](auto x, auto& w) { return torch::linear(x, w[0]); },
       {{"aten::mm", 1}}},
      {"LinearOfSequencesWithoutBias",
       sequences,
       {{4, 4}},
       [](auto x, auto& w) { return torch::linear(x, w[0]); },
       {{"aten::mm", 1}}}};
}

std::vector<Case> products() {
  const std::vector<int64_t> rows = {3, 8};
  const std::vector<int64_t> sequences = {2, 8, 4};
  return {
      {"MatmulOfOneWeight",
       sequences,
       {{4, 4}},
       [](auto x, auto& w) { return torch::matmul(x, w[0]); },
       {{"aten::mm", 1}}},
      {"MatmulOfMatrices",
       sequences,
       {{4, 4}},
       [](auto x, auto& w) {
         return torch::tanh(
             torch::matmul(torch::matmul(x, x.transpose(1, 2)), x) * w[0]);
       },
       {{"aten::bmm", 2}}},
      {"Baddbmm",
       sequences,
       {{2, 4, 4}},
       [](auto x, auto& w) { return torch::baddbmm(x, x, w[0], 0.5, 2); },
       {{"aten::baddbmm", 1}}},
      {"Addmm",
       rows,
       {{4, 4}, {4}},
       [](auto x, auto& w) { return torch::addmm(w[1], x, w[0], 0.5, 2); },
       {{"aten::addmm", 1}}},
      {"Mv",
       rows,
       {{4}},
       [](auto x, auto& w) { return torch::mv(x, w[0]).unsqueeze(1) + x; },
       {{"aten::mv", 1}}},
      {"Addmv",
       rows,
       {{4}, {3}},
       [](auto x, auto& w) {
         return torch::addmv(w[1], x, w[0]).unsqueeze(1) + x;
       },
       {{"aten::addmv", 1}}},
      {"Einsum",
       sequences,
       {{4, 4}},
       [](auto x, auto& w) {
         return torch::einsum("ncl,lm->ncm", {x, w[0]});
       },
       {{"aten::bmm", 1}}},
      {"ComplexProduct",
       rows,
       {{4, 4}, {4, 4}},
       [](auto x, auto& w) {
         const Tensor weight = torch::complex(w[0], w[1]);
         return torch::real(torch::mm(torch::complex(x, x), weight.conj().t()));
       },
       {{"aten::mm", 1}}}};
}

std::vector<Case> attentions() {
  const std::vector<int64_t> heads = {2, 4, 5, 6};
  const Counts once = {
      {"aten::_scaled_dot_product_flash_attention_for_cpu", 1}};
  return {
      {"Attention",
       heads,
       {{6}},
       [](auto x, auto& w) { return attention(x, w, /*causal=*/false); },
       once},
      {"CausalAttention",
       heads,
       {{6}},
       [](auto x, auto& w) { return attention(x, w, /*causal=*/true); },
       once},
      {"AttentionWithAMask",
       heads,
       {{6}},
       [](auto x, auto& w) {
         return at::scaled_dot_product_attention(
             x * w[0], x, x, torch::ones({5, 5}, torch::kBool).tril(1));
       },
       once},
      {"AttentionWithDropout", // in parts
       heads,
       {{6}},
       [](auto x, auto& w) {
         return at::scaled_dot_product_attention(
             x * w[0], x, x, /*attn_mask=*/{}, /*dropout_p=*/0.5);
       },
       {{"aten::bmm", 2}}}};
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const auto& some :
       {convolutions_of_images(),
        other_convolutions(),
        linear_layers(),
        products(),
        attentions()}) {
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

KeepingChain chain_of(const Case& each, size_t depth) {
  torch::manual_seed(1);
  return KeepingChain(
      [&] {
        Tensors weights;
        for (const auto& sizes : each.weights) {
          weights.push_back(0.3 * torch::randn(sizes, torch::kDouble));
        }
        return torch::nn::AnyModule(FunctionBranch(weights, each.function));
      },
      depth);
}

template <class Fn>
Counts counts_of(const Fn& fn) {
  const CountedOperators counted;
  fn();
  return counted.counts();
}

using Parameters = std::tuple<Keeping, Case>;
class KeptOperators : public testing::TestWithParam<Parameters> {};

TEST_P(KeptOperators, TheirResultsAreTaken) {
  const Keeping way = std::get<0>(GetParam());
  const Case& each = std::get<1>(GetParam());
  constexpr size_t kDepth = 2;
  KeepingChain chain = chain_of(each, kDepth);
  const Tensor x = leaf(each.sizes);
  Tensors expected;
  Tensors found;

  torch::manual_seed(2);
  const Tensor plain = chain.plain(x);
  const Counts backward =
      counts_of([&] { expected = chain.gradients(plain, x); });

  torch::manual_seed(2);
  Keeper keeper(way);
  Tensor y;
  Counts forward =
      counts_of([&] { y = chain.run(way, keeper, made_by_a_layer(x)); });
  int count = 0;
  for (auto& [name, runs] : forward) {
    runs /= 2 * static_cast<int>(kDepth);
    count += 2 * static_cast<int>(kDepth) * runs;
  }
  EXPECT_EQ(forward, each.runs);
  EXPECT_EQ(keeper.kept().count, static_cast<size_t>(count));
  EXPECT_TRUE(y.equal(plain));
  // Gradients take products and convolutions of their own.
  EXPECT_EQ(counts_of([&] { found = chain.gradients(y, x); }), backward);
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

INSTANTIATE_TEST_SUITE_P(
    Ways,
    KeptOperators,
    testing::Combine(all_ways_of_keeping(), testing::ValuesIn(cases())),
    way_and_case<Case>);

} // namespace
} // namespace memcnn_test
