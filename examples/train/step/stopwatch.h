// SPDX-License-Identifier: MIT
#pragma once

#include <chrono>

namespace training {

/// Time since it was made.
class Stopwatch final {
 public:
  double milliseconds() const {
    const std::chrono::duration<double, std::milli> time =
        std::chrono::steady_clock::now() - start_;
    return time.count();
  }

 private:
  std::chrono::steady_clock::time_point start_ =
      std::chrono::steady_clock::now();
};

} // namespace training
