// SPDX-License-Identifier: MIT
#pragma once

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/types.h>

#include <optional>

namespace training {

/// Brings a small tensor to the CPU while the device goes on with what is
/// queued after it.
///
/// Reading a value right away makes the CPU wait until the device is idle, and
/// then the device until the CPU has the next kernels ready. Here the CPU first
/// queues more work, and then waits for this value alone.
class DeviceRead {
 public:
  explicit DeviceRead(const torch::Tensor& values) : host_(values) {
    if (!values.is_cpu()) {
      const c10::impl::VirtualGuardImpl device(values.device().type());
      host_ = torch::empty(
          values.sizes(),
          torch::TensorOptions(values.scalar_type()).pinned_memory(true));
      host_.copy_(values, /*non_blocking=*/true);
      copied_.emplace(values.device().type());
      copied_->record(device.getStream(values.device()));
    }
  }

  /// The values, on the CPU.
  torch::Tensor wait() const {
    if (copied_) {
      copied_->synchronize();
    }
    return host_;
  }

 private:
  torch::Tensor host_;
  std::optional<c10::Event> copied_;
};

} // namespace training
