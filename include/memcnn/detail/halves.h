// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/check_input.h>
#include <memcnn/detail/dense.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/layout.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

namespace memcnn::detail {

/// What a coupling splits its input in.
using Halves = std::array<at::Tensor, 2>;

/// Interface: a module that takes channels apart along a dimension, which has
/// to be the one of the coupling around it.
class SplitsChannels {
 public:
  virtual ~SplitsChannels() = default;
  virtual int64_t split_dim() const = 0;
  /// Takes on the dimension of a coupling around it. False if it has one that
  /// is another for every input: -1 and 3 are one for an input of 4 dims.
  virtual bool take_split_dim(int64_t dim) = 0;
};

/// Stops where a tensor has no two halves. `place` begins the message.
inline void check_has_halves(
    const std::string& place,
    const at::Tensor& input,
    int64_t dim) {
  check_floating_point(place, input);
  const int64_t dims = input.dim();
  TORCH_CHECK_VALUE(
      -dims <= dim && dim < dims,
      place,
      "expected an input with a dim ",
      dim,
      " to split, but got ",
      describe(input),
      ". Add a dimension, or set CouplingOptions().split_dim().");
  const int64_t size = input.size(dim);
  TORCH_CHECK_VALUE(
      size >= 2,
      place,
      "expected at least 2 entries in dim ",
      dim,
      " to split into two halves, but got ",
      size,
      " (input sizes ",
      input.sizes(),
      "). Give more channels, or set CouplingOptions().split_dim().");
}

/// Splits a tensor in two dense ones along a dimension, in the given memory
/// format or, without one, in its own. The first half is the larger one where
/// the size is odd, as in torch::chunk. `place` begins an error.
inline Halves split_halves(
    const std::string& place,
    const at::Tensor& input,
    int64_t dim,
    std::optional<at::MemoryFormat> format = std::nullopt) {
  check_has_halves(place, input, dim);
  // What made the input runs the same kernels in backward as where the gradient
  // comes from backward_step().
  const at::Tensor whole = with_dense_gradient(input);
  const int64_t size = input.size(dim);
  const int64_t first = (size + 1) / 2;
  const auto half = [&](int64_t start, int64_t length) {
    const at::Tensor view = whole.narrow(dim, start, length);
    return format ? view.contiguous(*format) : dense(view);
  };
  return {half(0, first), half(first, size - first)};
}

} // namespace memcnn::detail
