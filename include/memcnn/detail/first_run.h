// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/capture.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/digits.h>
#include <memcnn/detail/layout.h>
#include <memcnn/detail/tensors.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// The tensors of what a branch returns. A type of one's own brings a friend of
/// this name, or is not compared.
inline Tensors tensors_in(const at::Tensor& value) {
  return {value};
}
inline Tensors tensors_in(const Tensors& value) {
  return value;
}
inline Tensors tensors_in(...) {
  return {};
}

/// What a branch got and returned in its first run, to compare the second with:
/// the debug mode of wrapper, sequence and checkpoint().
///
/// Memory:   a copy of both.
class FirstRun {
 public:
  explicit FirstRun(const Tensors& inputs) : inputs_(copies(inputs)) {
    check_eager(
        compute_device_of(inputs),
        "memcnn: expected debug(true)",
        "compares values on the host",
        "Set debug(false) before the capture.");
  }

  template <class Value>
  void set_value(const Value& value) {
    value_ = copies(tensors_in(value));
  }

  /// The very inputs, as they were before the run.
  const Tensors& inputs() const {
    return inputs_;
  }

  /// Stops where the inputs of a second run are other ones: what rebuilt them
  /// does not undo what forward did, or loses most of the digits.
  void check_inputs(const torch::nn::Module& branch, const Tensors& inputs)
      const {
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const double difference = relative_difference(inputs_[i], inputs[i]);
      TORCH_CHECK(
          difference <= tolerance(inputs_[i], /*root=*/4),
          "memcnn: expected '",
          branch.name(),
          "' to get in backward the argument that it got in forward, but got "
          "one that differs by ",
          difference,
          " of its norm (",
          describe(inputs_[i]),
          "). A block is not invertible, or its inverse loses digits: "
          "check_invertible_module() measures it.");
    }
  }

  /// Stops where the second run, at the very inputs of the first, returned
  /// something else.
  template <class Value>
  void check_value(const torch::nn::Module& branch, const Value& value) const {
    const Tensors found = tensors_in(value);
    for (size_t i = 0; i < value_.size(); ++i) {
      const double difference = relative_difference(value_[i], found[i]);
      TORCH_CHECK(
          difference <= tolerance(value_[i], /*root=*/2),
          "memcnn: expected '",
          branch.name(),
          "' to return in backward what it returned in forward for the same "
          "argument, but got a value that differs by ",
          difference,
          " of its norm (",
          describe(value_[i]),
          "). It depends on something that is neither its argument nor a "
          "registered parameter or buffer: a plain member that forward "
          "changes, numbers of a generator of its own, another thread.");
    }
  }

 private:
  static Tensors copies(const Tensors& tensors) {
    Tensors result;
    for (const at::Tensor& tensor : tensors) {
      // As they are laid out: kernels tell layouts apart.
      result.push_back(
          tensor.layout() == at::kStrided
              ? copy_by(tensor.detach(), tensor.strides())
              : tensor.detach().clone());
    }
    return result;
  }

  /// ||a - b|| / ||a||; infinite where they do not compare, 0 where there is
  /// nothing to compare: values that are not finite, sparse tensors.
  static double relative_difference(const at::Tensor& a, const at::Tensor& b) {
    if (!TensorMeta(a).fits(b)) {
      return std::numeric_limits<double>::infinity();
    }
    const at::NoGradGuard no_grad;
    if (a.layout() != at::kStrided) {
      return 0;
    }
    const at::Tensor x = wide(a);
    const at::Tensor y = wide(b.detach());
    // Beside values of the size of 1 the rounding of zeros is no difference.
    const double norm = x.norm().item<double>() +
        1e-3 * std::sqrt(static_cast<double>(x.numel()));
    const double distance = (x - y).norm().item<double>();
    return distance == 0 || !std::isfinite(norm) ? 0 : distance / norm;
  }

  static at::Tensor wide(const at::Tensor& tensor) {
    return (tensor.is_complex() ? at::view_as_real(tensor) : tensor)
        .to(at::kDouble);
  }

  /// The root-th root of the distance of 1 to the next number: half of the
  /// digits, or a quarter.
  static double tolerance(const at::Tensor& tensor, int root) {
    return tensor.is_floating_point()
        ? std::exp2(
              static_cast<double>(1 - digits_of(tensor.scalar_type())) / root)
        : 0;
  }

  Tensors inputs_;
  Tensors value_;
};

} // namespace memcnn::detail
