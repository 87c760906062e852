// SPDX-License-Identifier: MIT
#pragma once

#include "program.h"
#include "train_rows.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <string>

namespace memcnn_test {

/// Runs memcnn_train, whose path is the macro MEMCNN_TRAIN.
class TrainProgramTest : public ProgramTest {
 protected:
  /// A command of the shell in which $TRAIN is the program.
  Result train_shell(const std::string& command) {
    return shell("TRAIN='" MEMCNN_TRAIN "'; " + command);
  }

  Result train(const std::string& arguments) {
    return train_shell("$TRAIN " + arguments);
  }

  /// Whether the program finds a GPU.
  bool has_gpu() {
    static const bool found =
        train("resnet32 synthetic --iterations 0 --test-images 8 --cuda-graph")
            .exit_code == 0;
    return found;
  }

  /// Of a run of a second or two; every row shows one step.
  static std::string brief(const std::string& arguments) {
    return arguments +
        " --batch-size 4 --log-every 1 --test-images 8 --threads 1 --no-cuda";
  }

  /// Six steps in `here`, with a checkpoint after the third and the last.
  static std::string six_steps() {
    return brief(
        "resnet32 synthetic --iterations 6 --checkpoint-every 3 "
        "--results-dir here");
  }

  std::filesystem::path here(const char* name) const {
    return directory_ / "here" / name;
  }

  Result short_run(const std::string& arguments) {
    return train(brief(arguments));
  }

  /// Exactly one message, and no step done.
  void expect_error(const Result& result, const std::string& message) {
    EXPECT_EQ(result.exit_code, 1);
    EXPECT_EQ(result.err, "memcnn_train: " + message + "\n");
    EXPECT_EQ(rows(result.out).size(), 0U) << result.out;
    EXPECT_FALSE(std::filesystem::exists(directory_ / "results"));
  }
};

} // namespace memcnn_test
