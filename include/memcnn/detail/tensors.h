// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/describe.h>

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

namespace memcnn::detail {

/// Inputs, outputs or gradients of a run, in their order.
using Tensors = std::vector<at::Tensor>;

/// One list, and then another.
inline Tensors joined(Tensors first, at::TensorList second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}
inline std::vector<bool> joined(
    std::vector<bool> first,
    const std::vector<bool>& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

/// The last tensors of a list, taken off it.
inline Tensors split_off(Tensors& tensors, size_t count) {
  const auto middle = tensors.end() - static_cast<std::ptrdiff_t>(count);
  Tensors last(
      std::make_move_iterator(middle), std::make_move_iterator(tensors.end()));
  tensors.erase(middle, tensors.end());
  return last;
}

/// Others have no gradient, and are no function of one: they are not rebuilt.
inline bool is_differentiable(const at::Tensor& tensor) {
  return tensor.is_floating_point() || tensor.is_complex();
}

/// Where tensors are computed with: on the device of one that is not on the CPU,
/// if there is one.
inline at::Device compute_device_of(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    if (tensor.defined() && !tensor.is_cpu()) {
      return tensor.device();
    }
  }
  return at::kCPU;
}

/// A tensor's memory and version without its graph: detach(), but no operator,
/// which would cost as much as a small one does.
inline at::Tensor detached(const at::Tensor& tensor) {
  return tensor.tensor_data();
}

/// What holds a tensor's numbers: set_data() changes it, and no version.
/// Tensors of one memory are written together.
inline const void* memory_of(const at::Tensor& tensor) {
  return tensor.has_storage()
      ? static_cast<const void*>(tensor.storage().unsafeGetStorageImpl())
      : tensor.unsafeGetTensorImpl();
}

/// Which memory a tensor has, noted without holding it. It stays known where that
/// is let go: what takes its place is not mistaken for it.
class NotedMemory {
 public:
  NotedMemory() = default;
  explicit NotedMemory(const at::Tensor& tensor) : memory_(memory_of(tensor)) {
    if (tensor.has_storage()) {
      storage_ = tensor.storage().getWeakStorageImpl();
    }
  }

  bool is_of(const at::Tensor& tensor) const {
    return memory_of(tensor) == memory_;
  }

 private:
  const void* memory_ = nullptr;
  // Until this goes nothing else can be where the storage was.
  std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> storage_;
};

/// How often a tensor was written; inference tensors do not count.
inline uint32_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference()
      ? 0
      : tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

/// What a tensor is like, its values apart.
struct TensorMeta {
  explicit TensorMeta(const at::Tensor& tensor)
      : sizes(tensor.sizes()),
        strides(strides_of(tensor)),
        dtype(tensor.scalar_type()),
        device(tensor.device()) {}

  /// Whether a tensor is like this.
  bool fits(const at::Tensor& tensor) const {
    return tensor.defined() && tensor.sizes() == at::IntArrayRef(sizes) &&
        tensor.scalar_type() == dtype && tensor.device() == device;
  }

  at::DimVector sizes;
  at::DimVector strides; // none of a sparse tensor
  at::ScalarType dtype;
  at::Device device;

 private:
  static at::IntArrayRef strides_of(const at::Tensor& tensor) {
    return tensor.layout() == at::kStrided ? tensor.strides()
                                           : at::IntArrayRef();
  }
};

inline std::string describe(const TensorMeta& meta) {
  return describe(meta.sizes, meta.dtype, meta.device);
}

} // namespace memcnn::detail
