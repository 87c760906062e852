// SPDX-License-Identifier: MIT

// memcnn_train MODEL DATASET: trains the networks of revnet.h.

#include "support/allocator.h"
#include "train/base/interrupt.h"
#include "train/command_line.h"
#include "train/run/standard_streams.h"
#include "train/run/train.h"
#include "train/team/join.h"
#include "train/team/leave.h"
#include "train/team/team.h"

#include <exception>
#include <memory>

int main(int argc, const char** argv) {
  training::open_standard_streams();
  support::keep_freed_memory();
  std::unique_ptr<training::Team> team;
  try {
    const auto config = training::parse_command_line(argc, argv);
    if (!config) {
      return 0;
    }
    training::ignore_signals_of_writes();
    team = training::join_team(*config); // which a signal may end at once
    training::catch_interrupts();
    return training::train(*config, *team);
  } catch (const std::exception& error) {
    return training::leave(team.get(), error);
  }
}
