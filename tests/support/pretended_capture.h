// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/capture.h>
#include <torch/torch.h>

namespace memcnn_test {

/// While it lives, the work of every device counts as captured: what the library
/// refuses in a capture can be tested without a GPU.
class PretendedCapture {
 public:
  explicit PretendedCapture(memcnn::detail::CaptureId id)
      : found_(memcnn::detail::capture_facts()), outer_id_(current()) {
    current() = id;
    facts().capture_of = [](at::Device) {
      return current();
    };
    facts().is_of_this_capture = [](const at::Tensor&) {
      return true;
    };
  }
  PretendedCapture(const PretendedCapture&) = delete;
  PretendedCapture& operator=(const PretendedCapture&) = delete;
  ~PretendedCapture() {
    facts() = found_;
    current() = outer_id_;
  }

  /// What else it is to answer.
  static memcnn::detail::CaptureFacts& facts() {
    return memcnn::detail::capture_facts();
  }

 private:
  static memcnn::detail::CaptureId& current() {
    static memcnn::detail::CaptureId id = 0;
    return id;
  }

  memcnn::detail::CaptureFacts found_;
  memcnn::detail::CaptureId outer_id_;
};

} // namespace memcnn_test
