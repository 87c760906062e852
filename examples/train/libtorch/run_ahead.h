// SPDX-License-Identifier: MIT
#pragma once

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/types.h>

#include <cstddef>
#include <deque>

namespace training {

/// Bounds how far the host runs ahead of a device: far enough that the device
/// never waits for work, and not so far that an interrupt has to wait for much
/// of it. A CPU is never behind.
class RunAhead final {
 public:
  explicit RunAhead(torch::Device device) : device_(device) {}

  /// Says that a piece of work is queued on the current stream. Waits for the
  /// piece that was queued kMost pieces ago.
  void queued() {
    if (device_.is_cpu()) {
      return;
    }
    const c10::impl::VirtualGuardImpl guard(device_.type());
    done_.emplace_back(device_.type()).record(guard.getStream(device_));
    if (done_.size() > kMost) {
      done_.front().synchronize();
      done_.pop_front();
    }
  }

 private:
  static constexpr size_t kMost = 4; // milliseconds to seconds, by the network

  torch::Device device_;
  std::deque<c10::Event> done_; // when each is
};

} // namespace training
