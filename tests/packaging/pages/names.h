// SPDX-License-Identifier: MIT
//
// What every C++ example of the documentation may name without saying where it
// comes from. docs/api/README.md lists it for readers: keep the two alike.
#pragma once

#include <memcnn/memcnn.h>

#include <torch/torch.h>

#include <cstdint>
#include <iomanip>
#include <iostream>
#include <string>
#include <tuple>
#include <vector>

namespace pages {

/// Convolution, batch norm, ReLU: from `in` channels to `out`, or to as many.
struct BranchImpl : torch::nn::Cloneable<BranchImpl> {
  explicit BranchImpl(int64_t channels) : BranchImpl(channels, channels) {}
  BranchImpl(int64_t in_, int64_t out_) : in(in_), out(out_) {
    reset();
  }
  void reset() override {
    conv = register_module(
        "conv",
        torch::nn::Conv2d(torch::nn::Conv2dOptions(in, out, 3).padding(1)));
    norm = register_module("norm", torch::nn::BatchNorm2d(out));
  }
  torch::Tensor forward(torch::Tensor x) {
    return torch::relu(norm(conv(x)));
  }

  int64_t in;
  int64_t out;
  torch::nn::Conv2d conv{nullptr};
  torch::nn::BatchNorm2d norm{nullptr};
};
TORCH_MODULE(Branch);

/// A convolution to twice the channels, as AffineAdapterSigmoid wants it.
struct WideImpl : torch::nn::Cloneable<WideImpl> {
  explicit WideImpl(int64_t channels_) : channels(channels_) {
    reset();
  }
  void reset() override {
    conv = register_module(
        "conv",
        torch::nn::Conv2d(
            torch::nn::Conv2dOptions(channels, 2 * channels, 3).padding(1)));
  }
  torch::Tensor forward(torch::Tensor x) {
    return conv(x);
  }

  int64_t channels;
  torch::nn::Conv2d conv{nullptr};
};
TORCH_MODULE(Wide);

/// Prints what a chain holds between forward and backward, with plain autograd
/// and without, and stops where the gradients differ.
inline void print_held(
    const char* name,
    memcnn::ReversibleSequence chain,
    const torch::Tensor& input) {
  std::cout << name << ":" << std::fixed << std::setprecision(1);
  torch::Tensor gradients[2]; // of all parameters, in a row
  for (const bool plain : {true, false}) {
    torch::manual_seed(0);
    chain->options.disable(plain);
    const memcnn::AllocationMeter meter;
    const torch::Tensor loss = chain(input).square().mean();
    std::cout << (plain ? " plain " : ", sequence ")
              << static_cast<double>(meter.held_bytes()) / (1 << 20) << " MiB";
    std::vector<torch::Tensor> parts;
    for (const auto& gradient :
         torch::autograd::grad({loss}, chain->parameters())) {
      parts.push_back(gradient.flatten());
    }
    gradients[plain] = torch::cat(parts);
  }
  // A ReLU within rounding of 0 goes either way, also in plain autograd.
  const auto error = (gradients[0] - gradients[1]).norm() / gradients[1].norm();
  TORCH_CHECK(error.item<double>() < 1e-2, "gradients are off by ", error);
  std::cout << "\n";
}

/// Each example runs as a member of a class derived from this one: it finds
/// these names, and may declare its own of the same.
struct Names {
  using Coupling = memcnn::AdditiveCoupling<Branch>;

  torch::Tensor images = torch::rand({2, 3, 32, 32});
  torch::Tensor x = torch::randn({2, 64, 8, 8}); // data: a leaf
  torch::nn::Conv2d stem{torch::nn::Conv2dOptions(64, 64, 3).padding(1)};
  torch::Tensor h = stem(x); // made by a layer, with a graph

  Branch f{32};
  Branch g{32};
  Coupling coupling{f, g};
  Coupling coupling_a{Branch(32), Branch(32)};
  Coupling coupling_b{Branch(32), Branch(32)};
  Coupling coupling_c{Branch(32), Branch(32)};
  Coupling coupling_d{Branch(32), Branch(32)};
  Coupling module{Branch(32), Branch(32)};
  memcnn::ReversibleSequence trunk{coupling_a, coupling_b, coupling_c};
  torch::nn::Conv2d down_sampling{
      torch::nn::Conv2dOptions(64, 128, 3).stride(2).padding(1)};
};

} // namespace pages
