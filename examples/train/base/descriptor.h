// SPDX-License-Identifier: MIT
#pragma once

#include <unistd.h>

#include <utility>

namespace training {

/// An open file or folder of the system's, closed at the end of scope.
class Descriptor final {
 public:
  /// Takes over what ::open() returned: below 0 where that failed.
  explicit Descriptor(int number) : number_(number) {}

  Descriptor(Descriptor&& other) noexcept
      : number_(std::exchange(other.number_, -1)) {}

  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }

  ~Descriptor() {
    if (is_open()) {
      ::close(number_);
    }
  }

  bool is_open() const {
    return number_ >= 0;
  }

  int number() const {
    return number_;
  }

 private:
  int number_;
};

} // namespace training
