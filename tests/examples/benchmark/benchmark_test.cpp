// SPDX-License-Identifier: MIT

// memcnn_benchmark as its users meet it: arguments in, text and exit code out.

#include "support/program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace {

using nlohmann::json;
using testing::HasSubstr;
using testing::MatchesRegex;
using testing::StartsWith;

struct Result : memcnn_test::Result {
  /// stdout, line by line: every line has to be an object.
  std::vector<json> rows() const {
    std::vector<json> found;
    std::istringstream lines(out);
    for (std::string line; std::getline(lines, line);) {
      found.push_back(json::parse(line, nullptr, /*allow_exceptions=*/false));
      EXPECT_TRUE(found.back().is_object()) << line;
    }
    return found;
  }

  std::map<std::string, json> by_engine() const {
    std::map<std::string, json> found;
    for (const json& row : rows()) {
      found[row.at("engine")] = row;
    }
    return found;
  }
};

class BenchmarkProgram : public memcnn_test::ProgramTest {
 protected:
  Result run(const std::string& arguments) {
    return {shell("'" MEMCNN_BENCHMARK "' " + arguments)};
  }

  /// A run of a second or two.
  Result small(const std::string& arguments) {
    return run(
        "--depth 3 --channels 4 --batch 2 --size 8 --steps 2 --warmup 0 "
        "--threads 1 " +
        arguments);
  }

  /// Exactly one message, and nothing else done.
  void expect_error(const Result& result, const std::string& message) {
    EXPECT_EQ(result.exit_code, 1);
    EXPECT_EQ(result.out, "");
    EXPECT_EQ(result.err, "memcnn_benchmark: " + message + "\n");
  }

  /// The error says the range, and so does --help.
  void expect_out_of_range(
      const std::string& option,
      const std::string& value,
      const std::string& range) {
    expect_error(
        run(option + " " + value),
        "expected a valid command line, but got: " + option + ": Value " +
            value + " not in range " + range +
            ". See memcnn_benchmark --help.");
    EXPECT_THAT(run("--help").out, HasSubstr(option + " INT:" + range));
  }
};

TEST_F(BenchmarkProgram, ExplainsItself) {
  const auto help = run("--help");
  EXPECT_EQ(help.exit_code, 0);
  EXPECT_THAT(help.out, HasSubstr("memcnn_benchmark [OPTIONS]"));
  EXPECT_THAT(help.out, HasSubstr("--depth INT"));
  EXPECT_THAT(run("--version").out, StartsWith("memcnn_benchmark "));
}

TEST_F(BenchmarkProgram, RejectsUnknownEngine) {
  expect_error(
      run("--engines plain,faster"),
      "expected a valid command line, but got: --engines: faster not in "
      "{plain,checkpoint,checkpoint-whole,checkpoint-sequential,"
      "checkpoint-sequential-budget,wrapper,sequence,sequence-budget}. See "
      "memcnn_benchmark --help.");
}

TEST_F(BenchmarkProgram, RejectsUnknownFlag) {
  const auto result = run("--layers 3");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(
      result.err,
      StartsWith("memcnn_benchmark: expected a known argument, but got "
                 "\"--layers\". There are --help, --version, --config, "
                 "--depth, "));
  EXPECT_EQ(result.out, "");
}

TEST_F(BenchmarkProgram, RejectsValueOutOfRange) {
  expect_out_of_range("--depth", "0", "1 to 10000");
  expect_out_of_range("--depth", "1000000000", "1 to 10000");
  for (const std::string option : {"--channels", "--batch", "--size"}) {
    expect_out_of_range(option, "8193", "1 to 8192");
  }
  expect_out_of_range("--threads", "1000000", "1 to 1024");
  expect_out_of_range("--steps", "1000000001", "1 to 1000000000");
  expect_out_of_range("--warmup", "-1", "0 to 1000000000");
  expect_out_of_range(
      "--seed", "9223372036854775808", "0 to 9223372036854775807");
  expect_error(
      run("--dtype int8"),
      "expected a valid command line, but got: --dtype: int8 not in "
      "{float32,float64,bfloat16,float16}. See memcnn_benchmark --help.");
  for (const std::string budget :
       {"-1", "much", "50%%", "5 MiB", "nan", "1000000001", "1001%"}) {
    expect_error(
        run("--budget '" + budget + "'"),
        "expected --budget to be from 0 to 1000000000 MiB, from 0% to 1000% of "
        "what plain holds, or all, but got \"" +
            budget + "\". See memcnn_benchmark --help.");
  }
}

