// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/module_state.h>
#include <memcnn/detail/parts.h>
#include <memcnn/detail/saved.h>

#include <torch/nn/module.h>

#include <string>
#include <vector>

namespace memcnn::detail {

/// What a layer without branches reads of its own beside what it trains: frozen
/// parameters, and buffers. Trained ones are inputs of the layer's node, which
/// looks at them itself.
class ReadTensors {
 public:
  void note(const torch::nn::Module& layer) {
    for (const RegisteredTensors* registered :
         {&parameters_in(layer), &buffers_in(layer)}) {
      for (const auto& item : *registered) {
        if (item.value().defined() && !item.value().requires_grad()) {
          tensors_.push_back({item.key(), Saved(item.value())});
        }
      }
    }
  }

  /// Stops where one is not what it was.
  void check(const torch::nn::Module& layer) const {
    for (const Named& each : tensors_) {
      check_keeps_memory(each.tensor.keeps_memory(), each.name);
      check_read(each.tensor.unchanged(), each.name, each.tensor.get(), layer);
    }
  }

 private:
  struct Named {
    std::string name; // for messages
    Saved tensor;
  };

  std::vector<Named> tensors_;
};

} // namespace memcnn::detail
