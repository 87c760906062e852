// SPDX-License-Identifier: MIT

// memcnn_train as its users meet it: arguments in, text and exit code out.

#include "support/train_program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <fstream>
#include <regex>
#include <string>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;
using memcnn_test::read;
using memcnn_test::Result;
using memcnn_test::rows;
using nlohmann::json;
using testing::AllOf;
using testing::ContainsRegex;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::MatchesRegex;
using testing::Not;
using testing::StartsWith;

class TrainProgram : public memcnn_test::TrainProgramTest {};

TEST_F(TrainProgram, ExplainsItself) {
  const auto help = train("--help");
  EXPECT_EQ(help.exit_code, 0);
  EXPECT_THAT(help.out, HasSubstr("memcnn_train [OPTIONS] MODEL DATASET"));
  // "=80000" or " [80000]", by the version of CLI11.
  EXPECT_THAT(
      help.out, ContainsRegex("--iterations INT:0 to 1000000000(=| \\[)80000"));
  const auto version = train("--version");
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_TRUE(std::regex_match(
      version.out, std::regex("memcnn_train \\d+\\.\\d+\\.\\d+\n")));
}

TEST_F(TrainProgram, RejectsUnknownModel) {
  expect_error(
      train("vgg synthetic"),
      "expected a valid command line, but got: MODEL: vgg not in "
      "{resnet32,resnet110,resnet164,revnet38,revnet110,revnet164}. See "
      "memcnn_train --help.");
}

TEST_F(TrainProgram, RejectsUnknownDataSet) {
  expect_error(
      train("revnet38 mnist"),
      "expected a valid command line, but got: DATASET: mnist not in "
      "{cifar10,cifar100,synthetic}. See memcnn_train --help.");
}

TEST_F(TrainProgram, RejectsUnknownFlag) {
  const auto result = train("revnet38 synthetic --depth 3");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(
      result.err,
      StartsWith(
          "memcnn_train: expected a known argument, but got \"--depth\". "
          "There are --help, --version, --config, MODEL, DATASET, "
          "--iterations, "));
}

TEST_F(TrainProgram, AsksForTheNearestOfWhatThereIs) {
  const auto expect_question = [&](const std::string& arguments,
                                   const std::string& got) {
    const auto result = train(arguments);
    EXPECT_EQ(result.exit_code, 1);
    EXPECT_THAT(result.err, HasSubstr(got));
  };
  expect_question(
      "revnet83 synthetic", "} (did you mean revnet38?). See memcnn_train");
  expect_question("revnet38 cifar", "} (did you mean cifar10?). See");
  expect_question("revnet38 CIFAR10", "} (did you mean cifar10?). See");
  expect_question(
      "cifar10 revnet38",
      "MODEL: cifar10 is a DATASET, which stands behind MODEL. See");
  expect_question(
      "revnet38 synthetic --batchsize 4",
      "known argument, but got \"--batchsize\" (did you mean --batch-size?). ");
  expect_question(
      "--batchsize 4 revnet38 synthetic",
      "known argument, but got \"--batchsize\" (did you mean --batch-size?). ");
}

TEST_F(TrainProgram, RejectsMissingArgument) {
  expect_error(
      train("revnet38"),
      "expected a valid command line, but got: DATASET is required. See "
      "memcnn_train --help.");
}

