// SPDX-License-Identifier: MIT
#pragma once

#include <c10/util/Exception.h>
#include <gmock/gmock.h>

namespace memcnn_test {

/// A call that throws an E of LibTorch whose message matches all of these: like
/// testing::ThrowsMessage, but without the stack trace in what().
template <class E, class... Messages>
auto ThrowsError(const Messages&... messages) {
  return testing::Throws<E>(testing::Property(
      "what_without_backtrace",
      &c10::Error::what_without_backtrace,
      testing::AllOf(messages...)));
}

} // namespace memcnn_test
