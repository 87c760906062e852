// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/batchnorm.h>

#include <memory>
#include <optional>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// Calls fn with the module as one of LibTorch's own batch normalisations, if
/// it is one; returns whether it is. A class derived from them may do anything
/// with the statistics that it inherits, and is none of them.
template <class Fn>
bool as_batch_norm(torch::nn::Module& module, Fn&& fn) {
  const auto try_as = [&](auto* type) {
    using Norm = std::remove_pointer_t<decltype(type)>;
    const bool is_norm = typeid(module) == typeid(Norm);
    if (is_norm) {
      fn(static_cast<Norm&>(module));
    }
    return is_norm;
  };
  return try_as(static_cast<torch::nn::BatchNorm2dImpl*>(nullptr)) ||
      try_as(static_cast<torch::nn::BatchNorm1dImpl*>(nullptr)) ||
      try_as(static_cast<torch::nn::BatchNorm3dImpl*>(nullptr));
}

/// Whether a part writes its buffers and never reads them: batch normalisation
/// that trains, which needs no copy of them to run again.
inline bool only_writes_its_buffers(torch::nn::Module& part) {
  return part.is_training() && as_batch_norm(part, [](auto&) {});
}

/// While it lives, batch normalisation that trains leaves its running
/// statistics as they are, and does not count: who reads the statistics in
/// between finds them, and no copy is needed.
class StatisticsStill {
 public:
  explicit StatisticsStill(
      const std::vector<std::shared_ptr<torch::nn::Module>>& parts) {
    for (const auto& part : parts) {
      if (!part->is_training()) {
        continue;
      }
      as_batch_norm(*part, [&](auto& norm) {
        if (norm.running_mean.defined()) {
          found_.push_back(
              {&norm.num_batches_tracked,
               std::move(norm.num_batches_tracked),
               &norm.options,
               norm.options.momentum()});
          // Without the count nothing is counted, and with momentum 0 nothing
          // is added: r becomes 0 * m + 1 * r. What is not finite becomes NaN.
          norm.num_batches_tracked = at::Tensor();
          norm.options.momentum(0.0);
        }
      });
    }
  }
  StatisticsStill(const StatisticsStill&) = delete;
  StatisticsStill& operator=(const StatisticsStill&) = delete;
  ~StatisticsStill() {
    // Last in, first out: a part may be listed twice.
    for (auto found = found_.rbegin(); found != found_.rend(); ++found) {
      *found->count = std::move(found->value);
      found->options->momentum(found->momentum);
    }
  }

 private:
  struct Found {
    at::Tensor* count;
    at::Tensor value;
    torch::nn::BatchNormOptions* options;
    std::optional<double> momentum;
  };
  std::vector<Found> found_;
};

} // namespace memcnn::detail
