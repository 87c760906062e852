// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/channel_matrix.h>
#include <memcnn/detail/channel_product.h>
#include <memcnn/detail/channels.h>
#include <memcnn/detail/check_input.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/gradient.h>
#include <memcnn/detail/local_run.h>
#include <memcnn/detail/orthogonal_matrix.h>
#include <memcnn/detail/tensor_map.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <utility>

namespace memcnn {

/// How a Conv1x1 keeps its matrix.
enum class Parametrization {
  kPlain, ///< as it is: anything, the singular included
  kLU, ///< P L (U + diag(s)), s = +-e^l: never singular, log-det the sum of l
  kOrthogonal ///< orthogonal, whatever a step changes: log-det 0
};
inline constexpr Parametrization kPlain = Parametrization::kPlain;
inline constexpr Parametrization kLU = Parametrization::kLU;
inline constexpr Parametrization kOrthogonal = Parametrization::kOrthogonal;

/// Options of a Conv1x1, fixed once it is constructed.
struct Conv1x1Options {
  /// kPlain, kLU or kOrthogonal. Default: kLU, which no step can make singular,
  /// and whose log-determinant costs a sum. kOrthogonal is for deep chains: it
  /// loses no digits.
  TORCH_ARG(Parametrization, parametrization) = kLU;
};

/// The module behind Conv1x1.
class Conv1x1Impl final : public torch::nn::Cloneable<Conv1x1Impl>,
                          public detail::TensorMap {
 public:
  explicit Conv1x1Impl(int64_t channels, const Conv1x1Options& options = {})
      : channels_(channels), options_(options) {
    detail::check_channel_count("Conv1x1", channels);
    reset();
  }

  void reset() override {
    const at::Tensor start = detail::random_rotation(channels_);
    switch (options_.parametrization()) {
      case kPlain:
        matrix_ = std::make_shared<detail::PlainMatrix>(*this, start);
        break;
      case kLU:
        matrix_ = std::make_shared<detail::LuMatrix>(*this, start);
        break;
      case kOrthogonal:
        matrix_ =
            std::make_shared<detail::OrthogonalChannelMatrix>(*this, start);
        break;
    }
  }

  void pretty_print(std::ostream& stream) const override {
    constexpr const char* kNames[] = {"kPlain", "kLU", "kOrthogonal"};
    stream << "memcnn::Conv1x1(" << channels_ << ", parametrization="
           << kNames[static_cast<size_t>(options_.parametrization())] << ")";
  }

  at::Tensor forward(const at::Tensor& input) {
    return TensorMap::forward(input); // AnyModule wants it of this class
  }

  /// As they were given.
  const Conv1x1Options& options() const {
    return options_;
  }

  /// The matrix, (C, C), with the graph of the parameters.
  at::Tensor weight() const {
    const detail::NoAutocast no_autocast;
    return matrix_->exact().to(parameters()[0].scalar_type());
  }

  /// Lets the matrix be this one.
  void set_weight(const at::Tensor& weight) {
    detail::check_floating_point("Conv1x1::set_weight(): ", weight);
    TORCH_CHECK_VALUE(
        weight.sizes() == at::IntArrayRef({channels_, channels_}),
        "Conv1x1::set_weight(): expected a weight of sizes [",
        channels_,
        ", ",
        channels_,
        "], but got ",
        detail::describe(weight),
        ". Give a row for each channel of the result, a column for each of the "
        "input.");
    matrix_->set(weight);
  }

 private:
  using Tensors = detail::Tensors;

  Tensors run_with(
      Direction direction,
      Tensors inputs,
      const RunExtras& extras,
      Recording& recording) override {
    check_extras(direction, extras);
    detail::check_stream("Conv1x1", direction, inputs, channels_);
    recording.read(*this);
    const detail::NoAutocast no_autocast;
    const bool is_forward = direction == Direction::kForward;
    detail::MatrixWants wants;
    wants.inverse = !is_forward;
    wants.log_abs_det = extras.log_det != nullptr;
    const detail::MatrixValues matrix =
        matrix_->values(inputs[0].scalar_type(), wants, name_of(direction));
    if (matrix.log_abs_det.defined()) {
      extras.log_det->add(
          matrix.log_abs_det * detail::pixels_of(inputs[0]),
          is_forward ? 1 : -1);
    }
    return detail::channel_product(
        is_forward ? matrix.weight : matrix.inverse, inputs);
  }

  /// The matrix is computed once, with a graph of its own, C x C, which takes its
  /// gradient to the parameters.
  BeforeRun backward_step(
      Direction direction,
      AfterRun after,
      Recording& recording,
      ParameterGradients& parameters) override {
    if (after.kept_inputs[0].defined()) { // nothing is to be undone
      return Invertible::backward_step(
          direction, std::move(after), recording, parameters);
    }
    recording.read(*this);
    const detail::NoAutocast no_autocast;
    const bool is_forward = direction == Direction::kForward;
    detail::LocalRun local(*this, {}, {}, parameters);
    const detail::MatrixValues matrix = matrix_again(after, local);
    const int64_t pixels = detail::pixels_of(after.outputs[0]);

    BeforeRun before;
    at::Tensor grad_matrix = take_back(
        direction,
        detail::detached(matrix.weight),
        detail::detached(matrix.inverse),
        local.needs_graph(),
        after,
        before);
    at::Tensor grad_log_det;
    if (after.grad_log_det.defined()) {
      grad_log_det = after.grad_log_det.sum() * (is_forward ? pixels : -pixels);
    }
    local.gradients({std::move(grad_matrix), std::move(grad_log_det)});
    for (size_t i = 0; i < before.grad_inputs.size(); ++i) {
      if (!after.needs_grad[i]) {
        before.grad_inputs[i].reset();
      }
    }
    return before;
  }

  detail::MatrixValues matrix_again(
      const AfterRun& after,
      detail::LocalRun& local) const {
    const at::AutoGradMode with_graph(local.needs_graph());
    detail::MatrixWants wants;
    wants.inverse = true;
    wants.log_abs_det = after.grad_log_det.defined();
    detail::MatrixValues matrix =
        matrix_->values(after.outputs[0].scalar_type(), wants, "backward");
    local.outputs = {matrix.exact};
    if (matrix.log_abs_det.defined()) {
      local.outputs.push_back(matrix.log_abs_det);
    }
    return matrix;
  }

  /// Takes the stream and its gradient back, one after the other, so that one of
  /// them is there twice at a time. Returns the gradient of the matrix if it is
  /// wanted: of y = W x it is the gradient of y times x, and where x was made of
  /// y, the negative of that.
  static at::Tensor take_back(
      Direction direction,
      const at::Tensor& weight,
      const at::Tensor& inverse,
      bool wanted,
      AfterRun& after,
      BeforeRun& before) {
    at::Tensor grad_matrix;
    const bool arrived =
        detail::complete_gradients(after.grad_outputs, after.outputs);
    before.grad_inputs.resize(after.outputs.size());
    if (direction == Direction::kForward) {
      before.inputs = detail::channel_product(inverse, after.outputs);
      after.outputs.clear();
      if (arrived && wanted) {
        grad_matrix = detail::channel_outer(after.grad_outputs, before.inputs);
      }
      if (arrived) {
        before.grad_inputs =
            detail::channel_product(weight.t(), after.grad_outputs);
      }
    } else {
      if (arrived) {
        before.grad_inputs =
            detail::channel_product(inverse.t(), after.grad_outputs);
        after.grad_outputs.clear();
      }
      if (arrived && wanted) {
        grad_matrix =
            detail::channel_outer(before.grad_inputs, after.outputs).neg_();
      }
      before.inputs = detail::channel_product(weight, after.outputs);
    }
    return grad_matrix;
  }

  LogDet log_det() const override {
    return options_.parametrization() == kOrthogonal ? LogDet::kZero
                                                     : LogDet::kSample;
  }

  bool takes_halves_along(int64_t dim) const override {
    return dim == 1;
  }

  torch::nn::Module& module() override {
    return *this;
  }

  std::string type_name() const override {
    return "Conv1x1";
  }

  int64_t channels_;
  Conv1x1Options options_;
  std::shared_ptr<detail::ChannelMatrix> matrix_;
};

/// Mixes channels by a matrix, the same at each pixel: an invertible convolution
/// with a kernel of 1 x 1, a permutation that learns.
///
/// \f[ y = W x, \quad x = W^{-1} y \f]
///
/// It begins as a random rotation, whatever its parametrization.
///
/// Shapes:   input, output (N, C, *); W (C, C).
/// Dtypes:   floating point; the product is computed in the input's dtype, also
///           under autocast, the inverse and all that makes W in float64.
/// Log-det:  log |det W| times the pixels of a channel; 0 of kOrthogonal.
/// Memory:   keeps its output; in backward a stream more, one at a time.
/// Accuracy: a round trip loses the digits of the condition number of W: none of
///           kOrthogonal.
/// Throws:   c10::ValueError if the input has another number of channels, or if W
///           is singular where its inverse or its log-determinant is needed (on
///           the CPU; elsewhere the results are NaN and -inf).
/// Source:   Kingma and Dhariwal 2018, Glow, section 3.2, arXiv:1807.03039.
/// Example:
///   memcnn::Conv1x1 mix(
///       12, memcnn::Conv1x1Options().parametrization(memcnn::kOrthogonal));
TORCH_MODULE(Conv1x1);

} // namespace memcnn