TEST_F(BenchmarkProgram, ReadsConfigFile) {
  memcnn_test::write(
      directory_ / "benchmark.toml",
      "# Two engines of five\n"
      "engines = [\"plain\", \"sequence\"]\n"
      "depth = 1000\n"
      "json = true\n");
  const auto rows = small("--config benchmark.toml").rows();
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows[1].at("engine"), "sequence");
  EXPECT_EQ(rows[1].at("depth"), 3) << "the command line wins";
}

TEST_F(BenchmarkProgram, RejectsMissingGpu) {
  const auto result = small("--device cuda --engines plain --json");
  if (result.exit_code == 0) {
    GTEST_SKIP() << "there is a GPU";
  }
  expect_error(
      result,
      "expected a GPU that LibTorch can use for --device cuda, but found none. "
      "Give --device cpu.");
}

TEST_F(BenchmarkProgram, RejectsGraphsAndTf32OnACpu) {
  for (const std::string option : {"--graph", "--precision tf32"}) {
    expect_error(
        small(option),
        "expected --device cuda for " + option +
            ", but got --device cpu. Leave one of them out.");
  }
}

TEST_F(BenchmarkProgram, RejectsAPrecisionOfOtherDtypes) {
  expect_error(
      small("--precision bfloat16 --dtype float64"),
      "expected --dtype float32 for --precision bfloat16, but got --dtype "
      "float64. Leave one of them out.");
}

TEST_F(BenchmarkProgram, RunsUnderAutocast) {
  const auto rows = small("--precision bfloat16 --json").by_engine();
  ASSERT_EQ(rows.size(), 5U);
  // A second run under autocast has the same values as the first.
  EXPECT_EQ(rows.at("checkpoint").at("grad_rel_error"), 0.0);
  const auto in_float32 = small("--json").by_engine();
  EXPECT_LT(
      rows.at("plain").at("saved_bytes"),
      in_float32.at("plain").at("saved_bytes"));
}

TEST_F(BenchmarkProgram, PrintsTable) {
  const auto result = small("");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(result.err, "");
  for (const char* text :
       {"3 additive couplings of 2 x 4 channels, batch 2, 8 x 8, float32, "
        "contiguous, cpu, 1 thread\n",
        "\nplain ",
        "\ncheckpoint ",
        "\nwrapper ",
        "\nsequence ",
        "\nsequence-budget ",
        "to plain",
        "fused limit",
        "held MiB",
        "\nsequence-budget 50%: budget 0.03 MiB, kept 0.02 MiB: ",
        " % of the multiply-adds of second runs\n"}) {
    EXPECT_THAT(result.out, HasSubstr(text)) << text;
  }
}

TEST_F(BenchmarkProgram, PrintsAllFieldsAsJson) {
  const auto result = small("--json");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(result.err, "");
  const auto rows = result.rows();
  ASSERT_EQ(rows.size(), 5U);
  for (const json& row : rows) {
    for (const char* text :
         {"engine",
          "version",
          "torch",
          "device",
          "dtype",
          "precision",
          "memory_format",
          "sequence_format",
          "coupling"}) {
      EXPECT_TRUE(row.at(text).is_string()) << text;
    }
    for (const char* count :
         {"depth",
          "channels",
          "batch",
          "size",
          "threads",
          "parameters",
          "bn_updates",
          "saved_bytes",
          "peak_bytes",
          "left_bytes"}) {
      EXPECT_TRUE(row.at(count).is_number_integer()) << count;
    }
    for (const char* number :
         {"grad_norm_first",
          "grad_rel_error",
          "step_s",
          "forward_s",
          "backward_s",
          "step_min_s",
          "enqueue_s",
          "ratio_to_plain",
          "fused_limit"}) {
      EXPECT_TRUE(row.at(number).is_number()) << number;
    }
    EXPECT_EQ(row.at("graph"), false);
    EXPECT_TRUE(row.at("grad_agrees").get<bool>()) << row;
    EXPECT_EQ(row.at("bn_updates"), 1) << row;
    EXPECT_LE(row.at("step_min_s"), row.at("step_s"));
    EXPECT_GT(row.at("fused_limit"), 1.0);
    EXPECT_LT(row.at("fused_limit"), 2.0);
    EXPECT_GE(row.at("peak_bytes"), row.at("saved_bytes"));
    // The gradients of the parameters, and nothing more.
    EXPECT_EQ(row.at("left_bytes"), 4 * row.at("parameters").get<int64_t>());
    EXPECT_FALSE(row.contains("error"));
  }
  EXPECT_EQ(rows[0].at("engine"), "plain");
  EXPECT_EQ(rows[0].at("ratio_to_plain"), 1.0);
}

