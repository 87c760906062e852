// SPDX-License-Identifier: MIT
#pragma once

namespace memcnn::detail {

/// While it lives: whether what runs on this thread is asked for its
/// log-determinant. An adapter knows the logarithm of its scale better than who
/// takes the logarithm of it, and computes it where somebody wants it.
class LogDetAsked {
 public:
  explicit LogDetAsked(bool asked) : before_(here()) {
    here() = asked;
  }
  LogDetAsked(const LogDetAsked&) = delete;
  LogDetAsked& operator=(const LogDetAsked&) = delete;
  ~LogDetAsked() {
    here() = before_;
  }

  static bool& here() {
    static thread_local bool asked = false;
    return asked;
  }

 private:
  bool before_;
};

} // namespace memcnn::detail
