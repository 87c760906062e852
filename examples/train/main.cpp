// SPDX-License-Identifier: MIT

// memcnn_train MODEL DATASET: trains the networks of resnet.h and revnet.h.

#include "support/allocator.h"
#include "train/base/command_line.h"
#include "train/run/interrupt.h"
#include "train/run/train.h"

#include <c10/util/Exception.h>

#include <cstdio>
#include <exception>

int main(int argc, const char** argv) {
  support::keep_freed_memory();
  try {
    const auto config = training::parse_command_line(argc, argv);
    if (!config) {
      return 0;
    }
    training::catch_interrupts();
    return training::train(*config);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "memcnn_train: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "memcnn_train: %s\n", error.what());
  }
  return 1;
}
