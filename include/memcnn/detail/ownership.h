// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/tensors.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include <utility>

namespace memcnn::detail {

/// Whether nothing but this tensor refers to its memory, so that nobody sees
/// when it is overwritten.
inline bool is_sole_owner(const at::Tensor& tensor) {
  return tensor.defined() && tensor.use_count() == 1 && tensor.has_storage() &&
      tensor.storage().use_count() == 1 &&
      tensor.is_non_overlapping_and_dense();
}

/// Whether nothing but this tensor refers to its memory, or only what it is a
/// view of, whole, and that only for it: sums over dimensions end in such views.
inline bool is_its_own(const at::Tensor& tensor) {
  if (tensor.use_count() > 1 || !tensor.has_storage()) {
    return tensor.use_count() == 1;
  }
  const auto owners = tensor.storage().use_count();
  return owners == 1 ||
      (owners == 2 && tensor.is_view() && tensor._base().use_count() == 1 &&
       tensor.nbytes() == tensor.storage().nbytes());
}

/// What was just made, by itself: nobody is the sole owner of a view, which
/// refers to what it is a view of. With a graph it stays one.
inline at::Tensor no_view(const at::Tensor& made) {
  return made.requires_grad() ? made : detached(made);
}

/// The tensor, or a copy of it where others would see it change.
inline at::Tensor owned(at::Tensor tensor) {
  return is_sole_owner(tensor) ? std::move(tensor) : tensor.clone();
}

/// Likewise, in the memory layout of `like`. A loss often returns gradients in
/// another one, which every kernel of every block would convert again.
inline at::Tensor owned_as(const at::Tensor& like, at::Tensor tensor) {
  return is_sole_owner(tensor) && tensor.strides() == like.strides()
      ? std::move(tensor)
      : at::empty_like(like).copy_(tensor);
}

} // namespace memcnn::detail
