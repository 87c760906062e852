// SPDX-License-Identifier: MIT
#pragma once

// What the fuzzers have in common. Each is one reader behind libFuzzer's entry
// point, LLVMFuzzerTestOneInput(), which finds inputs that take new paths.

#include "support/error.h"
#include "train/base/format_error.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

namespace fuzz {

/// The bytes of a file that nobody vouches for.
inline std::string input(const uint8_t* bytes, size_t count) {
  return std::string(bytes, bytes + count);
}

/// A message has to be safe to print, however long and odd the file is.
inline void check_message(const std::string& message) {
  constexpr size_t kMostBytes = 1000;
  const bool is_printable =
      std::all_of(message.begin(), message.end(), [](char byte) {
        return byte >= ' ' && byte <= '~';
      });
  if (!is_printable || message.size() > kMostBytes) {
    std::abort();
  }
}

/// Calls a reader. It may refuse the file in words; whatever else it throws ends
/// the fuzzer, as errors that the sanitizers see do.
template <class Read>
void read_or_refuse(const Read& read) {
  try {
    read();
  } catch (const training::FormatError& flaw) {
    check_message(flaw.what());
  } catch (const support::Error& error) {
    check_message(error.what());
  }
}

} // namespace fuzz