TEST_F(TrainProgram, RejectsValueOutOfRange) {
  const std::string help = train("--help").out;
  const std::vector<std::pair<std::string, std::string>> wrong = {
      {"--iterations -1", "0 to 1000000000"},
      {"--iterations 1000000001", "0 to 1000000000"},
      {"--batch-size 1", "2 to 50000"},
      {"--batch-size 50001", "2 to 50000"},
      {"--learning-rate nan", "0 to 1e+30"},
      {"--weight-decay 1e31", "0 to 1e+30"},
      {"--seed -1", "0 to 9223372036854775807"},
      {"--seed 9223372036854775808", "0 to 9223372036854775807"},
      {"--memory-budget 17592186044416", "0 to 1000000000"},
      {"--fractional-bits 24", "0 to 23"},
      {"--threads 1000000", "0 to 1024"},
      {"--log-every 0", "1 to 1000000000"},
      {"--check-inverse 99999999999999999999", "0 to 1000000000"}};
  const std::vector<std::pair<std::string, std::string>> no_whole = {
      {"--evaluate-every 1e3", "0 to 1000000000"},
      {"--checkpoint-every 0x10", "0 to 1000000000"},
      {"--compare-plain 5s", "0 to 1000000000"},
      {"--test-images 1.5", "0 to 1000000000"}};
  const auto expect_refused = [&](const std::string& option,
                                  const std::string& why,
                                  const std::string& range) {
    const auto space = option.find(' ');
    const std::string name = option.substr(0, space);
    expect_error(
        train("revnet38 synthetic " + option),
        "expected a valid command line, but got: " + name + ": Value " +
            option.substr(space + 1) + why + range +
            ". See memcnn_train --help.");
    const auto type = help.find(':', help.find(name + " "));
    EXPECT_THAT(help.substr(type), StartsWith(":" + range)) << name;
  };
  for (const auto& [option, range] : wrong) {
    expect_refused(option, " not in range ", range);
  }
  for (const auto& [option, range] : no_whole) {
    expect_refused(option, " is no whole number from ", range);
  }
}

TEST_F(TrainProgram, RejectsEmptyFileNames) {
  memcnn_test::write(directory_ / "empty.toml", "save-weights = \"\"\n");
  const auto expect_refused = [&](const std::string& arguments,
                                  const std::string& flag) {
    expect_error(
        train("resnet32 synthetic " + arguments),
        "expected a valid command line, but got: " + flag +
            ": a file name cannot be empty. See memcnn_train --help.");
  };
  for (const std::string flag :
       {"--load-weights", "--save-weights", "--results-dir", "--data-dir"}) {
    expect_refused(flag + " ''", flag);
  }
  expect_refused("--config empty.toml", "--save-weights");
}

TEST_F(TrainProgram, ReadsConfigFile) {
  memcnn_test::write(
      directory_ / "run.toml",
      "MODEL = \"revnet38\"\n"
      "DATASET = \"synthetic\"\n"
      "iterations = 2\n"
      "batch-size = 4\n"
      "log-every = 1\n"
      "test-images = 8\n"
      "threads = 1\n"
      "no-cuda = true\n"
      "keep-transitions = true\n");
  const auto result = train("--config run.toml --iterations 1");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(
      rows(result.out),
      ElementsAre(
          StartsWith("iteration:1 loss:"),
          StartsWith("iteration:1 test_loss:")))
      << "the command line wins";
  EXPECT_THAT(
      read(directory_ / "results/revnet38-synthetic/run.json"),
      AllOf(
          ContainsRegex("\"batch_size\": *4"),
          ContainsRegex("\"checkpoint_transitions\": *false")));
}

TEST_F(TrainProgram, RejectsOptionsOfReversibleModelsForPlainOnes) {
  for (const std::string option :
       {"--compare-plain 2",
        "--engine wrapper",
        "--memory-budget 10",
        "--fractional-bits 12",
        "--keep-transitions"}) {
    expect_error(
        train("resnet32 synthetic " + option),
        "expected MODEL to be one of revnet38, revnet110, revnet164 with " +
            option.substr(0, option.find(' ')) +
            ", but got \"resnet32\", which is plain as it is.");
  }
}

