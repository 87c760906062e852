// SPDX-License-Identifier: MIT

// A run whose steps go ahead of what is known of them, as on a GPU, beside one
// that reads each step, as on a CPU.

#include "train/run/run.h"
#include <memcnn/allocation_meter.h>
#include "support/error.h"
#include "train/base/interrupt.h"
#include "train/data/synthetic.h"
#include "train/run/checkpoint.h"
#include "train/run/checkpoint_files.h"
#include "train/run/log.h"
#include "train/run/out_of_memory.h"
#include "train/run/progress_line.h"
#include "train/run/run_files.h"
#include "train/step/trainer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <unistd.h>

namespace {

namespace fs = std::filesystem;
using namespace training;
using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

/// One run in a folder of its own.
class SmallRun {
 public:
  SmallRun(const Config& config, const DataSet& data, StepsOn steps_on)
      : config_(config),
        files_(config_),
        trainer_(config_, data, torch::kCPU, meter_, steps_on) {}

  RunState train() {
    RunState state;
    const CheckpointFiles& checkpoints = files_.checkpoints();
    if (checkpoints.has_last()) {
      const auto path = checkpoints.last();
      state = restore_checkpoint(
          checkpoints.read(path), path, config_, kImages, trainer_);
    }
    files_.keep(state.log);
    Run run(config_, kImages, std::move(state), trainer_, &files_, progress_);
    run.train();
    return run.state();
  }

  Trainer& trainer() {
    return trainer_;
  }

 private:
  static constexpr uint32_t kImages = 7; // their fingerprint

  Config config_;
  memcnn::AllocationMeter meter_;
  ProgressLine progress_;
  RunFiles files_;
  Trainer trainer_;
};

class RunAheadRun : public testing::Test {
 protected:
  void SetUp() override {
    SyntheticSizes sizes;
    sizes.train = 24;
    sizes.test = 4;
    data_ = make_synthetic(sizes);
    config_.model = "resnet32";
    config_.dataset = "synthetic";
    config_.batch_size = 2;
    config_.iterations = 13;
    config_.learning_rate = 0.01;
    config_.log_every = 5;
    config_.checkpoint_every = 4;
    config_.evaluate_every = 6;
  }

  void TearDown() override {
    training::detail::received_signal = 0;
    for (const auto& folder : folders_) {
      for (const auto& file : fs::directory_iterator(folder)) {
        fs::remove(file.path());
      }
      fs::remove(folder);
    }
  }

  Config in(const std::string& name) {
    Config config = config_;
    const auto folder = fs::temp_directory_path() /
        ("memcnn_run_" + std::to_string(::getpid()) + name);
    config.results_dir = folder.string();
    if (std::find(folders_.begin(), folders_.end(), folder) == folders_.end()) {
      folders_.push_back(folder);
    }
    return config;
  }

  /// Without what depends on the speed of the machine, and on who makes batches.
  static std::vector<json> log_of(const Config& config) {
    std::ifstream file(fs::path(config.results_dir) / kLogName);
    std::vector<json> rows;
    for (std::string line; std::getline(file, line);) {
      rows.push_back(json::parse(line));
      for (const char* field :
           {"ms_per_step", "data_ms_per_step", "held_bytes", "peak_bytes"}) {
        EXPECT_TRUE(rows.back().at(field).is_number()) << field;
        rows.back().erase(field);
      }
    }
    return rows;
  }