TEST_F(BenchmarkProgram, CountsMemoryAsOnPaper) {
  constexpr int64_t kDepth = 3;
  constexpr int64_t kChannels = 4;
  constexpr int64_t kHalf = 2 * kChannels * 8 * 8 * 4; // bytes
  constexpr int64_t kLoss = 4;
  const auto rows = small("--json").by_engine();
  // Eight halves a coupling, and the statistics of its four normalisations.
  EXPECT_EQ(
      rows.at("plain").at("saved_bytes"),
      2 * kHalf + (8 * kHalf + 32 * kChannels) * kDepth + kLoss);
  for (const char* engine : {"wrapper", "sequence"}) {
    EXPECT_EQ(rows.at(engine).at("saved_bytes"), 2 * kHalf + kLoss) << engine;
  }
  EXPECT_EQ(
      rows.at("checkpoint").at("saved_bytes"),
      2 * kHalf * (kDepth + 1) + kLoss);
}

TEST_F(BenchmarkProgram, ComparesWithPlainUnlisted) {
  const auto rows =
      small(
          "--engines sequence,wrapper --coupling affine --dtype float64 "
          "--json")
          .rows();
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows[0].at("engine"), "sequence");
  EXPECT_EQ(rows[1].at("engine"), "wrapper");
  for (const json& row : rows) {
    EXPECT_LT(row.at("grad_rel_error"), 1e-12);
    EXPECT_GT(row.at("ratio_to_plain"), 0.0);
  }
}

TEST_F(BenchmarkProgram, RunsInMemoryFormats) {
  for (const std::string arguments :
       {"--memory-format channels-last", "--sequence-format channels-last"}) {
    const auto rows = small(arguments + " --json").rows();
    ASSERT_EQ(rows.size(), 5U) << arguments;
    for (const json& row : rows) {
      EXPECT_TRUE(row.at("grad_agrees").get<bool>()) << row;
    }
  }
}

TEST_F(BenchmarkProgram, KeepsByBudget) {
  for (const std::string engine :
       {"sequence-budget", "checkpoint-sequential-budget"}) {
    const auto rows =
        small("--json --budget 0,50%,all --engines " + engine).rows();
    ASSERT_EQ(rows.size(), 3U);
    EXPECT_EQ(rows[0].at("kept_bytes"), 0) << engine;
    EXPECT_EQ(rows[0].at("kept_blocks"), 0) << engine;
    EXPECT_EQ(rows[0].at("kept_results"), 0) << engine;
    EXPECT_GT(rows[1].at("kept_results"), 0) << engine;
    EXPECT_LE(rows[1].at("kept_bytes"), rows[1].at("budget_bytes")) << engine;
    EXPECT_GT(rows[2].at("kept_blocks"), 0) << engine;
  }
}

TEST_F(BenchmarkProgram, RunsEveryEngineWithEachBudget) {
  const std::string arguments =
      "--engines sequence-budget,checkpoint-sequential-budget,wrapper "
      "--budget 0,50%,all";
  const std::vector<std::string> budgets = {"0", "50%", "all"};
  const auto rows = small(arguments + " --json").rows();
  ASSERT_EQ(rows.size(), 2 * budgets.size() + 1);
  for (size_t i = 0; i < 2 * budgets.size(); ++i) {
    EXPECT_EQ(rows[i].at("budget"), budgets[i % budgets.size()]) << i;
  }
  for (const size_t first : {size_t{0}, budgets.size()}) {
    EXPECT_LT(
        rows[first].at("saved_bytes"),
        rows[first + budgets.size() - 1].at("saved_bytes"));
  }
  EXPECT_FALSE(rows.back().contains("budget"));

  const auto table = small(arguments).out;
  for (const std::string& budget : budgets) {
    EXPECT_THAT(table, HasSubstr("\nsequence-budget " + budget + " "));
  }
}

