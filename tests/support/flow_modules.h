// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cstdint>
#include <vector>

namespace memcnn_test {

// Modules of users for flows on images (N, C, H, W): branches that take
// conditions, and invertible modules with and without a log-determinant.

/// A branch that takes the half, and a condition of `condition` channels; twice
/// the channels of the half, as the adapters want it.
struct ConditionalBranchImpl final
    : torch::nn::Cloneable<ConditionalBranchImpl> {
  ConditionalBranchImpl(int64_t half_, int64_t condition_, int64_t out_)
      : half(half_), condition(condition_), out(out_) {
    reset();
  }
  void reset() override {
    conv = register_module(
        "conv",
        torch::nn::Conv2d(
            torch::nn::Conv2dOptions(half + condition, out, 3).padding(1)));
  }
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& c) {
    return torch::tanh(conv(torch::cat({x, c}, 1)));
  }

  int64_t half;
  int64_t condition;
  int64_t out;
  torch::nn::Conv2d conv{nullptr};
};
TORCH_MODULE(ConditionalBranch);

/// Says what its log-determinant is.
struct ScaledImpl final : torch::nn::Cloneable<ScaledImpl> {
  explicit ScaledImpl(int64_t channels_) : channels(channels_) {
    reset();
  }
  void reset() override {
    scale = register_parameter(
        "scale", torch::linspace(0.8, 1.2, channels).view({-1, 1, 1}));
    scale.data()[0].neg_();
  }
  torch::Tensor forward(const torch::Tensor& x) {
    return x * scale;
  }
  torch::Tensor inverse(const torch::Tensor& y) {
    return y / scale;
  }
  memcnn::WithLogDet forward_with_log_det(const torch::Tensor& x) {
    return {forward(x), log_det(x)};
  }
  memcnn::WithLogDet inverse_with_log_det(const torch::Tensor& y) {
    return {inverse(y), -log_det(y)};
  }
  torch::Tensor log_det(const torch::Tensor& x) const { // one for all samples
    return scale.abs().log().sum() * (x.size(2) * x.size(3));
  }

  int64_t channels;
  torch::Tensor scale;
};
TORCH_MODULE(Scaled);

/// Says that it keeps volumes.
struct FlippedImpl final : torch::nn::Cloneable<FlippedImpl>,
                           memcnn::PreservesVolume {
  void reset() override {}
  torch::Tensor forward(const torch::Tensor& x) {
    return x.flip(1);
  }
  torch::Tensor inverse(const torch::Tensor& y) {
    return y.flip(1);
  }
};
TORCH_MODULE(Flipped);

/// Says nothing.
struct SilentImpl final : torch::nn::Cloneable<SilentImpl> {
  void reset() override {}
  torch::Tensor forward(const torch::Tensor& x) {
    return 2 * x;
  }
  torch::Tensor inverse(const torch::Tensor& y) {
    return y / 2;
  }
};
TORCH_MODULE(Silent);

/// Takes a condition itself, and has a log-determinant for each sample.
struct ConditionalScaleImpl final : torch::nn::Cloneable<ConditionalScaleImpl> {
  void reset() override {}
  static torch::Tensor log_scale(const torch::Tensor& c) {
    return 0.1 * torch::tanh(c.mean({1, 2, 3}, /*keepdim=*/true));
  }
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& c) {
    return x * log_scale(c).exp();
  }
  torch::Tensor inverse(const torch::Tensor& y, const torch::Tensor& c) {
    return y * (-log_scale(c)).exp();
  }
  memcnn::WithLogDet forward_with_log_det(
      const torch::Tensor& x,
      const torch::Tensor& c) {
    return {forward(x, c), log_det(x, c)};
  }
  memcnn::WithLogDet inverse_with_log_det(
      const torch::Tensor& y,
      const torch::Tensor& c) {
    return {inverse(y, c), -log_det(y, c)};
  }
  static torch::Tensor log_det(const torch::Tensor& x, const torch::Tensor& c) {
    return log_scale(c).flatten() * (x[0].numel());
  }
};
TORCH_MODULE(ConditionalScale);

/// A result of a flow, as one map or as the other.
template <class Flow>
memcnn::WithLogDet map_with_log_det(
    Flow&& flow,
    memcnn::Direction direction,
    const torch::Tensor& x) {
  return direction == memcnn::Direction::kForward
      ? flow.forward_with_log_det(x)
      : flow.inverse_with_log_det(x);
}

/// log |det J| of each sample's Jacobian, by autograd: (N).
template <class Fn>
torch::Tensor log_det_of_jacobian(const Fn& map, const torch::Tensor& x) {
  const torch::Tensor leaf = x.detach().requires_grad_();
  const torch::Tensor y = map(leaf).flatten(1);
  std::vector<torch::Tensor> rows;
  for (int64_t i = 0; i < y.size(1); ++i) {
    // A sample's output is a function of that sample alone.
    rows.push_back(torch::autograd::grad(
                       {y.select(1, i).sum()},
                       {leaf},
                       /*grad_outputs=*/{},
                       /*retain_graph=*/true,
                       /*create_graph=*/false,
                       /*allow_unused=*/true)[0]
                       .flatten(1));
  }
  return std::get<1>(torch::linalg_slogdet(torch::stack(rows, 1)));
}

} // namespace memcnn_test
