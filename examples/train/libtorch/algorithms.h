// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/Context.h>

#include <cstdlib>

namespace training {

/// Chooses among the algorithms of a GPU's libraries, before the first of them
/// starts: with `deterministic` those that give the same bits each time, else
/// the fastest, which cuDNN finds by trying all for each shape that it meets.
inline void choose_algorithms(bool deterministic) {
  at::Context& context = at::globalContext();
  context.setBenchmarkCuDNN(!deterministic);
  context.setDeterministicCuDNN(deterministic);
  if (deterministic) {
    // cuBLAS reads it as it starts; what a user has set stays.
    ::setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
    // Where an operator has no such algorithm, that is a warning.
    context.setDeterministicAlgorithms(true, /*warn_only=*/true);
    // Memory that nobody has written is read by none of ours.
    context.setDeterministicFillUninitializedMemory(false);
  }
}

} // namespace training
