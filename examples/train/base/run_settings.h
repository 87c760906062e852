// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <string>

namespace training {

/// The settings that every program of training runs has. Each adds its own, and
/// recipe() of all, the part that two runs must share to be one run.
struct RunSettings {
  std::string dataset; // one of dataset_names() in data_set.h

  // The recipe; each program has its own defaults of the zeros.
  int64_t iterations = 0; // steps in all
  int64_t batch_size = 0; // images a step
  double learning_rate = 0;
  uint64_t seed = 42; // of weights, order of the images, and augmentation
  std::string engine = "sequence"; // the fastest that saves memory
  bool amp = false; // in bfloat16, which has float32's range: no loss scaling

  // Where the run happens. Results do not depend on it, but for rounding.
  bool use_cuda = true; // where a device is present
  int threads = 0; // 0: one per core that the run has

  // What is read and written.
  std::string data_dir; // empty: where the download targets put the data set
  std::string results_dir; // empty: results/ and what tells runs apart
  bool fresh = false; // overwrites a checkpoint instead of going on from it
  bool from_previous = false; // goes on from the checkpoint before the last
  int64_t log_every = 20; // a row every few seconds, even on a small CPU
  int64_t evaluate_every = 0; // 0: at the end only; takes as long as 30 steps
  int64_t test_images = 0; // 0: all; fewer for a quick look only
  int64_t checkpoint_every = 500; // at most some minutes are ever lost
  int64_t compare_plain = 0; // steps of each twin; 0: no comparison
};

} // namespace training
