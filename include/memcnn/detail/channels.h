// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/check_branch.h>
#include <memcnn/detail/check_input.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>

#include <ATen/Functions.h>
#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>

#include <cstddef>
#include <cstdint>

namespace memcnn::detail {

// Layers along the channels, dim 1, take a stream in parts: one whole tensor, or
// the two halves of it.

/// While it lives, operators compute in the dtype of their arguments, also under
/// autocast: what is to be undone must not round to fewer digits.
class NoAutocast {
  const c10::impl::ExcludeDispatchKeyGuard guard_{
      c10::autocast_dispatch_keyset};
};

/// Stops where a layer is made for no channels.
inline void check_channel_count(const char* layer, int64_t channels) {
  TORCH_CHECK_VALUE(
      channels > 0,
      layer,
      "::",
      layer,
      "(): expected at least 1 channel, but got ",
      channels,
      ". Give it the size of dim 1 of its input.");
}

/// Stops where the parts are not a stream of so many channels, (N, C, *).
inline void check_stream(
    const char* layer,
    Direction direction,
    const Tensors& parts,
    int64_t channels) {
  int64_t found = 0;
  for (const at::Tensor& part : parts) {
    check_has_channels(place_of(layer, direction), part);
    found += part.size(1);
  }
  TORCH_CHECK_VALUE(
      found == channels,
      place_of(layer, direction),
      "expected an input (N, C, *) with C = ",
      channels,
      " channels, but got ",
      found,
      " (input ",
      describe(parts[0]),
      "). Construct the layer with the channels of its input.");
}

/// How many numbers each channel of a sample has.
inline int64_t pixels_of(const at::Tensor& stream) {
  int64_t pixels = 1;
  for (int64_t dim = 2; dim < stream.dim(); ++dim) {
    pixels *= stream.size(dim);
  }
  return pixels;
}

/// All dimensions of a stream but the channels: what a sum over a channel goes
/// over.
inline at::DimVector all_but_channels(const at::Tensor& stream) {
  at::DimVector dims{0};
  for (int64_t dim = 2; dim < stream.dim(); ++dim) {
    dims.push_back(dim);
  }
  return dims;
}

/// A number for each channel, (C), as one that goes with each entry of a stream:
/// (C, 1, ..).
inline at::Tensor beside_pixels(
    const at::Tensor& numbers,
    const at::Tensor& stream) {
  at::DimVector sizes(static_cast<size_t>(stream.dim() - 1), 1);
  sizes[0] = numbers.numel();
  return numbers.view(sizes);
}

/// Whether what becomes of these is part of a graph.
inline bool is_graph_built(at::TensorList tensors) {
  if (at::GradMode::is_enabled()) {
    for (const at::Tensor& tensor : tensors) {
      if (tensor.requires_grad()) {
        return true;
      }
    }
  }
  return false;
}

} // namespace memcnn::detail