TEST_F(TrainProgram, RejectsEnginesThatDoNotFit) {
  expect_error(
      train("revnet38 synthetic --engine steam"),
      "expected a valid command line, but got: --engine: steam not in "
      "{sequence,wrapper}. See memcnn_train --help.");
  expect_error(
      train("revnet38 synthetic --memory-format sparse"),
      "expected a valid command line, but got: --memory-format: sparse not in "
      "{channels-last,contiguous}. See memcnn_train --help.");
  expect_error(
      train("revnet38 synthetic --plain --engine wrapper"),
      "expected a valid command line, but got: --engine excludes --plain. See "
      "memcnn_train --help.");
  expect_error(
      train("revnet38 synthetic --plain --compare-plain 2"),
      "expected a valid command line, but got: --plain excludes "
      "--compare-plain. See memcnn_train --help.");
  expect_error(
      train("revnet38 synthetic --engine wrapper --memory-budget 10"),
      "expected --engine to be sequence with --memory-budget, but got "
      "\"wrapper\".");
}

TEST_F(TrainProgram, RejectsAGraphWithoutAGpu) {
  expect_error(
      train("revnet38 synthetic --cuda-graph --no-cuda"),
      "expected a valid command line, but got: --no-cuda excludes "
      "--cuda-graph. See memcnn_train --help.");
  expect_error(
      train("revnet38 synthetic --cuda-graph --no-cuda-graph"),
      "expected a valid command line, but got: --no-cuda-graph "
      "excludes --cuda-graph. See memcnn_train --help.");
  expect_error( // none is visible
      train_shell(
          "CUDA_VISIBLE_DEVICES= $TRAIN revnet38 synthetic --cuda-graph"),
      "expected a GPU for --cuda-graph, but LibTorch finds none. Give no "
      "--cuda-graph to train on the CPU.");
}

TEST_F(TrainProgram, SaysHowItsStepsRun) {
  const auto result = short_run(
      "resnet32 synthetic --iterations 1 --no-cuda-graph --deterministic");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  const auto results = directory_ / "results/resnet32-synthetic";
  for (const char* name : {"run.json", "results.json"}) {
    EXPECT_THAT(
        read(results / name),
        AllOf(
            HasSubstr("\"cuda_graph\": false"),
            HasSubstr("\"deterministic\": true")))
        << name;
  }
  // They are no part of the recipe.
  const auto again = short_run("resnet32 synthetic --iterations 2");
  EXPECT_THAT(again.out, StartsWith("going on from "));
  EXPECT_EQ(again.exit_code, 0) << again.err;
}

TEST_F(TrainProgram, RejectsBatchLargerThanDataSet) {
  expect_error( // and leaves no folder
      train("resnet32 synthetic --batch-size 20000"),
      "expected --batch-size to be at most the 10000 training images, but got "
      "20000.");
}

TEST_F(TrainProgram, NamesMissingDataFile) {
  expect_error(
      train("revnet38 cifar10 --data-dir nowhere"),
      "expected nowhere/data_batch_1.bin to be a file of 30730000 bytes, but "
      "there is none. Fetch it with \"cmake --build " MEMCNN_BUILD_DIR
      " --target download_cifar10\", or give its folder as --data-dir.");
}

TEST_F(TrainProgram, NamesTruncatedDataFile) {
  std::ofstream(directory_ / "train.bin") << "short";
  expect_error(
      train("revnet38 cifar100 --data-dir ."),
      "expected ./train.bin to have 153700000 bytes, but it has 5: it is "
      "truncated, or another file. Fetch it with \"cmake "
      "--build " MEMCNN_BUILD_DIR
      " --target download_cifar100\", or give its folder as --data-dir.");
}

TEST_F(TrainProgram, NamesCorruptDataFile) {
  std::ofstream file(directory_ / "data_batch_1.bin", std::ios::binary);
  file.seekp(3073 * 2) << '\x0b';
  file.close();
  fs::resize_file(directory_ / "data_batch_1.bin", 30730000);
  expect_error(
      train("revnet38 cifar10 --data-dir ."),
      "expected every label in ./data_batch_1.bin to be below 10, but record 2 "
      "has 11: the file is corrupt. Fetch it with \"cmake "
      "--build " MEMCNN_BUILD_DIR
      " --target download_cifar10\", or give its folder as --data-dir.");
}

