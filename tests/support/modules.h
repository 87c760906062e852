// SPDX-License-Identifier: MIT
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace memcnn_test {

// Branches for couplings: small modules on images (N, C, H, W), or on the last
// dimension where they say so. Their weights come from the default generator:
// seed it with torch::manual_seed() first.

/// What a RevNet is made of, without a smooth derivative: convolution, batch
/// norm, ReLU.
struct ConvBranchImpl final : torch::nn::Cloneable<ConvBranchImpl> {
  explicit ConvBranchImpl(int64_t channels_) : channels(channels_) {
    reset();
  }
  void reset() override {
    using Options = torch::nn::Conv2dOptions;
    conv = register_module(
        "conv",
        torch::nn::Conv2d(
            Options(channels, channels, 3).padding(1).bias(false)));
    norm = register_module("norm", torch::nn::BatchNorm2d(channels));
  }
  torch::Tensor forward(torch::Tensor x) {
    return torch::relu(norm(conv(x)));
  }

  int64_t channels;
  torch::nn::Conv2d conv{nullptr};
  torch::nn::BatchNorm2d norm{nullptr};
};
TORCH_MODULE(ConvBranch);

/// Smooth, so that derivatives of any order exist; maps `in` channels to `out`.
struct SmoothBranchImpl final : torch::nn::Cloneable<SmoothBranchImpl> {
  explicit SmoothBranchImpl(int64_t channels)
      : SmoothBranchImpl(channels, channels) {}
  SmoothBranchImpl(int64_t in_, int64_t out_) : in(in_), out(out_) {
    reset();
  }
  void reset() override {
    conv = register_module(
        "conv",
        torch::nn::Conv2d(torch::nn::Conv2dOptions(in, out, 3).padding(1)));
  }
  torch::Tensor forward(torch::Tensor x) {
    return torch::tanh(conv(x));
  }

  int64_t in;
  int64_t out;
  torch::nn::Conv2d conv{nullptr};
};
TORCH_MODULE(SmoothBranch);

/// Returns twice the channels of the half that it updates, as the sigmoid
/// adapter wants it; smooth.
struct WideBranchImpl final : torch::nn::Cloneable<WideBranchImpl> {
  explicit WideBranchImpl(int64_t channels)
      : WideBranchImpl(channels, channels) {}
  WideBranchImpl(int64_t in_, int64_t updated_) : in(in_), updated(updated_) {
    reset();
  }
  void reset() override {
    conv = register_module(
        "conv",
        torch::nn::Conv2d(
            torch::nn::Conv2dOptions(in, 2 * updated, 3).padding(1)));
  }
  torch::Tensor forward(torch::Tensor x) {
    return torch::tanh(conv(x));
  }

  int64_t in;
  int64_t updated; // channels of the half that is updated
  torch::nn::Conv2d conv{nullptr};
};
TORCH_MODULE(WideBranch);

/// Draws random numbers in train mode.
struct DropoutBranchImpl final : torch::nn::Cloneable<DropoutBranchImpl> {
  explicit DropoutBranchImpl(int64_t channels_) : channels(channels_) {
    reset();
  }
  void reset() override {
    conv = register_module(
        "conv",
        torch::nn::Conv2d(
            torch::nn::Conv2dOptions(channels, channels, 3).padding(1)));
    dropout = register_module("dropout", torch::nn::Dropout(0.5));
  }
  torch::Tensor forward(torch::Tensor x) {
    return torch::tanh(dropout(conv(x)));
  }

  int64_t channels;
  torch::nn::Conv2d conv{nullptr};
  torch::nn::Dropout dropout{nullptr};
};
TORCH_MODULE(DropoutBranch);

/// Linear on the last dimension, then tanh; maps `in` entries to `out`.
struct LinearBranchImpl final : torch::nn::Cloneable<LinearBranchImpl> {
  explicit LinearBranchImpl(int64_t size) : LinearBranchImpl(size, size) {}
  LinearBranchImpl(int64_t in_, int64_t out_) : in(in_), out(out_) {
    reset();
  }
  void reset() override {
    linear = register_module("linear", torch::nn::Linear(in, out));
  }
  torch::Tensor forward(torch::Tensor x) {
    return torch::tanh(linear(x));
  }

  int64_t in;
  int64_t out;
  torch::nn::Linear linear{nullptr};
};
TORCH_MODULE(LinearBranch);

} // namespace memcnn_test
