// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace benchmark {

/// The ways to run the network, in the order of the table.
inline const std::vector<std::string>& engine_names() {
  static const std::vector<std::string> names = {
      "plain",
      "checkpoint",
      "checkpoint-whole",
      "checkpoint-sequential",
      "checkpoint-sequential-budget",
      "wrapper",
      "sequence",
      "sequence-budget"};
  return names;
}

inline bool has_budget(const std::string& engine) {
  return engine == "checkpoint-sequential-budget" ||
      engine == "sequence-budget";
}

inline const std::vector<std::string>& coupling_names() {
  static const std::vector<std::string> names = {"additive", "affine", "exact"};
  return names;
}

inline const std::vector<std::string>& dtype_names() {
  static const std::vector<std::string> names = {
      "float32", "float64", "bfloat16", "float16"};
  return names;
}

inline const std::vector<std::string>& precision_names() {
  static const std::vector<std::string> names = {"ieee", "tf32", "bfloat16"};
  return names;
}

inline const std::vector<std::string>& memory_format_names() {
  static const std::vector<std::string> names = {"contiguous", "channels-last"};
  return names;
}

inline const std::vector<std::string>& sequence_format_names() {
  static const std::vector<std::string> names = {"input", "channels-last"};
  return names;
}

inline const std::vector<std::string>& device_names() {
  static const std::vector<std::string> names = {"cpu", "cuda"};
  return names;
}

/// Everything that a run depends on.
struct Config {
  std::vector<std::string> engines =
      {"plain", "checkpoint", "wrapper", "sequence", "sequence-budget"};

  int64_t depth = 27; // couplings
  int64_t channels = 16; // of one half
  int64_t batch = 20; // images
  int64_t size = 32; // height and width of an image
  std::string coupling = "additive";
  std::string dtype = "float32";
  std::string precision = "ieee"; // of convolutions of float32 tensors
  std::string memory_format = "contiguous"; // of weights and image
  std::string sequence_format = "input"; // of the halves in a sequence
  std::string device = "cpu";
  int64_t seed = 0; // of weights and image
  int64_t threads = 2;

  /// How much an engine with a budget may keep: numbers of MiB, percentages of
  /// what the plain network holds, or "all". It runs once for each.
  std::vector<std::string> budgets = {"50%"};

  int64_t warmup = 2; // rounds before the timed ones
  int64_t steps = 15; // timed rounds
  bool graph = false; // times replays of one CUDA graph a step
  bool default_allocator = false;
  bool json = false;
};

/// Of the exact mode: float32 is exact for values up to 2^(24 - 16) = 256.
inline constexpr int64_t kFractionalBits = 16;

} // namespace benchmark