TEST_F(TrainProgram, RejectsResultsDirThatCannotBeWritten) {
  std::ofstream(directory_ / "taken") << "a file";
  expect_error(
      train("revnet38 synthetic --results-dir taken/here"),
      "expected the folder taken/here to be writable, but no file can be made "
      "in it: Not a directory. Give another --results-dir.");
  // Where nobody can make a folder, not even root.
  const auto result = train("revnet38 synthetic --results-dir /sys/not/here");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(
      result.err,
      AllOf(
          HasSubstr("expected the folder /sys/not/here to be writable"),
          Not(HasSubstr("No such file"))));
}

TEST_F(TrainProgram, PrintsRowsAndSummaryAndWritesResults) {
  const auto result =
      short_run("revnet38 synthetic --iterations 2 --compare-plain 2");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(result.err, "");
  const std::string number = "[0-9.]+";
  EXPECT_TRUE(std::regex_search(
      result.out,
      std::regex(
          "iteration:1 loss:" + number + " accuracy:" + number +
          " top5:" + number + " lr:0.1 ms_per_step:" + number +
          "\niteration:2 loss:" + number + " accuracy:" + number +
          " top5:" + number + " lr:0.01 ms_per_step:" + number +
          "\niteration:2 test_loss:" + number + " test_accuracy:" + number +
          " test_top5:" + number)))
      << result.out;
  for (const char* line :
       {"test accuracy",
        "time per step",
        "parameters              2.19 MiB  (573994)",
        "held after forward",
        "peak of the step",
        "revnet38 on synthetic, engine sequence, batches of 4 on cpu",
        "held after forward (MiB)",
        "results: results/revnet38-synthetic/results.json"}) {
    EXPECT_THAT(result.out, HasSubstr(line)) << line;
  }
  const auto results = directory_ / "results" / "revnet38-synthetic";
  EXPECT_TRUE(fs::exists(results / "checkpoint.memcnn"));
  EXPECT_THAT(read(results / "results.json"), HasSubstr("\"comparison\""));
}

TEST_F(TrainProgram, ComparesNoLossesThatAreNotFinite) {
  const auto result = short_run(
      "revnet38 synthetic --iterations 0 --compare-plain 3 --learning-rate 1e30");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(
      result.err,
      ContainsRegex(
          "^memcnn_train: warning: the comparison is left out: expected the "
          "loss of engine sequence to be finite, but got -?nan. Give a lower "
          "--learning-rate \\(now 1e\\+30\\).\n$"));
  EXPECT_THAT(result.out, Not(HasSubstr("plain twin")));
  EXPECT_THAT(
      read(directory_ / "results/revnet38-synthetic/results.json"),
      Not(HasSubstr("\"comparison\"")));
}

TEST_F(TrainProgram, SaysNothingOfStepsThatItDidNotTake) {
  const auto result = short_run("resnet32 synthetic --iterations 0");
  EXPECT_THAT(result.out, Not(HasSubstr("time per step")));
  const auto results =
      read(directory_ / "results/resnet32-synthetic/results.json");
  for (const char* figure :
       {"median_ms_per_step",
        "held_after_forward_bytes",
        "peak_of_the_step_bytes"}) {
    EXPECT_THAT(results, HasSubstr(std::string("\"") + figure + "\": null"));
  }
}

TEST_F(TrainProgram, SaysWhatItIsBeforeItsFirstStep) {
  const auto result = short_run(
      "revnet38 synthetic --iterations 2 --seed 7 --fractional-bits 12");
  EXPECT_THAT(
      result.out,
      StartsWith(
          "revnet38 on synthetic\n"
          "  network   573994 parameters (2.19 MiB), engine sequence\n"
          "  data      10000 training and 8 test images of 10 classes, made by "
          "the program\n"
          "  training  iterations 1 to 2 of 4 images each, seed 7, random "
          "weights\n"
          "  computed  on cpu, 1 thread, in float32, blocks in multiples of "
          "2^-12, channels-last\n"
          "  results   results/revnet38-synthetic\n"
          "\n"
          "iteration:1 "));
  EXPECT_THAT(
      short_run("revnet38 synthetic --iterations 2 --seed 7 --fractional-bits "
                "12")
          .out,
      HasSubstr("  training  done: evaluation only\n"));
}

