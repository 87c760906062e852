// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/channels.h>
#include <memcnn/detail/check_branch.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/layout.h>
#include <memcnn/detail/local_run.h>
#include <memcnn/detail/log_det_sum.h>
#include <memcnn/detail/orthogonal_matrix.h>
#include <memcnn/detail/ownership.h>
#include <memcnn/detail/squeezed.h>
#include <memcnn/detail/tensor_map.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace memcnn {

/// What an OrthogonalDownsampling does before it has learnt anything.
enum class DownsamplingStart {
  kHaar, ///< Haar's wavelet: the first channel of each is a mean
  kSqueeze ///< each pixel of a block becomes a channel as it is
};
inline constexpr DownsamplingStart kHaar = DownsamplingStart::kHaar;
inline constexpr DownsamplingStart kSqueeze = DownsamplingStart::kSqueeze;

/// Options of an OrthogonalDownsampling, fixed once it is constructed.
struct OrthogonalDownsamplingOptions {
  /// kHaar or kSqueeze. With a stride above 2 there is no Haar: it begins as the
  /// squeeze. Default: kHaar.
  TORCH_ARG(DownsamplingStart, start) = kHaar;
};

/// The module behind OrthogonalDownsampling.
class OrthogonalDownsamplingImpl final
    : public torch::nn::Cloneable<OrthogonalDownsamplingImpl>,
      public detail::TensorMap {
 public:
  OrthogonalDownsamplingImpl(
      int64_t channels,
      std::vector<int64_t> strides,
      const OrthogonalDownsamplingOptions& options = {})
      : channels_(channels), strides_(std::move(strides)), options_(options) {
    detail::check_channel_count(kName, channels);
    TORCH_CHECK_VALUE(
        1 <= strides_.size() && strides_.size() <= 3 &&
            *std::min_element(strides_.begin(), strides_.end()) >= 1,
        kName,
        "::",
        kName,
        "(): expected one to three strides from 1 on, but got ",
        at::IntArrayRef(strides_),
        ". Give one for each dimension after the channels, as in {2, 2}.");
    reset();
  }

  void reset() override {
    const int64_t k = detail::entries_of_block(strides_);
    matrix_ = std::make_shared<detail::OrthogonalMatrix>(
        *this, start().expand({channels_, k, k}));
  }

  at::Tensor forward(const at::Tensor& input) {
    return TensorMap::forward(input); // AnyModule wants it of this class
  }

  /// As they were given.
  const OrthogonalDownsamplingOptions& options() const {
    return options_;
  }

  /// The matrices, (C, k, k), one for the blocks of each channel, with the graph
  /// of the parameters.
  at::Tensor weight() const {
    const detail::NoAutocast no_autocast;
    return matrix_->value().to(parameters()[0].scalar_type());
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::" << kName << "(" << channels_
           << ", strides=" << at::IntArrayRef(strides_) << ")";
  }

 private:
  using Tensors = detail::Tensors;
  static constexpr const char* kName = "OrthogonalDownsampling";

  /// The matrix for a block of each channel, (k, k). Haar's is the product of
  /// those of its dimensions.
  at::Tensor start() const {
    const bool is_haar = options_.start() == kHaar &&
        *std::max_element(strides_.begin(), strides_.end()) <= 2;
    const at::Tensor pair =
        at::tensor({1., 1., 1., -1.}, at::kDouble).view({2, 2}) / std::sqrt(2.);
    at::Tensor matrix = at::eye(1, at::kDouble);
    for (const int64_t stride : strides_) {
      matrix = at::kron(
          matrix, is_haar && stride == 2 ? pair : at::eye(stride, at::kDouble));
    }
    return matrix;
  }

  Tensors run_with(
      Direction direction,
      Tensors inputs,
      const RunExtras& extras,
      Recording& recording) override {
    check_extras(direction, extras);
    check_sizes(direction, inputs);
    recording.read(*this);
    const detail::NoAutocast no_autocast;
    const at::Tensor matrix = matrix_->value().to(inputs[0].scalar_type());
    return {
        direction == Direction::kForward
            ? product(matrix, detail::squeezed(inputs[0], strides_))
            : detail::unsqueezed(product(matrix.mT(), inputs[0]), strides_)};
  }

  /// With the matrices' own graph, C x k x k, which takes their gradient to the
  /// parameters. Of y = Q z, z the squeezed stream, that is gy z^T.
  BeforeRun backward_step(
      Direction direction,
      AfterRun after,
      Recording& recording,
      ParameterGradients& parameters) override {
    if (after.kept_inputs[0].defined()) { // nothing is to be undone
      return Invertible::backward_step(
          direction, std::move(after), recording, parameters);
    }
    if (!after.grad_outputs[0].defined()) { // no gradient arrived
      return {
          run_with(
              opposite(direction),
              std::move(after.outputs),
              RunExtras(),
              recording),
          Tensors(1),
          {}};
    }
    recording.read(*this);
    const detail::NoAutocast no_autocast;
    detail::LocalRun local(*this, {}, {}, parameters);
    {
      const at::AutoGradMode with_graph(local.needs_graph());
      local.outputs = {matrix_->value()};
    }
    at::Tensor stream = std::move(after.outputs[0]);
    at::Tensor grad = std::move(after.grad_outputs[0]);
    const at::Tensor matrix =
        detail::detached(local.outputs[0]).to(stream.scalar_type());
    at::Tensor grad_matrix;
    if (direction == Direction::kForward) {
      stream = product(matrix.mT(), stream);
      if (local.needs_graph()) {
        grad_matrix = outer(grad, stream);
      }
      stream = detail::unsqueezed(stream, strides_);
      grad = after.needs_grad[0]
          ? detail::unsqueezed(product(matrix.mT(), grad), strides_)
          : at::Tensor();
    } else {
      stream = product(matrix, detail::squeezed(stream, strides_));
      grad = detail::squeezed(grad, strides_);
      if (local.needs_graph()) {
        grad_matrix = outer(stream, grad);
      }
      grad = after.needs_grad[0] ? product(matrix, grad) : at::Tensor();
    }
    local.gradients({std::move(grad_matrix)});
    return {{std::move(stream)}, {std::move(grad)}, {}};
  }

  /// A squeezed stream, (N, C k, *), by blocks: (N, C, k, P).
  at::Tensor blocks_of(const at::Tensor& squeezed) const {
    return squeezed.reshape(
        {squeezed.size(0),
         channels_,
         squeezed.size(1) / channels_,
         detail::pixels_of(squeezed)});
  }

  /// The products of the matrices, (C, k, k), and the blocks of a squeezed stream.
  at::Tensor product(const at::Tensor& matrices, const at::Tensor& squeezed)
      const {
    const at::Tensor result =
        at::matmul(matrices, blocks_of(squeezed)).view(squeezed.sizes());
    return detail::no_view(detail::laid_out_as(squeezed, result));
  }

  /// The sum over samples and pixels of the products of each entry of a block of
  /// one squeezed stream and each of another's, (C, k, k).
  at::Tensor outer(const at::Tensor& rows, const at::Tensor& columns) const {
    return at::matmul(blocks_of(rows), blocks_of(columns).mT())
        .sum(0, /*keepdim=*/false, detail::LogDetSum::dtype_for(rows));
  }

  void check_sizes(Direction direction, const Tensors& inputs) const {
    const at::Tensor& input = inputs[0];
    const bool is_forward = direction == Direction::kForward;
    const int64_t k = detail::entries_of_block(strides_);
    const std::string place = detail::place_of(kName, direction);
    detail::check_stream(
        kName, direction, inputs, is_forward ? channels_ : channels_ * k);
    TORCH_CHECK_VALUE(
        input.dim() == static_cast<int64_t>(strides_.size()) + 2,
        place,
        "expected an input (N, C, *) with a dim for each of the strides ",
        at::IntArrayRef(strides_),
        ", but got ",
        detail::describe(input),
        ". Construct the layer with a stride for each dimension after the "
        "channels.");
    if (is_forward) {
      detail::check_pixels(place, input, strides_);
    }
  }

  LogDet log_det() const override {
    return LogDet::kZero;
  }

  torch::nn::Module& module() override {
    return *this;
  }

  std::string type_name() const override {
    return kName;
  }

  int64_t channels_;
  std::vector<int64_t> strides_;
  OrthogonalDownsamplingOptions options_;
  std::shared_ptr<detail::OrthogonalMatrix> matrix_;
};

/// Trades pixels for channels by an orthogonal matrix that learns: a strided
/// convolution, of each channel by itself, that can be undone.
///
/// \f[ y_c = Q_c z_c, \quad z = \mathrm{squeeze}(x), \quad
///     z_c = Q_c^T y_c \f]
///
/// Shapes:   (N, C, s1 a, ..) to (N, k C, a, ..), of one to three dimensions
///           after the channels; k the product of the strides. Channels are
///           ordered as those of Squeeze and Haar.
/// Dtypes:   floating point; the product is computed in the input's dtype, also
///           under autocast, Q in float64.
/// Log-det:  0 for every sample.
/// Memory:   keeps its output; in backward a stream more, one at a time.
/// Accuracy: lengths are kept, so that errors do not grow.
/// Throws:   c10::ValueError for other channels, or sizes that are no multiples
///           of the strides.
/// Source:   Etmann et al. 2020, iUNets: Fully invertible U-Nets with learnable
///           up- and downsampling, arXiv:2005.05220. Differs: Cayley's transform
///           times a fixed matrix, in place of a matrix exponential.
/// Example:
///   memcnn::OrthogonalDownsampling down(16, {2, 2, 2});
class OrthogonalDownsampling
    : public torch::nn::ModuleHolder<OrthogonalDownsamplingImpl> {
 public:
  using torch::nn::ModuleHolder<OrthogonalDownsamplingImpl>::ModuleHolder;
  using Impl = OrthogonalDownsamplingImpl;

  OrthogonalDownsampling(
      int64_t channels,
      std::vector<int64_t> strides,
      const OrthogonalDownsamplingOptions& options = {})
      : ModuleHolder(std::make_shared<OrthogonalDownsamplingImpl>(
            channels,
            std::move(strides),
            options)) {}
};

} // namespace memcnn
