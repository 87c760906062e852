// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/tensor_map.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/core/Tensor.h>

#include <utility>

namespace memcnn::detail {

/// The base of layers that keep lengths and have nothing to learn: what undoes
/// such a layer is its transpose, so that values and gradients go back alike.
class Isometry : public TensorMap {
 private:
  /// The layer, or its inverse, of a whole tensor, which is given away.
  virtual at::Tensor mapped(Direction direction, at::Tensor input) const = 0;

  Tensors run_with(
      Direction direction,
      Tensors inputs,
      const RunExtras& extras,
      Recording& recording) final {
    check_extras(direction, extras);
    recording.read(module());
    return {mapped(direction, std::move(inputs[0]))};
  }

  LogDet log_det() const final {
    return LogDet::kZero;
  }

  BeforeRun backward_step(
      Direction direction,
      AfterRun after,
      Recording& recording,
      ParameterGradients& /*parameters*/) final {
    recording.read(module());
    const Direction back = opposite(direction);
    BeforeRun before;
    before.inputs = after.kept_inputs[0].defined()
        ? std::move(after.kept_inputs)
        : Tensors{mapped(back, std::move(after.outputs[0]))};
    before.grad_inputs.resize(1);
    if (after.needs_grad[0] && after.grad_outputs[0].defined()) {
      before.grad_inputs[0] = mapped(back, std::move(after.grad_outputs[0]));
    }
    return before;
  }
};

} // namespace memcnn::detail
