// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/capture.h>
#include <memcnn/detail/exact_range.h>

#include <c10/core/Device.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

namespace memcnn {

/// Asks a device whether values left the range of the exact mode, in any call
/// so far, those that a graph replays included. Waits for the device.
///
/// A coupling with fractional_bits stops at once where it runs on the CPU. On
/// other devices that would be a wait for each block: there a value that is out
/// of range is an error of a later call of such a coupling, or of this one. Ask
/// where you wait anyway: where a loss is read, before a checkpoint is written.
///
/// Each overflow is told once. On the CPU there is nothing to ask.
///
/// Throws:   c10::ValueError if values left the range; c10::Error while the
///           device's current stream is captured.
/// Example:
///   graph.replay();
///   memcnn::check_exact_range(torch::kCUDA); // the current device
inline void check_exact_range(at::Device device) {
  if (!detail::notes_ranges(device)) {
    return;
  }
  if (!device.is_cpu() && !device.has_index()) {
    device = c10::impl::VirtualGuardImpl(device.type()).getDevice();
  }
  detail::check_eager(
      device,
      "check_exact_range(): expected",
      "waits for the device",
      "Ask after a replay.");
  detail::RangeFlags::all().check(device);
}

} // namespace memcnn
