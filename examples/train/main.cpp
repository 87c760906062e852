// SPDX-License-Identifier: MIT

// memcnn_train MODEL DATASET: trains the networks of revnet.h.

#include "support/allocator.h"
#include "support/error.h"
#include "train/command_line.h"
#include "train/run/interrupt.h"
#include "train/run/standard_streams.h"
#include "train/run/train.h"

#include <fmt/format.h>

#include <cstdio>
#include <exception>

int main(int argc, const char** argv) {
  training::open_standard_streams();
  support::keep_freed_memory();
  try {
    const auto config = training::parse_command_line(argc, argv);
    if (!config) {
      return 0;
    }
    training::catch_interrupts();
    return training::train(*config);
  } catch (const std::exception& error) {
    fmt::print(stderr, "memcnn_train: {}\n", support::message_of(error));
    return 1;
  }
}