  DataSet data_;
  Config config_;
  std::vector<fs::path> folders_;
};

TEST_F(RunAheadRun, WritesTheRowsOfOneThatReadsEachStep) {
  SmallRun host(in("host"), data_, StepsOn::kHost);
  SmallRun device(in("device"), data_, StepsOn::kDevice);
  testing::internal::CaptureStdout();
  const RunState expected = host.train();
  const std::string expected_out = testing::internal::GetCapturedStdout();
  testing::internal::CaptureStdout();
  const RunState found = device.train();
  const std::string out = testing::internal::GetCapturedStdout();

  EXPECT_EQ(found.iteration, 13);
  EXPECT_EQ(found.step_milliseconds.size(), 13U);
  EXPECT_GT(found.milliseconds_per_step(), 0);
  EXPECT_GT(found.memory.peak, found.memory.held_after_forward);
  const auto rows = log_of(in("device"));
  ASSERT_EQ(rows.size(), 5U); // 5, 6, 10, 12, 13
  EXPECT_EQ(rows, log_of(in("host")));
  EXPECT_EQ(rows[1].at("iteration"), 6);
  EXPECT_TRUE(rows[1].contains("test_accuracy"));
  EXPECT_THAT(out, HasSubstr("iteration:1 loss:")) << "the first sign";
  EXPECT_EQ(
      std::count(out.begin(), out.end(), '\n'),
      std::count(expected_out.begin(), expected_out.end(), '\n'));
  EXPECT_EQ(expected.iteration, 13);
}

/// A signal that comes in the middle of a trainer's nth step from now on.
void interrupt_in_step(Trainer& trainer, int64_t step) {
  auto weights = trainer.network().parameters().back();
  const auto left = std::make_shared<int64_t>(step);
  weights.register_hook([left](const torch::Tensor&) {
    if (--*left == 0) {
      training::detail::received_signal = SIGINT;
    }
  });
}

TEST_F(RunAheadRun, StopsAfterTheStepOfASignalAndGoesOn) {
  config_.log_every = 9;
  config_.checkpoint_every = 0;
  config_.evaluate_every = 0;
  {
    SmallRun run(in("parts"), data_, StepsOn::kDevice);
    interrupt_in_step(run.trainer(), 7);
    EXPECT_EQ(run.train().iteration, 7) << "amid those up to the row";
  }
  training::detail::received_signal = 0;
  SmallRun resumed(in("parts"), data_, StepsOn::kDevice);
  EXPECT_EQ(resumed.train().iteration, 13);
  SmallRun whole(in("whole"), data_, StepsOn::kHost);
  whole.train();
  const auto rows = log_of(in("parts"));
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows, log_of(in("whole")));
}

TEST_F(RunAheadRun, StopsAtTheRowOfABadLossAndNamesItsIteration) {
  config_.learning_rate = 1e25; // the second step meets what the first has made
  config_.checkpoint_every = 0;
  config_.evaluate_every = 0;
  for (const StepsOn steps_on : {StepsOn::kHost, StepsOn::kDevice}) {
    const Config config = in(steps_on == StepsOn::kHost ? "host" : "device");
    SmallRun run(config, data_, steps_on);
    try {
      run.train();
      ADD_FAILURE();
    } catch (const support::Error& error) {
      EXPECT_THAT(
          error.what(),
          AllOf(
              HasSubstr("expected the loss to be finite, but got "),
              HasSubstr(" at iteration 2. The first value that is not finite "
                        "is in "),
              HasSubstr("Give a lower --learning-rate (now 1e+25).")));
    }
    EXPECT_FALSE(
        fs::exists(fs::path(config.results_dir) / CheckpointFiles::kLast));
  }
}

TEST(OutOfMemory, SaysWhatToLowerAndWhatIsKept) {
  Config config;
  config.results_dir = "/nowhere";
  const c10::OutOfMemoryError error(
      {__func__, __FILE__, 1},
      "CUDA out of memory.  See documentation\nand more");
  EXPECT_STREQ(
      out_of_memory(config, error).what(),
      "expected the GPU to have the memory for batches of 100 images, but got: "
      "CUDA out of memory. Stop other programs on it, give --no-cuda-graph, "
      "whose steps share memory with all else, or train another run with a "
      "lower --batch-size. No checkpoint was written yet.");
  config.memory_budget = 4;
  config.cuda_graph = false;
  config.results_dir = fs::temp_directory_path().string();
  const fs::path checkpoint =
      fs::temp_directory_path() / CheckpointFiles::kLast;
  std::ofstream(checkpoint) << "here";
  EXPECT_THAT(
      out_of_memory(config, error).what(),
      AllOf(
          HasSubstr(
              "lower --batch-size or --memory-budget. The checkpoint " +
              checkpoint.string() +
              " is whole, and the same command goes on from it."),
          Not(HasSubstr("yet")),
          Not(HasSubstr("graph"))));
  fs::remove(checkpoint);
}

} // namespace
