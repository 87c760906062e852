// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/ones_like.h>
#include <c10/core/MemoryFormat.h>
#include <c10/util/ArrayRef.h>

#include <optional>
#include <tuple>

namespace memcnn::detail {

// aten::native_batch_norm(input, weight, bias, running_mean, running_var,
// training, momentum, eps) returns the normalised input, and the mean and the
// inverse standard deviation of each channel.

/// Whether this call computes statistics, by the kernel of which normalised()
/// knows how it uses them: on a CPU they take most of its time.
inline bool computes_statistics(c10::ArrayRef<c10::IValue> arguments) {
  return arguments[0].toTensor().is_cpu() && arguments[5].toBool();
}

/// The result of a call of which mean and inverse standard deviation are known,
/// bit for bit, in one pass over the input instead of three. Nothing where the
/// call does more than that.
///
/// The kernel computes a x + (b - mean a) with a = invstd weight. Evaluation mode
/// takes invstd from a variance, which is 1 here; the weight brings its own.
inline std::optional<at::Tensor> normalised(
    c10::ArrayRef<c10::IValue> arguments,
    const at::Tensor& mean,
    const at::Tensor& invstd) {
  const at::Tensor& input = arguments[0].toTensor();
  const auto weight = arguments[1].toOptional<at::Tensor>();
  const auto bias = arguments[2].toOptional<at::Tensor>();
  const auto running_mean = arguments[3].toOptional<at::Tensor>();
  const bool writes_statistics =
      running_mean && running_mean->defined() && arguments[6].toDouble() != 0;
  const bool has_weight = weight && weight->defined();
  const bool is_exact =
      (mean.scalar_type() == at::kFloat || mean.scalar_type() == at::kDouble) &&
      (!has_weight || weight->scalar_type() == mean.scalar_type());
  // The kernel for other layouts computes in another order.
  const bool is_dense = input.is_contiguous() ||
      input.is_contiguous(at::MemoryFormat::ChannelsLast) ||
      input.is_contiguous(at::MemoryFormat::ChannelsLast3d);
  if (writes_statistics || !is_exact || !is_dense) {
    return std::nullopt;
  }
  return std::get<0>(at::native_batch_norm(
      input,
      has_weight ? invstd * *weight : invstd,
      bias,
      mean,
      at::ones_like(invstd),
      /*training=*/false,
      /*momentum=*/0,
      /*eps=*/0));
}

} // namespace memcnn::detail
