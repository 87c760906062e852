// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/invertible.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// Runs what happens at a place. A c10::Error says where it was, unless it does
/// so already; other exceptions cannot be told, and pass as they are.
template <class Fn>
auto at_place(const std::string& place, const Fn& fn) {
  try {
    return fn();
  } catch (c10::Error& error) {
    const std::string words = error.what_without_backtrace();
    if (words.find(place) == std::string::npos) {
      error.add_context(place);
    }
    throw;
  }
}

/// A block whose errors say where it is, in backward too, where the caller is
/// far away.
class BlockAtPlace final : public Invertible {
 public:
  BlockAtPlace(std::string place, std::shared_ptr<Invertible> block)
      : place_(std::move(place)), block_(std::move(block)) {}

  std::vector<at::Tensor> run(
      Direction direction,
      std::vector<at::Tensor> inputs,
      Recording& recording) override {
    return at_place(place_, [&] {
      return block_->run(direction, std::move(inputs), recording);
    });
  }

  BeforeRun backward_step(
      Direction direction,
      AfterRun after,
      Recording& recording,
      ParameterGradients& parameters) override {
    return at_place(place_, [&] {
      return block_->backward_step(
          direction, std::move(after), recording, parameters);
    });
  }

  torch::nn::Module& module() override {
    return block_->module();
  }

  std::string type_name() const override {
    return block_->type_name();
  }

 private:
  std::string place_;
  std::shared_ptr<Invertible> block_;
};

} // namespace memcnn::detail
