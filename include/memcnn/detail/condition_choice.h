// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// Which of the conditions that a container is given a part of it gets: those
/// that push_back() said, or else as many as the part takes, in their order.
class ConditionChoice {
 public:
  explicit ConditionChoice(std::optional<std::vector<size_t>> chosen)
      : chosen_(std::move(chosen)) {}

  /// How many the container has to be given, so that the part gets its own.
  size_t needed(const Invertible& part) const {
    if (!chosen_) {
      return part.condition_count().value_or(0);
    }
    const auto last = std::max_element(chosen_->begin(), chosen_->end());
    return last == chosen_->end() ? 0 : *last + 1;
  }

  /// Those of the part.
  Tensors of(const Invertible& part, at::TensorList given) const {
    if (!chosen_) {
      return given.slice(0, needed(part)).vec();
    }
    Tensors conditions;
    for (const size_t place : *chosen_) {
      conditions.push_back(given[place]);
    }
    return conditions;
  }

  /// Which of the container's the j-th of the part is.
  size_t place(size_t j) const {
    return chosen_ ? (*chosen_)[j] : j;
  }

 private:
  std::optional<std::vector<size_t>> chosen_;
};

} // namespace memcnn::detail