TEST_F(TrainProgram, PrintsItsFirstStepAtOnce) {
  const auto result = train(
      "resnet32 synthetic --iterations 4 --log-every 3 --batch-size 4 "
      "--test-images 8 --threads 1 --no-cuda");
  EXPECT_THAT(
      rows(result.out),
      ElementsAre(
          StartsWith("iteration:1 loss:"),
          StartsWith("iteration:3 loss:"),
          StartsWith("iteration:4 loss:"),
          StartsWith("iteration:4 test_loss:")));
  const auto log = read(directory_ / "results/resnet32-synthetic/log.jsonl");
  EXPECT_THAT(log, StartsWith("{\"iteration\":3,")) << "where rows are even";
}

TEST_F(TrainProgram, PlainAndReversiblePrintTheSameFirstLosses) {
  for (const std::string format : {"channels-last", "contiguous"}) {
    const std::string run =
        "revnet38 synthetic --iterations 2 --fresh "
        "--memory-format " +
        format;
    const auto plain = short_run(run + " --plain");
    ASSERT_EQ(rows(plain.out).size(), 3U) << plain.err;
    for (const std::string engine : {"sequence", "wrapper"}) {
      const auto reversible = short_run(run + " --engine " + engine);
      ASSERT_EQ(rows(reversible.out).size(), 3U) << reversible.err;
      EXPECT_EQ(rows(plain.out)[0], rows(reversible.out)[0]) << engine;
      EXPECT_EQ(rows(plain.out)[1], rows(reversible.out)[1]) << engine;
    }
  }
}

TEST_F(TrainProgram, WithFractionalBitsPrintsTheSameLossesUnderEveryEngine) {
  const std::string run =
      "revnet38 synthetic --iterations 6 "
      "--fractional-bits 12 ";
  const auto plain = short_run(run + "--plain");
  ASSERT_EQ(rows(plain.out).size(), 7U) << plain.err;
  for (const std::string options :
       {"",
        "--engine wrapper",
        "--memory-budget 4 --keep-transitions "
        "--results-dir results/saved"}) {
    const auto reversible = short_run(run + options);
    EXPECT_EQ(rows(plain.out), rows(reversible.out))
        << options << reversible.err;
  }
}

TEST_F(TrainProgram, TrainsInBfloat16) {
  for (const std::string model : {"resnet32", "revnet38"}) {
    const auto result = short_run(
        model + " synthetic --iterations 2 --amp --results-dir " + model);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    const auto exact = short_run(
        model + " synthetic --iterations 2 --results-dir exact" + model);
    EXPECT_NE(rows(result.out), rows(exact.out));
    const auto written = read(directory_ / model / "results.json");
    EXPECT_THAT(written, HasSubstr("\"amp\": true"));
    EXPECT_THAT(written, HasSubstr("\"memory_format\": \"channels-last\""));
  }
}

TEST_F(TrainProgram, WritesItsSettingsToTheResults) {
  const auto result = short_run(
      "revnet38 synthetic --iterations 1 --fractional-bits 12 "
      "--memory-budget 4 --results-dir here");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  const auto written = read(directory_ / "here" / "results.json");
  for (const char* setting :
       {"\"engine\": \"sequence\"",
        "\"fractional_bits\": 12",
        "\"memory_budget_mib\": 4",
        "\"checkpoint_transitions\": true",
        "\"amp\": false",
        "\"memory_format\": \"channels-last\""}) {
    EXPECT_THAT(written, HasSubstr(setting)) << setting;
  }
}

