// SPDX-License-Identifier: MIT

// memcnn_train on a GPU, as its users meet it.

#include "support/train_program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <fstream>
#include <regex>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using memcnn_test::read;
using memcnn_test::Result;
using memcnn_test::rows;
using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

class TrainProgramCuda : public memcnn_test::TrainProgramTest {
 protected:
  void SetUp() override {
    TrainProgramTest::SetUp();
    if (!has_gpu()) {
      GTEST_SKIP() << "no CUDA device";
    }
  }

  /// Steps of a second or two, most of them replays; the same in every run.
  Result deterministic(const std::string& arguments) {
    return train(
        "--batch-size 4 --test-images 8 --log-every 3 --deterministic " +
        arguments);
  }

  /// Without what depends on the speed of the machine, and the memory of a
  /// graph.
  std::vector<json> log_of(const char* results) {
    std::ifstream file(directory_ / results / "log.jsonl");
    std::vector<json> rows;
    for (std::string line; std::getline(file, line);) {
      rows.push_back(json::parse(line));
      for (const char* field : {"ms_per_step", "held_bytes", "peak_bytes"}) {
        EXPECT_GT(rows.back().at(field), 0) << field;
        rows.back().erase(field);
      }
    }
    return rows;
  }
};

TEST_F(TrainProgramCuda, TrainsByAGraphAsKernelByKernel) {
  const std::string check = "--check-inverse 18";
  for (const std::string& options :
       {check,
        check + " --engine wrapper",
        check + " --fractional-bits 12",
        std::string("--plain --amp")}) {
    SCOPED_TRACE(options);
    const std::string run = options +
        " revnet38 synthetic --iterations 20 --evaluate-every 6 --fresh "
        "--results-dir ";
    const auto graph = deterministic(run + "graph");
    EXPECT_EQ(graph.exit_code, 0) << graph.err;
    const auto eager = deterministic(run + "eager --no-cuda-graph");
    EXPECT_EQ(eager.exit_code, 0) << eager.err;
    EXPECT_EQ(rows(graph.out), rows(eager.out));
    EXPECT_EQ(log_of("graph"), log_of("eager"));
    EXPECT_THAT(
        graph.out,
        AllOf(
            HasSubstr("a step as one graph, deterministic\n"),
            HasSubstr("  taken of the GPU ")));
    EXPECT_THAT(eager.out, HasSubstr("kernel by kernel, deterministic\n"));
    const auto run_json = json::parse(read(directory_ / "graph/run.json"));
    EXPECT_EQ(run_json.at("cuda_graph"), true);
    EXPECT_EQ(run_json.at("deterministic"), true);
    EXPECT_GT(
        json::parse(read(directory_ / "graph/results.json")).at("gpu_bytes"),
        0);
  }
}

TEST_F(TrainProgramCuda, GoesOnWithTheSameLossesAfterAnySignal) {
  const std::string run =
      "resnet32 synthetic --iterations 60 --checkpoint-every 4 --results-dir ";
  ASSERT_EQ(deterministic(run + "whole").exit_code, 0);
  for (const std::string signal : {"INT", "KILL"}) {
    SCOPED_TRACE(signal);
    const std::string parts = "parts" + signal;
    for (const std::string row : {"15", "33"}) { // in replays
      train_shell(
          "$TRAIN --batch-size 4 --test-images 8 --log-every 3 --deterministic " +
          run + parts + " > out" + row + " & until grep -q iteration:" + row +
          " out" + row + " || ! kill -0 $!; do sleep 0.02; done; kill -" +
          signal + " $!; wait $!");
    }
    const auto last = deterministic(run + parts);
    EXPECT_EQ(last.exit_code, 0) << last.err;
    EXPECT_THAT(last.out, StartsWith("going on from "));
    EXPECT_EQ(log_of(parts.c_str()), log_of("whole"));
  }
}

TEST_F(TrainProgramCuda, ComparesGraphsWithGraphs) {
  const auto result =
      deterministic("revnet38 synthetic --iterations 1 --compare-plain 2");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("2 steps each from the same weights"));
  const auto results = directory_ / "results/revnet38-synthetic/results.json";
  const auto bytes = json::parse(read(results)).at("gpu_bytes").get<double>();
  std::smatch printed;
  ASSERT_TRUE(std::regex_search(
      result.out, printed, std::regex("taken of the GPU +([0-9.]+) MiB")));
  EXPECT_NEAR(bytes / (1 << 20), std::stod(printed[1]), 0.01)
      << "without what the twins took";
}

TEST_F(TrainProgramCuda, TakesAGraphForFalseFromAFile) {
  memcnn_test::write(directory_ / "run.toml", "cuda-graph = false\n");
  const auto result = deterministic(
      "resnet32 synthetic --iterations 1 --config run.toml --results-dir here");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("kernel by kernel"));
}

TEST_F(TrainProgramCuda, SaysNothingOfMemoryThatItDidNotMeasure) {
  const auto result =
      deterministic("resnet32 synthetic --iterations 1 --results-dir here");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(
      result.out,
      AllOf(HasSubstr("time per step"), Not(HasSubstr("held after forward"))));
  const auto step = json::parse(read(here("results.json"))).at("step");
  EXPECT_GT(step.at("median_ms_per_step"), 0);
  EXPECT_EQ(step.at("peak_of_the_step_bytes"), nullptr);
}

TEST_F(TrainProgramCuda, MeasuresNoStepsThatAreNotFinite) {
  const auto result = deterministic(
      "revnet38 synthetic --iterations 0 --compare-plain 2 --learning-rate 1e30");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, Not(HasSubstr("its plain twin")));
  EXPECT_THAT(result.err, HasSubstr("warning: the comparison is left out: "));
}

TEST_F(TrainProgramCuda, StopsWhereAnEvaluationLeavesTheExactRange) {
  const auto result = deterministic(
      "revnet38 synthetic --iterations 0 --fractional-bits 20 "
      "--results-dir here");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, HasSubstr("where fractional_bits(20) is exact"));
  EXPECT_FALSE(fs::exists(here("results.json")));
}

TEST_F(TrainProgramCuda, StopsWholeWhereMemoryRunsOut) {
  const std::string run =
      "resnet32 synthetic --test-images 8 --batch-size 200 --log-every 1 "
      "--results-dir here --iterations ";
  ASSERT_EQ(train(run + "2").exit_code, 0);
  const auto before = read(here("checkpoint.memcnn"));
  // 160 MiB of 80 GiB; less than a step needs on any GPU of today.
  const auto starved = train_shell(
      "PYTORCH_CUDA_ALLOC_CONF=per_process_memory_fraction:0.002 $TRAIN " +
      run + "3");
  EXPECT_EQ(starved.exit_code, 1);
  EXPECT_THAT(
      starved.err,
      AllOf(
          StartsWith(
              "memcnn_train: expected the GPU to have the memory for batches of "
              "200 images, but got: "),
          HasSubstr("The checkpoint here/checkpoint.memcnn is whole, and the "
                    "same command goes on from it.\n")));
  EXPECT_EQ(read(here("checkpoint.memcnn")), before);
  const auto last = train(run + "3");
  EXPECT_EQ(last.exit_code, 0) << last.err;
  EXPECT_THAT(rows(last.out).front(), StartsWith("iteration:3 "));
}

} // namespace
