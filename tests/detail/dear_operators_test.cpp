// SPDX-License-Identifier: MIT

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/detail/dear_operators.h>
#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

using memcnn::detail::dear_operators;
using memcnn::detail::normalised;
using Values = std::vector<c10::IValue>;

double multiply_adds(
    const std::string& name,
    const Values& arguments,
    const torch::Tensor& result) {
  return dear_operators().at(name).multiply_adds(arguments, result);
}

torch::Tensor of(std::vector<int64_t> sizes) {
  return torch::zeros(sizes);
}

Values convolution(
    const torch::Tensor& input,
    const torch::Tensor& weight,
    bool transposed) {
  using Sizes = std::vector<int64_t>;
  return {
      input,
      weight,
      c10::IValue(),
      Sizes{1, 1},
      Sizes{0, 0},
      Sizes{1, 1},
      transposed,
      Sizes{0, 0},
      1};
}

TEST(MultiplyAdds, OfAConvolutionAreAFilterForEachResult) {
  EXPECT_EQ(
      multiply_adds(
          "aten::convolution",
          convolution(of({2, 4, 7, 9}), of({6, 4, 3, 5}), false),
          of({2, 6, 5, 5})),
      2 * 6 * 5 * 5 * (4 * 3 * 5));
}

TEST(MultiplyAdds, OfATransposedConvolutionAreAFilterForEachArgument) {
  EXPECT_EQ(
      multiply_adds(
          "aten::convolution",
          convolution(of({2, 4, 7, 9}), of({4, 6, 3, 5}), true),
          of({2, 6, 9, 13})),
      2 * 4 * 7 * 9 * (6 * 3 * 5));
}

TEST(MultiplyAdds, OfProductsAreTheSumsOfEachNumber) {
  const auto a = of({3, 5});
  const auto b = of({5, 7});
  EXPECT_EQ(multiply_adds("aten::mm", {a, b}, of({3, 7})), 3 * 5 * 7);
  EXPECT_EQ(multiply_adds("aten::addmm", {of({7}), a, b}, of({3, 7})), 105);
  EXPECT_EQ(multiply_adds("aten::mv", {a, of({5})}, of({3})), 15);
  EXPECT_EQ(multiply_adds("aten::addmv", {of({3}), a, of({5})}, of({3})), 15);
  const auto batch = of({2, 3, 5});
  EXPECT_EQ(
      multiply_adds("aten::bmm", {batch, of({2, 5, 7})}, of({2, 3, 7})), 210);
  EXPECT_EQ(
      multiply_adds(
          "aten::baddbmm",
          {of({2, 3, 7}), batch, of({2, 5, 7})},
          of({2, 3, 7})),
      210);
}

TEST(MultiplyAdds, OfAttentionAreTwoProducts) {
  // Queries (2, 3, 5, 8), keys (2, 3, 7, 8), values (2, 3, 7, 4).
  EXPECT_EQ(
      multiply_adds(
          "aten::_scaled_dot_product_flash_attention_for_cpu",
          {of({2, 3, 5, 8}), of({2, 3, 7, 8}), of({2, 3, 7, 4}), 0.0},
          of({2, 3, 5, 4})),
      2 * 3 * 5 * 7 * (8 + 4));
}

TEST(MultiplyAdds, OfNothingAreNone) {
  EXPECT_EQ(multiply_adds("aten::mm", {of({0, 0}), of({0, 0})}, of({0, 0})), 0);
  EXPECT_EQ(
      multiply_adds(
          "aten::convolution",
          convolution(of({0, 0, 5, 5}), of({0, 0, 3, 3}), false),
          of({0, 0, 3, 3})),
      0);
}

TEST(DearOperators, AreOperatorsOfLibTorch) {
  for (const auto& [name, dear] : dear_operators()) {
    EXPECT_TRUE(c10::Dispatcher::singleton().findSchema({name, ""}).has_value())
        << name;
  }
}

