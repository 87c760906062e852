// SPDX-License-Identifier: MIT
#pragma once

#include <torch/torch.h>

#include <ATen/autocast_mode.h>

#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace memcnn_test {

/// A linear branch on the last dimension that first tells a probe about its
/// argument.
struct ProbedLinearImpl final : torch::nn::Cloneable<ProbedLinearImpl> {
  using Probe = std::function<void(const torch::Tensor&)>;

  ProbedLinearImpl(int64_t size_, Probe probe_)
      : size(size_), probe(std::move(probe_)) {
    reset();
  }
  void reset() override {
    linear = register_module("linear", torch::nn::Linear(size, size));
  }
  torch::Tensor forward(torch::Tensor x) {
    probe(x);
    return linear(x);
  }

  int64_t size;
  Probe probe;
  torch::nn::Linear linear{nullptr};
};
TORCH_MODULE(ProbedLinear);

/// Scales its argument by a weight, and tells a probe about the argument and, in
/// backward, about the gradient of the product.
struct ProbedProductImpl final : torch::nn::Cloneable<ProbedProductImpl> {
  using Probe = std::function<void(const torch::Tensor&)>;

  explicit ProbedProductImpl(Probe probe_) : probe(std::move(probe_)) {
    reset();
  }
  void reset() override {
    weight = register_parameter("weight", torch::full({1}, 0.5));
  }
  torch::Tensor forward(torch::Tensor x) {
    probe(x);
    torch::Tensor product = x * weight;
    if (product.requires_grad()) {
      product.register_hook(
          [probe = probe](torch::Tensor gradient) { probe(gradient); });
    }
    return product;
  }

  Probe probe;
  torch::Tensor weight;
};
TORCH_MODULE(ProbedProduct);

/// Scales its argument by a buffer that every forward in train mode changes, as
/// a power iteration does.
struct CountingImpl final : torch::nn::Cloneable<CountingImpl> {
  CountingImpl() {
    reset();
  }
  void reset() override {
    count = register_buffer("count", torch::ones({1}, torch::kDouble));
    weight =
        register_parameter("weight", torch::full({1}, 0.5, torch::kDouble));
  }
  torch::Tensor forward(torch::Tensor x) {
    if (is_training()) {
      torch::NoGradGuard no_grad;
      count.mul_(1.5);
    }
    return torch::tanh(x * weight) * count.clone();
  }

  torch::Tensor count;
  torch::Tensor weight;
};
TORCH_MODULE(Counting);

/// A linear branch that throws in the run of a given number, counted from 1.
struct ThrowingImpl final : torch::nn::Cloneable<ThrowingImpl> {
  explicit ThrowingImpl(int64_t size_, int throw_in_run_)
      : size(size_), throw_in_run(throw_in_run_) {
    reset();
  }
  void reset() override {
    linear = register_module("linear", torch::nn::Linear(size, size));
  }
  torch::Tensor forward(torch::Tensor x) {
    if (++runs == throw_in_run) {
      throw std::domain_error("the branch gave up");
    }
    return torch::tanh(linear(x));
  }

  int64_t size;
  int throw_in_run;
  int runs = 0;
  torch::nn::Linear linear{nullptr};
};
TORCH_MODULE(Throwing);

/// Its inverse does to the output what it is told, and undoes nothing.
struct WrongInverseImpl final : torch::nn::Cloneable<WrongInverseImpl> {
  using Map = std::function<torch::Tensor(const torch::Tensor&)>;

  explicit WrongInverseImpl(Map wrong_) : wrong(std::move(wrong_)) {}
  void reset() override {}
  torch::Tensor forward(torch::Tensor x) {
    return x * 2;
  }
  torch::Tensor inverse(torch::Tensor y) {
    return wrong(y);
  }

  Map wrong;
};
TORCH_MODULE(WrongInverse);

} // namespace memcnn_test