TEST_F(TrainProgram, SaysWhatItsBudgetKeeps) {
  const auto result =
      short_run("revnet38 synthetic --iterations 2 --memory-budget 1");
  EXPECT_THAT(
      result.out,
      ContainsRegex(
          "\n\nkept for backward: 0\\.[0-9]+ MiB: [0-9]+ results, sparing [0-9]+ % "
          "of the multiply-adds of second runs\n"
          "iteration:1 "))
      << result.err;
  const auto kept =
      json::parse(read(directory_ / "results/revnet38-synthetic/results.json"))
          .at("kept");
  EXPECT_GT(kept.at("results"), 0);
  EXPECT_LE(kept.at("bytes"), 1 << 20);
  EXPECT_LT(kept.at("spared"), kept.at("multiply_adds"));
}

/// The test loss and all that follows it in the last row of a run.
std::string evaluation(const Result& result) {
  const auto all = rows(result.out);
  return all.empty() ? result.err
                     : all.back().substr(all.back().find(" test_loss"));
}

TEST_F(TrainProgram, EvaluatesSavedWeights) {
  const auto trained = short_run(
      "revnet38 synthetic --iterations 2 --save-weights a/folder/trained.pt");
  ASSERT_EQ(trained.exit_code, 0) << trained.err;
  EXPECT_THAT(trained.out, HasSubstr("\nweights: a/folder/trained.pt\n"));

  const auto loaded = short_run(
      "revnet38 synthetic --iterations 0 --load-weights a/folder/trained.pt "
      "--save-weights again.pt --engine wrapper --results-dir other");
  ASSERT_EQ(loaded.exit_code, 0) << loaded.err;
  EXPECT_EQ(rows(loaded.out).size(), 1U);
  EXPECT_EQ(evaluation(loaded), evaluation(trained));
  EXPECT_THAT(loaded.out, Not(HasSubstr("time per step")));
  EXPECT_EQ(
      read(directory_ / "again.pt"),
      read(directory_ / "a" / "folder" / "trained.pt"));
  EXPECT_FALSE(fs::exists(directory_ / "again.pt.memcnn-partial"));
  EXPECT_FALSE(fs::exists(directory_ / "other" / "checkpoint.memcnn"));
}

TEST_F(TrainProgram, WarnsOfAnEvaluationThatIsNotFinite) {
  // Weights of some 1e30 are finite, but not what they make of an image.
  const auto result = short_run(
      "resnet32 synthetic --iterations 1 --learning-rate 1e30 --save-weights "
      "weights.pt");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  const std::string warning =
      "memcnn_train: warning: the test loss of iteration 1 is -?nan, and its "
      "accuracy says nothing\\. The first value that is not finite is in .+\n";
  EXPECT_THAT(result.err, MatchesRegex(warning));
  const auto loaded = short_run(
      "resnet32 synthetic --iterations 0 --load-weights weights.pt "
      "--results-dir other");
  EXPECT_EQ(loaded.exit_code, 0);
  EXPECT_THAT(
      loaded.err,
      MatchesRegex("memcnn_train: warning: the test loss of iteration 0 .+\n"));
}

TEST_F(TrainProgram, BlamesNoLearningRateForWeightsAsTheyWereLoaded) {
  ASSERT_EQ(
      short_run("resnet32 synthetic --iterations 1 --learning-rate 1e30 "
                "--save-weights weights.pt")
          .exit_code,
      0);
  const auto result = short_run(
      "resnet32 synthetic --iterations 2 --load-weights weights.pt "
      "--results-dir other");
  EXPECT_THAT(
      result.err,
      AllOf(
          HasSubstr("at iteration 1. The first value"),
          HasSubstr(". Give another --load-weights: no step has changed those "
                    "of weights.pt yet.\n")));
}

