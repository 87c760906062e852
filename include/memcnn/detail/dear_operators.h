// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>
#include <c10/util/ArrayRef.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>

namespace memcnn::detail {

/// The multiply-adds of a call of a dear operator.
using MultiplyAdds =
    double (*)(c10::ArrayRef<c10::IValue> arguments, const at::Tensor& result);

/// A product of matrices: every number of the result takes one multiply-add a
/// number of the left matrix's rows.
template <size_t left>
double of_product(
    c10::ArrayRef<c10::IValue> arguments,
    const at::Tensor& result) {
  const at::Tensor& matrix = arguments[left].toTensor();
  return static_cast<double>(result.numel()) *
      static_cast<double>(matrix.size(-1));
}

/// aten::convolution(input, weight, bias, stride, padding, dilation, transposed,
/// output_padding, groups): every number of the result, or of the input where
/// it is transposed, meets one filter.
inline double of_convolution(
    c10::ArrayRef<c10::IValue> arguments,
    const at::Tensor& result) {
  const at::Tensor& weight = arguments[1].toTensor();
  const bool transposed = arguments[6].toBool();
  const at::Tensor& positions = transposed ? arguments[0].toTensor() : result;
  return static_cast<double>(positions.numel()) *
      static_cast<double>(weight.numel()) / static_cast<double>(weight.size(0));
}

/// Attention of query (..., L, E), key (..., S, E) and value (..., S, V): two
/// products, for the weights and for their sums.
inline double of_attention(
    c10::ArrayRef<c10::IValue> arguments,
    const at::Tensor& /*result*/) {
  const at::Tensor& query = arguments[0].toTensor();
  const at::Tensor& value = arguments[2].toTensor();
  return static_cast<double>(query.numel()) / query.size(-1) * value.size(-2) *
      (query.size(-1) + value.size(-1));
}

/// Operators whose results are dear: a second run takes most of its time for
/// them, while their gradients need their arguments alone, or the result
/// itself. Everything that LibTorch's convolutions, linear layers, products and
/// attention run below autograd is one of these.
inline const std::unordered_map<std::string, MultiplyAdds>& dear_operators() {
  static const std::unordered_map<std::string, MultiplyAdds> operators = {
      {"aten::convolution", of_convolution},
      {"aten::mm", of_product<0>},
      {"aten::addmm", of_product<1>},
      {"aten::bmm", of_product<0>},
      {"aten::baddbmm", of_product<1>},
      {"aten::mv", of_product<0>},
      {"aten::addmv", of_product<1>},
      {"aten::_scaled_dot_product_flash_attention_for_cpu", of_attention},
      {"aten::_scaled_dot_product_flash_attention", of_attention},
      {"aten::_scaled_dot_product_efficient_attention", of_attention},
      {"aten::_scaled_dot_product_cudnn_attention", of_attention},
      {"aten::_scaled_dot_product_fused_attention_overrideable", of_attention}};
  return operators;
}

/// Where an operator takes the argument of this name; nothing if it does not.
inline std::optional<size_t> position_of(
    const char* argument,
    const c10::FunctionSchema& schema) {
  const auto index = schema.argumentIndexWithName(argument);
  return index ? std::optional<size_t>(static_cast<size_t>(*index))
               : std::nullopt;
}

/// Whether this call draws random numbers: attention with dropout. What follows
/// it draws others unless it runs again.
inline bool draws(
    const c10::FunctionSchema& schema,
    c10::ArrayRef<c10::IValue> arguments) {
  const auto position = position_of("dropout_p", schema);
  return position && arguments[*position].toDouble() > 0;
}

} // namespace memcnn::detail