TEST(DearOperators, WhereTheyLookForArguments) {
  const auto position = [](const std::string& name, const char* argument) {
    return c10::Dispatcher::singleton()
        .findSchemaOrThrow(name.c_str(), "")
        .schema()
        .argumentIndexWithName(argument)
        .value_or(-1);
  };
  for (const auto& [name, dear] : dear_operators()) {
    const int dropout = position(name, "dropout_p");
    if (dropout >= 0) {
      Values arguments(static_cast<size_t>(dropout) + 1, 0.0);
      EXPECT_TRUE(dear.is_dear(arguments)) << name;
      arguments.back() = 0.5;
      EXPECT_FALSE(dear.is_dear(arguments)) << name;
    }
    const int flag = position(name, "compute_log_sumexp");
    EXPECT_EQ(
        dear.asks_for_backward ? static_cast<int>(*dear.asks_for_backward) : -1,
        flag)
        << name;
  }
}

/// Batch normalisation by its statistics, against the operator itself.
class Normalised : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(3);
  }

  /// Expects the very bits.
  static void expect_same_bits(
      const torch::Tensor& input,
      const torch::Tensor& weight,
      const torch::Tensor& bias) {
    const auto [output, mean, invstd] = torch::native_batch_norm(
        input, weight, bias, {}, {}, /*training=*/true, 0.1, 1e-5);
    const auto found = normalised(
        arguments(input, weight, bias, {}, /*momentum=*/0.1), mean, invstd);
    ASSERT_TRUE(found.has_value());
    EXPECT_TRUE(found->equal(output));
    EXPECT_EQ(found->strides(), output.strides());
    EXPECT_EQ(found->scalar_type(), output.scalar_type());
  }

  static Values arguments(
      const torch::Tensor& input,
      const torch::Tensor& weight,
      const torch::Tensor& bias,
      const torch::Tensor& running,
      double momentum) {
    return {input, weight, bias, running, running, true, momentum, 1e-5};
  }

  static torch::Tensor random(
      std::vector<int64_t> sizes,
      at::ScalarType dtype) {
    return (torch::randn(sizes, torch::kDouble) * 3 + 7).to(dtype);
  }
};

TEST_F(Normalised, HasTheBitsOfTheOperator) {
  for (const auto dtype : {torch::kFloat, torch::kDouble}) {
    for (const auto& sizes : std::vector<std::vector<int64_t>>{
             {5, 6}, {5, 6, 11}, {5, 6, 7, 9}, {3, 6, 4, 5, 7}, {2, 6, 1, 1}}) {
      SCOPED_TRACE(sizes);
      const auto x = random(sizes, dtype);
      const auto weight = random({6}, dtype);
      expect_same_bits(x, weight, random({6}, dtype));
      expect_same_bits(x, {}, {});
      expect_same_bits(x, weight, {});
      expect_same_bits(x, {}, weight);
    }
  }
}

TEST_F(Normalised, HasThemInChannelsLast) {
  expect_same_bits(
      random({5, 6, 7, 9}, torch::kFloat)
          .contiguous(at::MemoryFormat::ChannelsLast),
      random({6}, torch::kFloat),
      random({6}, torch::kFloat));
  expect_same_bits(
      random({3, 6, 4, 5, 7}, torch::kFloat)
          .contiguous(at::MemoryFormat::ChannelsLast3d),
      random({6}, torch::kFloat),
      random({6}, torch::kFloat));
}

TEST_F(Normalised, HasThemOfAHalfInputWithFloatParameters) {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    expect_same_bits(
        random({5, 6, 7, 9}, dtype),
        random({6}, torch::kFloat),
        random({6}, torch::kFloat));
  }
}

TEST_F(Normalised, LeavesToTheOperatorWhatItCannotDoAlike) {
  const auto x = random({5, 6, 7, 9}, torch::kFloat);
  const auto one = torch::ones({6});
  const auto is_left = [&](const Values& arguments) {
    return !normalised(arguments, one, one).has_value();
  };
  EXPECT_FALSE(is_left(arguments(x, one, one, {}, 0.1)));
  EXPECT_TRUE(is_left(arguments(x, one, one, one, 0.1)))
      << "writes running statistics";
  EXPECT_FALSE(is_left(arguments(x, one, one, one, 0.0)));
  EXPECT_TRUE(is_left(arguments(x.transpose(2, 3), one, one, {}, 0.1)))
      << "another kernel";
  EXPECT_TRUE(is_left(arguments(x, one.to(torch::kDouble), one, {}, 0.1)));
}

} // namespace
} // namespace memcnn_test