TEST_F(TrainProgram, TrainsOnFromLoadedWeights) {
  const auto start = short_run(
      "resnet32 synthetic --iterations 1 --save-weights start.pt "
      "--results-dir start");
  ASSERT_EQ(start.exit_code, 0) << start.err;
  const std::string run =
      "resnet32 synthetic --iterations 2 --load-weights start.pt ";
  const auto first = short_run(run + "--seed 1 --results-dir first");
  const auto random =
      short_run("resnet32 synthetic --iterations 2 --seed 1 --results-dir r");
  ASSERT_EQ(rows(first.out).size(), 3U) << first.err;
  EXPECT_NE(rows(first.out)[0], rows(random.out)[0]);

  // The checkpoint goes first, even where the file is gone.
  fs::remove(directory_ / "start.pt");
  const auto again = short_run(run + "--seed 1 --results-dir first");
  EXPECT_EQ(again.exit_code, 0) << again.err;
  EXPECT_THAT(
      again.out,
      StartsWith("going on from first/checkpoint.memcnn at iteration 2\n"
                 "not reading start.pt: the run started from it\n"));
  EXPECT_EQ(evaluation(again), evaluation(first));

  // A run that has started elsewhere is another run.
  expect_error(
      short_run(
          "resnet32 synthetic --iterations 2 --seed 1 --results-dir first "
          "--load-weights other.pt"),
      "expected the checkpoint first/checkpoint.memcnn to be of a run with "
      "--load-weights \"other.pt\", but it is of one with --load-weights "
      "\"start.pt\". Give --fresh to overwrite it, or another --results-dir.");
  const auto elsewhere = short_run(
      "resnet32 synthetic --iterations 2 --seed 1 --results-dir first "
      "--load-weights ././start.pt");
  EXPECT_EQ(elsewhere.exit_code, 0) << elsewhere.err;
}

TEST_F(TrainProgram, RejectsWeightsBeforeItTouchesAnything) {
  ASSERT_EQ(
      short_run("resnet32 synthetic --iterations 1 --save-weights resnet32.pt "
                "--results-dir here")
          .exit_code,
      0);
  const std::string checkpoint =
      read(directory_ / "here" / "checkpoint.memcnn");
  const std::string run =
      "revnet38 synthetic --iterations 1 --fresh --results-dir here ";
  expect_error(
      short_run(run + "--load-weights gone.pt"),
      "expected gone.pt to be a file of weights, but reading it failed: No such "
      "file or directory. Give one that torch.save(model.state_dict(), file) has "
      "written.");
  expect_error(
      short_run(run + "--load-weights resnet32.pt"),
      "expected resnet32.pt to have all weights of revnet38, but it lacks "
      "\"layer1.0.revblock._fn.Fm.conv1.weight\" and 131 more, and has "
      "\"layer1.0.basicblock_sub.conv1.weight\" (did you mean "
      "\"layer1.0.revblock._fn.Fm.conv1.weight\"?) and 150 more. Give the file "
      "of a revnet38.");
  expect_error(
      short_run(run + "--save-weights here"),
      "expected here to be a file or nothing yet, but it is a directory. Move "
      "it away, or give another --save-weights.");
  EXPECT_EQ(read(directory_ / "here" / "checkpoint.memcnn"), checkpoint);
}

TEST_F(TrainProgram, StopsOnNanLossAndKeepsTheLastGoodCheckpoint) {
  const auto result = short_run(
      "resnet32 synthetic --iterations 5 --learning-rate 1e30 "
      "--checkpoint-every 1 --results-dir here");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_TRUE(std::regex_match(
      result.err,
      std::regex(
          "memcnn_train: expected the loss to be finite, but got "
          "-?(nan|inf) at iteration 2\\. The first value that is not "
          "finite is in the output of [a-zA-Z0-9.]+ "
          "?(\\(ResidualBlock\\))?\\. "
          "Give a lower --learning-rate \\(now 1e\\+30\\) with "
          "--fresh, or with another --results-dir: the last good "
          "checkpoint stays in here/checkpoint\\.memcnn until then\\.\n")))
      << result.err;
  EXPECT_TRUE(fs::exists(directory_ / "here" / "checkpoint.memcnn"));
  EXPECT_FALSE(fs::exists(directory_ / "here" / "results.json"));
}

} // namespace
