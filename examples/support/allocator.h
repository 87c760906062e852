// SPDX-License-Identifier: MIT
#pragma once

#include <cstdlib> // brings in __GLIBC__ where that is the C library

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace support {

/// Tells the C library to keep freed memory for the next allocation.
///
/// A training step on the CPU frees and takes the same megabytes over and over.
/// By default glibc maps the largest blocks from the system and gives them back
/// at once, and the system clears every page of them again. What that takes
/// depends on the sizes of the blocks: from next to nothing to a fifth of the
/// step. Call this once, first thing in main(). Does nothing where the C
/// library is another.
///
/// Memory:   the process keeps what it once held, up to its own peak.
/// Source:   glibc manual, "Malloc Tunable Parameters".
inline void keep_freed_memory() {
#if defined(__GLIBC__)
  constexpr int kLargest = 1 << 30; // bytes; mallopt takes an int
  mallopt(M_MMAP_THRESHOLD, kLargest);
  mallopt(M_TRIM_THRESHOLD, kLargest);
#endif
}

} // namespace support
