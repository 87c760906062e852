// SPDX-License-Identifier: MIT
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>

namespace memcnn {

namespace detail {

/// The ledger behind an AllocationMeter. The allocators of LibTorch report to
/// it, from any thread that works for the thread of the meter.
class AllocationLedger final : public c10::MemoryReportingInfoBase {
 public:
  explicit AllocationLedger(std::optional<c10::DeviceType> only)
      : only_(only),
        scope_(c10::ThreadLocalDebugInfo::current()),
        outer_(running()) {}

  /// The ledger of the meter around this place, or null.
  static AllocationLedger* running() {
    return dynamic_cast<AllocationLedger*>(
        c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE));
  }

  /// Whether a profiler of another kind runs. It takes what stands in its place
  /// for one of its own, so that no meter can run inside it.
  static bool other_profiler_runs() {
    return running() == nullptr &&
        c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE) !=
        nullptr;
  }

  void reportMemoryUsage(
      void* pointer,
      int64_t bytes,
      size_t allocated,
      size_t reserved,
      c10::Device device) override {
    if (!only_ || *only_ == device.type()) {
      const std::lock_guard<std::mutex> lock(mutex_);
      record(pointer, bytes);
    }
    if (outer_ != nullptr) {
      outer_->reportMemoryUsage(pointer, bytes, allocated, reserved, device);
    }
  }

  bool memoryProfilingEnabled() const override {
    return true;
  }

  int64_t held() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return held_;
  }

  int64_t peak() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return peak_;
  }

  void reset_peak() {
    const std::lock_guard<std::mutex> lock(mutex_);
    peak_ = held_;
  }

 private:
  void record(void* pointer, int64_t bytes) {
    // A block seen before was freed where nobody reported it, or is freed now.
    if (const auto known = live_.find(pointer); known != live_.end()) {
      held_ -= known->second;
      live_.erase(known);
    }
    if (bytes > 0) {
      live_.emplace(pointer, bytes);
      held_ += bytes;
      peak_ = (std::max)(peak_, held_);
    }
  }

  const std::optional<c10::DeviceType> only_;
  const std::shared_ptr<c10::ThreadLocalDebugInfo> scope_; // keeps outer_ alive
  AllocationLedger* const outer_;
  mutable std::mutex mutex_;
  std::unordered_map<void*, int64_t> live_;
  int64_t held_ = 0;
  int64_t peak_ = 0;
};

} // namespace detail

/// Counts the bytes of tensor memory that are taken while it lives.
///
/// LibTorch's allocators of every device report each block to the profiler of
/// the running thread; the meter is such a profiler. It follows the work of its
/// thread into the threads of autograd, but not into threads that the program
/// starts itself. Blocks taken before it started count neither when they are
/// there nor when they go; LibTorch logs the first of these that goes as a
/// "memory block of unknown size", which is no error. Meters nest: the outer
/// one goes on counting. A replay of a CUDA graph takes no memory: meter its
/// capture.
///
/// Memory:   about 50 bytes per live block; no device is synchronised.
/// Accuracy: exact; on CUDA in the allocator's blocks, multiples of 512 bytes.
/// Throws:   c10::Error inside a torch profiler.
/// Avoid if: a torch profiler has to start and stop inside its scope.
/// Source:   c10::MemoryReportingInfoBase, c10/core/Allocator.h.
/// Example:
///   memcnn::AllocationMeter meter;
///   auto loss = model->forward(x).sum();
///   const int64_t held_after_forward = meter.held_bytes();
///   loss.backward();
///   const int64_t peak_of_the_step = meter.peak_bytes();
class AllocationMeter final {
 public:
  /// Counts one type of device, or all of them.
  explicit AllocationMeter(std::optional<c10::DeviceType> only = std::nullopt)
      : ledger_(make_ledger(only)),
        guard_(c10::DebugInfoKind::PROFILER_STATE, ledger_) {}

  /// Whether a meter can run here: not inside a torch profiler.
  static bool is_available() {
    return !detail::AllocationLedger::other_profiler_runs();
  }

  AllocationMeter(const AllocationMeter&) = delete;
  AllocationMeter& operator=(const AllocationMeter&) = delete;

  /// Bytes taken since the start and not given back, by now.
  int64_t held_bytes() const {
    return ledger_->held();
  }

  /// Largest value of held_bytes() since the start or the last reset_peak().
  int64_t peak_bytes() const {
    return ledger_->peak();
  }

  /// Starts a new search for the peak at what is held now.
  void reset_peak() {
    ledger_->reset_peak();
  }

 private:
  static std::shared_ptr<detail::AllocationLedger> make_ledger(
      std::optional<c10::DeviceType> only) {
    TORCH_CHECK(
        is_available(),
        "AllocationMeter::AllocationMeter(): expected no torch profiler in "
        "this thread, but got one that runs. Start the meter outside of it.");
    return std::make_shared<detail::AllocationLedger>(only);
  }

  std::shared_ptr<detail::AllocationLedger> ledger_;
  c10::DebugInfoGuard guard_;
};

} // namespace memcnn
