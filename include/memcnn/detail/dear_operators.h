// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/batch_statistics.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/util/ArrayRef.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>

namespace memcnn::detail {

/// What is bound by memory takes for each byte as long as so many multiply-adds.
/// Measured on a CPU: 1 to 6 for ReLU and batch normalisation whose statistics
/// are known. Only the order in which results and blocks are kept depends on it.
inline constexpr double kMultiplyAddsPerByte = 4;

using Arguments = c10::ArrayRef<c10::IValue>;

/// An operator whose result is dear.
struct DearOperator {
  /// The multiply-adds of a call.
  double (*multiply_adds)(Arguments arguments, const at::Tensor& result);
  /// Whether a second run may be given the results of a first.
  bool (*is_dear)(Arguments arguments) = [](Arguments /*arguments*/) {
    return true;
  };
  /// Makes the first result of the others, so that it is not kept. Null: it is.
  std::optional<at::Tensor> (*first_result)(
      Arguments arguments,
      const at::Tensor& second,
      const at::Tensor& third) = nullptr;
  /// The argument that asks for a result that backward alone needs, which
  /// attention spares where no graph is recorded.
  std::optional<size_t> asks_for_backward = std::nullopt;
  /// Whether LibTorch may choose another operator in its place for arguments that
  /// need a gradient: aten::mm instead of aten::bmm.
  bool has_other_forms = false;
};

/// 0 where nothing is divided.
inline double quotient(int64_t dividend, int64_t divisor) {
  return dividend == 0
      ? 0
      : static_cast<double>(dividend) / static_cast<double>(divisor);
}

/// A product of matrices: every number of the result takes one multiply-add a
/// number of the left matrix's rows.
template <size_t left>
double of_product(Arguments arguments, const at::Tensor& result) {
  const at::Tensor& matrix = arguments[left].toTensor();
  return static_cast<double>(result.numel()) *
      static_cast<double>(matrix.size(-1));
}

/// aten::convolution(input, weight, bias, stride, padding, dilation, transposed,
/// output_padding, groups): every number of the result, or of the input where
/// it is transposed, meets one filter.
inline double of_convolution(Arguments arguments, const at::Tensor& result) {
  const at::Tensor& weight = arguments[1].toTensor();
  const bool transposed = arguments[6].toBool();
  const at::Tensor& positions = transposed ? arguments[0].toTensor() : result;
  return static_cast<double>(positions.numel()) *
      quotient(weight.numel(), weight.size(0));
}

/// Attention of query (..., L, E), key (..., S, E) and value (..., S, V): two
/// products, for the weights and for their sums.
inline double of_attention(Arguments arguments, const at::Tensor& /*result*/) {
  const at::Tensor& query = arguments[0].toTensor();
  const at::Tensor& value = arguments[2].toTensor();
  return quotient(query.numel(), query.size(-1)) *
      static_cast<double>(value.size(-2) * (query.size(-1) + value.size(-1)));
}

/// Whether this attention draws no random numbers: with dropout what follows it
/// would draw others unless it runs again.
template <size_t dropout>
bool draws_nothing(Arguments arguments) {
  return arguments[dropout].toDouble() == 0;
}

/// Statistics of batch normalisation: the input is read again for them.
inline double of_statistics(Arguments arguments, const at::Tensor& /*result*/) {
  return static_cast<double>(arguments[0].toTensor().nbytes()) *
      kMultiplyAddsPerByte;
}

/// Operators whose results are dear: a second run takes most of its time for
/// them, while their gradients need their arguments alone, or the results
/// themselves. Everything that LibTorch's convolutions, linear layers, products
/// and attention run below autograd is one of these; and batch normalisation,
/// for its statistics.
inline const std::unordered_map<std::string, DearOperator>& dear_operators() {
  const auto product = [](auto multiply_adds) {
    DearOperator dear{multiply_adds};
    dear.has_other_forms = true;
    return dear;
  };
  const auto attention = [&](auto is_dear, std::optional<size_t> flag = {}) {
    DearOperator dear = product(of_attention);
    dear.is_dear = is_dear;
    dear.asks_for_backward = flag;
    return dear;
  };
  static const std::unordered_map<std::string, DearOperator> operators = {
      {"aten::convolution", {of_convolution}},
      {"aten::mm", product(of_product<0>)},
      {"aten::addmm", product(of_product<1>)},
      {"aten::bmm", product(of_product<0>)},
      {"aten::baddbmm", product(of_product<1>)},
      {"aten::mv", product(of_product<0>)},
      {"aten::addmv", product(of_product<1>)},
      {"aten::_scaled_dot_product_flash_attention_for_cpu",
       attention(draws_nothing<3>)},
      {"aten::_scaled_dot_product_flash_attention",
       attention(draws_nothing<3>)},
      {"aten::_scaled_dot_product_efficient_attention",
       attention(draws_nothing<5>, 4)},
      {"aten::_scaled_dot_product_cudnn_attention",
       attention(draws_nothing<5>, 4)},
      {"aten::_scaled_dot_product_fused_attention_overrideable",
       attention(draws_nothing<4>)},
      {"aten::native_batch_norm",
       {of_statistics, computes_statistics, normalised}}};
  return operators;
}

} // namespace memcnn::detail
