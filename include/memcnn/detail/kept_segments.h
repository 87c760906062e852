// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/saved_tensors.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <utility>

namespace memcnn::detail {

/// The segments of a chain that keep what they save for backward, within a
/// budget of bytes: the last ones that fit, as in Note [Memory budget], rule 2.
/// Bytes are counted as they are saved, so that never more are kept.
class KeptSegments {
 public:
  explicit KeptSegments(int64_t budget) : budget_(budget) {}

  /// The next segment is about to run.
  void add(std::shared_ptr<SavedTensors> saved) {
    segments_.push_back(std::move(saved));
  }

  /// The oldest segments give up what they keep, until the others fit.
  void make_room() {
    while (!segments_.empty() && kept_bytes() > budget_) {
      segments_.front()->drop();
      segments_.pop_front();
    }
  }

 private:
  int64_t kept_bytes() const {
    int64_t bytes = 0;
    for (const auto& saved : segments_) {
      bytes += saved->kept_bytes();
    }
    return bytes;
  }

  int64_t budget_;
  std::deque<std::shared_ptr<SavedTensors>> segments_;
};

} // namespace memcnn::detail
