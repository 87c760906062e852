// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/check_input.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/layout.h>
#include <memcnn/detail/ownership.h>

#include <ATen/Functions.h>
#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace memcnn::detail {

// Below a tensor is taken apart in (N, C, s1, s2, .., a, b, ..): the entries of
// each block of s1 x s2 x .. pixels, one block at each of a x b x .. places.

/// The stride of each dimension after dim 1, of which there are one to three; a
/// single number is that of all. Stops where an input has other dimensions.
/// `place` begins a message.
inline at::DimVector strides_for(
    const std::string& place,
    const at::Tensor& input,
    at::IntArrayRef strides) {
  check_floating_point(place, input);
  const int64_t dims = input.dim() - 2;
  TORCH_CHECK_VALUE(
      1 <= dims && dims <= 3,
      place,
      "expected an input (N, C, *) of 3 to 5 dims, but got ",
      describe(input),
      ". Add the batch with unsqueeze(0), or flatten dimensions that belong "
      "together.");
  if (strides.size() == 1) {
    return at::DimVector(static_cast<size_t>(dims), strides[0]);
  }
  TORCH_CHECK_VALUE(
      static_cast<size_t>(dims) == strides.size(),
      place,
      "expected an input (N, C, *) with a dim for each of the strides ",
      strides,
      ", but got ",
      describe(input),
      ". Give a stride for each dimension after the channels, or one for all.");
  return {strides.begin(), strides.end()};
}

/// How many entries a block has.
inline int64_t entries_of_block(at::IntArrayRef strides) {
  int64_t entries = 1;
  for (const int64_t stride : strides) {
    entries *= stride;
  }
  return entries;
}

/// Stops where the sizes of an input are no multiples of the strides.
inline void check_pixels(
    const std::string& place,
    const at::Tensor& input,
    at::IntArrayRef strides) {
  for (size_t i = 0; i < strides.size(); ++i) {
    TORCH_CHECK_VALUE(
        input.size(static_cast<int64_t>(i) + 2) % strides[i] == 0,
        place,
        "expected sizes that are multiples of the strides ",
        strides,
        " after the channels, but got ",
        describe(input),
        ". Pad the input, or crop it.");
  }
}

/// Stops where the channels are not those of whole blocks.
inline void check_channels(
    const std::string& place,
    const at::Tensor& input,
    at::IntArrayRef strides) {
  TORCH_CHECK_VALUE(
      input.size(1) % entries_of_block(strides) == 0,
      place,
      "expected a multiple of ",
      entries_of_block(strides),
      " channels, the entries of a block of strides ",
      strides,
      ", but got ",
      describe(input),
      ". Pass what forward() returns.");
}

/// The blocks of (N, C, s1 a, s2 b, ..): a view.
inline at::Tensor blocks_of_pixels(
    const at::Tensor& tensor,
    at::IntArrayRef strides) {
  at::DimVector sizes{tensor.size(0), tensor.size(1)}; // (N, C, a, s1, b, s2)
  at::DimVector order{0, 1};
  for (size_t i = 0; i < strides.size(); ++i) {
    const auto dim = static_cast<int64_t>(i) + 2;
    sizes.push_back(tensor.size(dim) / strides[i]);
    sizes.push_back(strides[i]);
    order.push_back(2 * dim - 1);
  }
  for (size_t i = 0; i < strides.size(); ++i) {
    order.push_back(2 * static_cast<int64_t>(i) + 2);
  }
  return tensor.view(sizes).permute(order);
}

/// The blocks of (N, C s1 s2 .., a, b, ..), with each place's entries beside it:
/// (N, C, a, s1, b, s2, ..). A view.
inline at::Tensor blocks_of_channels(
    const at::Tensor& tensor,
    at::IntArrayRef strides) {
  const auto count = static_cast<int64_t>(strides.size());
  at::DimVector sizes{
      tensor.size(0), tensor.size(1) / entries_of_block(strides)};
  sizes.append(strides.begin(), strides.end());
  at::DimVector order{0, 1};
  for (int64_t i = 0; i < count; ++i) {
    sizes.push_back(tensor.size(2 + i));
    order.push_back(2 + count + i);
    order.push_back(2 + i);
  }
  return tensor.view(sizes).permute(order);
}

/// A dense copy in other sizes, (N, C', a', b', ..), of a tensor whose dimensions
/// up to `channel_dims` after the first hold the channels. These are last in its
/// memory where `like` has them so.
inline at::Tensor merged_copy(
    const at::Tensor& parts,
    int64_t channel_dims,
    at::DimVector sizes,
    const at::Tensor& like) {
  const bool channels_last =
      like.suggest_memory_format() != at::MemoryFormat::Contiguous;
  at::Tensor source = parts;
  if (channels_last) {
    for (int64_t i = 0; i < channel_dims; ++i) {
      source = source.movedim(1, -1);
    }
    sizes.push_back(sizes[1]);
    sizes.erase(sizes.begin() + 1);
  }
  const at::Tensor copy =
      source.clone(at::MemoryFormat::Contiguous).view(sizes);
  return no_view(channels_last ? copy.movedim(-1, 1) : copy);
}

/// Moves each block of pixels to channels, (N, C, s1 a, s2 b, ..) to
/// (N, C s1 s2 .., a, b, ..), in one copy: of one to three dimensions, each a
/// multiple of its stride. Channel c gives channels c k to c k + k - 1, the k
/// entries of a block in the order of their rows, as torch::pixel_unshuffle
/// does.
inline at::Tensor squeezed(const at::Tensor& tensor, at::IntArrayRef strides) {
  const at::Tensor whole = with_dense_gradient(tensor);
  at::DimVector sizes{
      tensor.size(0), tensor.size(1) * entries_of_block(strides)};
  for (size_t i = 0; i < strides.size(); ++i) {
    sizes.push_back(tensor.size(static_cast<int64_t>(i) + 2) / strides[i]);
  }
  return merged_copy(
      blocks_of_pixels(whole, strides),
      /*channel_dims=*/1 + static_cast<int64_t>(strides.size()),
      std::move(sizes),
      tensor);
}

/// Undoes squeezed().
inline at::Tensor unsqueezed(
    const at::Tensor& tensor,
    at::IntArrayRef strides) {
  const at::Tensor whole = with_dense_gradient(tensor);
  at::DimVector sizes{
      tensor.size(0), tensor.size(1) / entries_of_block(strides)};
  for (size_t i = 0; i < strides.size(); ++i) {
    sizes.push_back(tensor.size(static_cast<int64_t>(i) + 2) * strides[i]);
  }
  return merged_copy(
      blocks_of_channels(whole, strides),
      /*channel_dims=*/1,
      std::move(sizes),
      tensor);
}

} // namespace memcnn::detail
