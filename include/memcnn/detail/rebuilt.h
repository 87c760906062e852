// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/describe.h>
#include <memcnn/detail/tensors.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// Whether nothing is to be rebuilt.
inline bool all_defined(const Tensors& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor& t) {
    return t.defined();
  });
}

inline bool none_defined(const Tensors& tensors) {
  return std::none_of(tensors.begin(), tensors.end(), [](const at::Tensor& t) {
    return t.defined();
  });
}

/// The rebuilt inputs, but for those that were kept.
inline Tensors kept_or(const Tensors& kept, Tensors rebuilt) {
  for (size_t i = 0; i < kept.size(); ++i) {
    if (kept[i].defined()) {
      rebuilt[i] = kept[i];
    }
  }
  return rebuilt;
}

/// Stops where the inputs that `maker` rebuilt are not what a run of `map` took
/// in (Note [Recomputation], rule 8): in their number, or, where `inputs` says
/// what they were like, in sizes, dtype or device. Those in `kept` are the true
/// ones.
inline void check_rebuilt(
    const std::string& block,
    const char* map,
    const char* maker,
    const Tensors& rebuilt,
    const Tensors& kept,
    const std::vector<TensorMeta>& inputs) {
  TORCH_CHECK(
      rebuilt.size() == kept.size(),
      block,
      "::backward(): expected ",
      maker,
      "() to return the ",
      kept.size(),
      " inputs of ",
      map,
      "(), but got ",
      rebuilt.size(),
      " tensors. Return one tensor for each input, in their order.");
  for (size_t i = 0; i < inputs.size(); ++i) {
    TORCH_CHECK(
        kept[i].defined() || inputs[i].fits(rebuilt[i]),
        block,
        "::backward(): expected ",
        maker,
        "() to rebuild an input of ",
        describe(inputs[i]),
        ", but got ",
        describe(rebuilt[i]),
        ". Let it undo ",
        map,
        "(); is_invertible_module() checks that.");
  }
}

} // namespace memcnn::detail
