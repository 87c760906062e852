// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace memcnn::detail {

/// The bytes that some tensors hold together: memory that several of them share,
/// if only until one of them is written, counts once, and no longer than the
/// last of them is counted.
class HeldBytes : public std::enable_shared_from_this<HeldBytes> {
 public:
  /// Counts a tensor while it lives, and has to go before the tensor does:
  /// freed memory may be another tensor's at once.
  class Share {
   public:
    Share() = default;
    Share(std::shared_ptr<HeldBytes> held, const void* memory)
        : held_(std::move(held)), memory_(memory) {}
    Share(Share&& other) noexcept = default;
    Share& operator=(Share&& other) noexcept {
      std::swap(held_, other.held_);
      std::swap(memory_, other.memory_);
      return *this;
    }
    ~Share() {
      if (held_ != nullptr) {
        held_->release(memory_);
      }
    }

    /// What its memory takes, if no other tensor that is counted has it.
    int64_t bytes_alone() const {
      return held_ != nullptr ? held_->bytes_alone(memory_) : 0;
    }

   private:
    std::shared_ptr<HeldBytes> held_;
    const void* memory_ = nullptr;
  };

  /// What this tensor holds is there anyway, and costs nothing.
  void pass_over(const at::Tensor& tensor) {
    const std::lock_guard lock(mutex_);
    memories_.emplace(address_of(tensor), Memory{/*bytes=*/0, /*shares=*/1});
  }

  Share count(const at::Tensor& tensor) {
    const std::lock_guard lock(mutex_);
    Memory& memory = memories_[address_of(tensor)];
    if (memory.shares++ == 0) {
      memory.bytes = bytes_of(tensor);
      total_ += memory.bytes;
    }
    return {shared_from_this(), address_of(tensor)};
  }

  int64_t total() const {
    const std::lock_guard lock(mutex_);
    return total_;
  }

 private:
  struct Memory {
    int64_t bytes = 0;
    int64_t shares = 0;
  };

  int64_t bytes_alone(const void* address) const {
    const std::lock_guard lock(mutex_);
    const Memory& memory = memories_.at(address);
    return memory.shares == 1 ? memory.bytes : 0;
  }

  void release(const void* address) {
    const std::lock_guard lock(mutex_);
    const auto found = memories_.find(address);
    if (--found->second.shares == 0) {
      total_ -= found->second.bytes;
      memories_.erase(found);
    }
  }

  /// Of its numbers: copy-on-write aliases have storages of their own.
  static const void* address_of(const at::Tensor& tensor) {
    const void* data = tensor.has_storage() ? tensor.storage().data() : nullptr;
    return data != nullptr ? data : memory_of(tensor);
  }

  /// Of all its memory, where it is a part of that.
  static int64_t bytes_of(const at::Tensor& tensor) {
    return tensor.has_storage()
        ? static_cast<int64_t>(tensor.storage().nbytes())
        : tensor.numel() * static_cast<int64_t>(tensor.element_size());
  }

  mutable std::mutex mutex_; // the graph may be freed in another thread
  std::unordered_map<const void*, Memory> memories_;
  int64_t total_ = 0;
};

} // namespace memcnn::detail
