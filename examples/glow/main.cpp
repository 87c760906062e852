// SPDX-License-Identifier: MIT

// memcnn_glow DATASET: trains the flow of glow.h.

#include "glow/command_line.h"
#include "glow/train.h"
#include "support/allocator.h"
#include "train/base/interrupt.h"
#include "train/base/program_name.h"
#include "train/run/standard_streams.h"
#include "train/team/alone.h"
#include "train/team/leave.h"

#include <exception>

int main(int argc, const char** argv) {
  training::open_standard_streams();
  training::program_name() = "memcnn_glow";
  support::keep_freed_memory();
  try {
    const auto config = glow::parse_command_line(argc, argv);
    if (!config) {
      return 0;
    }
    training::ignore_signals_of_writes();
    training::catch_interrupts();
    return glow::train(*config);
  } catch (const std::exception& error) {
    return training::leave(&training::alone(), error);
  }
}