TEST_F(BenchmarkProgram, RejectsOneBudgetOfMany) {
  const auto result = small("--budget 0,much");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, HasSubstr("but got \"much\""));
}

TEST_F(BenchmarkProgram, RunsCheckpointsOfEveryKind) {
  const auto rows = small(
                        "--engines checkpoint,checkpoint-whole,"
                        "checkpoint-sequential,checkpoint-sequential-budget "
                        "--dtype float64 --json")
                        .by_engine();
  ASSERT_EQ(rows.size(), 4U);
  for (const auto& [engine, row] : rows) {
    EXPECT_LT(row.at("grad_rel_error"), 1e-12) << engine;
  }
  EXPECT_EQ(
      rows.at("checkpoint").at("saved_bytes"),
      rows.at("checkpoint-whole").at("saved_bytes"));
  EXPECT_TRUE(rows.at("checkpoint-sequential-budget").contains("budget_bytes"));
}

TEST_F(BenchmarkProgram, FindsExactModeExact) {
  const auto rows = run("--coupling exact --depth 20 --channels 4 --batch 2 "
                        "--size 8 --steps 1 --warmup 0 --threads 1 --json")
                        .rows();
  ASSERT_EQ(rows.size(), 5U);
  for (const json& row : rows) {
    EXPECT_EQ(row.at("grad_rel_error"), 0.0) << row;
  }
}

TEST_F(BenchmarkProgram, ShowsErrorsOfEnginesInTheirRows) {
  const std::string arguments =
      "--dtype bfloat16 --coupling exact --engines plain,sequence";
  const auto result = small(arguments + " --json");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_EQ(result.err, "");
  const auto rows = result.rows();
  ASSERT_EQ(rows.size(), 2U);
  for (const json& row : rows) {
    EXPECT_EQ(row.at("depth"), 3);
    EXPECT_THAT(
        row.at("error").get<std::string>(),
        StartsWith(
            "AdditiveCoupling::forward(): expected fractional_bits below 8"))
        << row;
  }
  const auto table = small(arguments);
  EXPECT_EQ(table.exit_code, 1);
  EXPECT_THAT(table.out, HasSubstr("\nsequence  error: "));
}

class BenchmarkProgramCuda : public BenchmarkProgram {
 protected:
  void SetUp() override {
    BenchmarkProgram::SetUp();
    const auto probe = small("--device cuda --engines plain --json");
    if (probe.exit_code != 0 && probe.out.empty()) {
      GTEST_SKIP() << "no CUDA device";
    }
  }
};

TEST_F(BenchmarkProgramCuda, ReplaysAGraphOfEveryEngine) {
  for (const std::string precision : {"ieee", "tf32", "bfloat16"}) {
    const auto result =
        small("--device cuda --graph --json --precision " + precision);
    EXPECT_EQ(result.exit_code, 0) << result.out;
    for (const json& row : result.rows()) {
      EXPECT_EQ(row.at("graph"), true);
      EXPECT_EQ(row.at("precision"), precision);
      EXPECT_GT(row.at("graph_bytes"), row.at("saved_bytes")) << row;
      EXPECT_GT(row.at("step_s"), 0.0);
      EXPECT_GT(row.at("ratio_to_plain"), 0.0);
      EXPECT_FALSE(row.contains("forward_s"));
      // Deep in bfloat16, two ways to round are apart; none is lost.
      EXPECT_LT(row.at("grad_rel_error"), precision == "ieee" ? 1e-3 : 0.5);
    }
  }
}

TEST_F(BenchmarkProgramCuda, PrintsATableOfReplays) {
  const auto result = small("--device cuda --graph --precision tf32");
  EXPECT_EQ(result.exit_code, 0) << result.out;
  for (const char* text :
       {"float32 in tf32, contiguous, cuda, 1 thread\n",
        "; medians of 2 replays of a graph, engines in turn\n",
        "\nsequence ",
        "graph MiB",
        "a replay is not parted into forward and backward\n"}) {
    EXPECT_THAT(result.out, HasSubstr(text)) << text;
  }
  EXPECT_THAT(result.out, testing::Not(HasSubstr("forward ms")));
}

} // namespace
