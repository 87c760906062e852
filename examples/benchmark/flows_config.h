// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace benchmark {

/// How a 1x1 convolution keeps its matrix.
inline const std::vector<std::string>& matrix_names() {
  static const std::vector<std::string> names = {"plain", "lu", "orthogonal"};
  return names;
}

inline const std::vector<std::string>& flow_engine_names() {
  static const std::vector<std::string> names = {"plain", "saving"};
  return names;
}

/// Everything that a run of memcnn_flows depends on.
struct FlowConfig {
  std::vector<int64_t> depths = {4, 16}; // steps a level, one flow each
  int64_t levels = 3;
  int64_t width = 128; // channels inside of a branch
  int64_t batch = 32; // images
  int64_t size = 32; // height and width of an image
  std::string matrix = "lu";
  std::string memory_format = "contiguous"; // of the stream between blocks
  int64_t seed = 0; // of weights and image

  std::vector<std::string> engines = {"plain", "saving"};
  std::vector<int64_t> anchors = {0}; // blocks from one to the next

  std::string device = "cpu";
  int64_t threads = 2;
  int64_t warmup = 1; // rounds before the timed ones
  int64_t steps = 5; // timed rounds; 0: memory alone
  bool log_det = false; // measures what it adds to what is held
  bool default_allocator = false;
  bool json = false;
};

/// Everything that a run of memcnn_flow_drift depends on.
struct DriftConfig {
  std::vector<int64_t> depths = {8, 16, 32, 64, 96}; // steps, one chain each
  int64_t channels = 12; // of the input, before the squeeze
  int64_t width = 64; // channels inside of a branch
  int64_t batch = 4; // images
  int64_t size = 16; // height and width of an image
  std::vector<std::string> matrices = {"plain"};
  std::vector<double> sigmas = {0, 0.02, 0.05, 0.1};
  int64_t seed = 0; // of weights and image

  std::vector<int64_t> anchors = {0, 24, 8}; // blocks from one to the next
  int64_t threads = 2;
  bool json = false;
};

} // namespace benchmark
