// SPDX-License-Identifier: MIT

// What the command lines of all programs have in common, on one of a kind of
// each of their options.

#include "support/command_line.h"
#include "support/error.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>
#include <CLI/CLI.hpp>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::EndsWith;
using testing::HasSubstr;
using testing::StartsWith;
using testing::ThrowsMessage;

struct Options {
  std::string model;
  int64_t count = 3;
  double rate = 0.5;
  std::vector<std::string> kinds = {"plain"};
  bool use_cuda = true;
};

/// What a program with these options makes of its arguments.
Options parsed(std::vector<const char*> arguments) {
  Options options;
  CLI::App app("Counts.", "counter");
  support::add_common_options(app);
  app.add_option("MODEL", options.model);
  app.add_option("--count", options.count)->transform(support::count_from(1));
  app.add_option("--rate", options.rate)->check(support::number_up_to(1e30));
  app.add_option("--kinds", options.kinds)
      ->delimiter(',')
      ->check(support::one_of({"plain", "wrapper"}));
  app.add_flag_callback("--no-cuda", [&] { options.use_cuda = false; });
  arguments.insert(arguments.begin(), "counter");
  EXPECT_TRUE(support::parse(
      app, static_cast<int>(arguments.size()), arguments.data()));
  return options;
}

auto rejects(const std::string& got) {
  return ThrowsMessage<support::Error>(AllOf(
      StartsWith("expected a valid command line, but got: "),
      HasSubstr(got),
      EndsWith(". See counter --help.")));
}

TEST(CommandLine, KeepsDefaults) {
  const Options options = parsed({});
  EXPECT_EQ(options.count, 3);
  EXPECT_EQ(options.rate, 0.5);
  EXPECT_THAT(options.kinds, ElementsAre("plain"));
  EXPECT_TRUE(options.use_cuda);
}

TEST(CommandLine, ReadsOptions) {
  const Options options = parsed(
      {"revnet38",
       "--count",
       "1000000000",
       "--rate=1e30",
       "--kinds",
       "wrapper,plain",
       "--no-cuda"});
  EXPECT_EQ(options.model, "revnet38");
  EXPECT_EQ(options.count, 1000000000);
  EXPECT_EQ(options.rate, 1e30);
  EXPECT_THAT(options.kinds, ElementsAre("wrapper", "plain"));
  EXPECT_FALSE(options.use_cuda);
}

TEST(CommandLine, RejectsWhatIsNoCount) {
  const auto expect_rejected = [](const std::string& text,
                                  const std::string& why) {
    EXPECT_THAT(
        [&] {
          parsed({"--count", text.c_str()});
        },
        rejects("--count: Value " + text + why + " 1 to 1000000000"));
  };
  for (const char* text : {"0", "-1", "1000000001", "99999999999999999999"}) {
    expect_rejected(text, " not in range");
  }
  for (const char* text :
       {"5x", "1.5", "many", "nan", "inf", "1e3", "0x10", "-"}) {
    expect_rejected(text, " is no whole number from");
  }
}

TEST(CommandLine, ReadsCountsAsDecimalNumbers) {
  EXPECT_EQ(parsed({"--count", "010"}).count, 10);
}

TEST(CommandLine, RejectsWhatIsNoRate) {
  for (const std::string text :
       {"-1",
        "-1e-9",
        "high",
        "0.1x",
        "nan",
        "-nan",
        "inf",
        "1e400",
        "1e31",
        "0x10"}) {
    EXPECT_THAT(
        [&] {
          parsed({"--rate", text.c_str()});
        },
        rejects("--rate: Value " + text + " not in range 0 to 1e+30"));
  }
}

TEST(CommandLine, RejectsUnknownName) {
  EXPECT_THAT(
      [] {
        parsed({"--kinds", "plain,faster"});
      },
      rejects("--kinds: faster not in {plain,wrapper}"));
}

TEST(CommandLine, ListsKnownArgumentsBesideUnknownOne) {
  for (const char* unknown : {"--depth", "-x"}) {
    EXPECT_THAT(
        [&] {
          parsed({"revnet38", unknown});
        },
        ThrowsMessage<support::Error>(
            "expected a known argument, but got \"" + std::string(unknown) +
            "\". There are --help, --version, --config, MODEL, --count, "
            "--rate, --kinds, --no-cuda."));
  }
}

TEST(CommandLine, AsksForTheNearestName) {
  EXPECT_THAT(
      [] {
        parsed({"--kinds", "plain,warpper"});
      },
      rejects("--kinds: warpper not in {plain,wrapper} (did you mean "
              "wrapper?)."));
  for (const char* argument : {"--cout", "--cout=5", "--coun", "--countt"}) {
    EXPECT_THAT(
        [&] {
          parsed({argument, "5"});
        },
        ThrowsMessage<support::Error>(StartsWith(
            "expected a known argument, but got \"" + std::string(argument) +
            "\" (did you mean --count?). There are ")));
  }
}

TEST(CommandLine, KnowsWhatOtherProgramsCallAnOption) {
  const std::vector<std::string> names = {
      "DATASET",
      "--iterations",
      "--learning-rate",
      "--no-cuda",
      "--fresh",
      "--load-weights",
      "--log-every"};
  EXPECT_EQ(
      support::hint_on_name("--lr", names), " (did you mean --learning-rate?)");
  EXPECT_EQ(
      support::hint_on_name("lr", {"learning-rate"}),
      " (did you mean learning-rate?)");
  EXPECT_EQ(support::hint_on_name("--lr", {"--depth"}), "");
  EXPECT_EQ(
      support::hint_on_name("--device", names),
      " (a GPU is used where there is one, but with --no-cuda)");
  EXPECT_EQ(
      support::hint_on_name("--iters", {"--steps"}),
      " (did you mean --steps?)");
  for (const char* name :
       {"--epochs",
        "--iters",
        "--cpu",
        "--cuda",
        "--weights",
        "--resume",
        "--dataset",
        "--log-interval"}) {
    EXPECT_NE(support::hint_on_name(name, names), "") << name;
  }
}

TEST(CommandLine, NamesAnUnknownFlagBeforeWhatItsValueSpoils) {
  Options options;
  CLI::App app("Counts.", "counter");
  app.add_option("MODEL", options.model)->check(support::one_of({"revnet38"}));
  std::vector<const char*> arguments = {"counter", "--cuont", "5", "revnet38"};
  EXPECT_THAT(
      [&] { support::parse(app, 4, arguments.data()); },
      ThrowsMessage<support::Error>(HasSubstr(", but got \"--cuont\"")));
}

class ConfigFile : public testing::Test {
 protected:
  void SetUp() override {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    path_ = std::filesystem::temp_directory_path() /
        ("memcnn_" + std::string(test->name()) + "_" +
         std::to_string(::getpid()) + ".toml");
  }

  void TearDown() override {
    std::filesystem::remove(path_);
  }

  /// With a file of these lines, before other arguments.
  Options parsed_with(
      const std::string& lines,
      const std::vector<const char*>& others = {}) {
    std::ofstream(path_) << lines;
    const std::string path = path_.string();
    std::vector<const char*> arguments = {"--config", path.c_str()};
    arguments.insert(arguments.end(), others.begin(), others.end());
    return parsed(arguments);
  }

  std::filesystem::path path_;
};

TEST_F(ConfigFile, GivesOptions) {
  const Options options = parsed_with(
      "# What is counted\n"
      "MODEL = \"revnet38\"\n"
      "count = 7\n"
      "kinds = [\"wrapper\", \"plain\"]\n"
      "no-cuda = true\n");
  EXPECT_EQ(options.model, "revnet38");
  EXPECT_EQ(options.count, 7);
  EXPECT_EQ(options.rate, 0.5);
  EXPECT_THAT(options.kinds, ElementsAre("wrapper", "plain"));
  EXPECT_FALSE(options.use_cuda);
}

TEST_F(ConfigFile, LetsFlagsBeSetToWhatTheyAre) {
  EXPECT_TRUE(parsed_with("no-cuda = false\n").use_cuda);
}

TEST_F(ConfigFile, YieldsToTheCommandLine) {
  const Options options =
      parsed_with("count = 7\nrate = 2\n", {"--count", "8"});
  EXPECT_EQ(options.count, 8);
  EXPECT_EQ(options.rate, 2);
}

TEST_F(ConfigFile, RejectsUnknownKey) {
  EXPECT_THAT(
      [&] { parsed_with("depth = 3\n"); },
      ThrowsMessage<support::Error>(AllOf(
          StartsWith(
              "expected a known argument, but got in " + path_.string() +
              ": \"depth\". There are --help, "),
          HasSubstr("--count, "))));
  EXPECT_THAT(
      [&] { parsed_with("cuont = 3\n"); },
      ThrowsMessage<support::Error>(
          HasSubstr(": \"cuont\" (did you mean count?). There are ")));
  EXPECT_THAT(
      [&] { parsed_with("[run]\ncuont = 3\n"); },
      ThrowsMessage<support::Error>(
          HasSubstr(": \"[run]\" (options stand in no section). There are ")));
}

TEST_F(ConfigFile, IsShownWithoutItsEscapes) {
  EXPECT_THAT(
      [&] { parsed_with("count = \"\x1b[2J\"\n"); },
      rejects("--count: Value \\x1b[2J is no whole number from "));
  EXPECT_THAT(
      [&] { parsed_with("\x1b[2J = 3\n"); },
      ThrowsMessage<support::Error>(HasSubstr(" \"\\x1b[2J\". ")));
}

TEST_F(ConfigFile, RejectsValueOutOfRange) {
  EXPECT_THAT(
      [&] { parsed_with("count = 0\n"); },
      rejects("--count: Value 0 not in range "));
}

TEST_F(ConfigFile, HasToBeThere) {
  EXPECT_THAT(
      [] {
        parsed({"--config", "nowhere.toml"});
      },
      rejects("--config: \"nowhere.toml\" is no file"));
}

TEST_F(ConfigFile, IsAFileOfAtMostAMebibyte) {
  const auto expect_rejected = [](const char* path, const char* why) {
    EXPECT_THAT(
        [&] {
          parsed({"--config", path});
        },
        rejects("--config: \"" + std::string(path) + "\" " + why));
  };
  const std::string most = "#" + std::string((1 << 20) - 1, ' ');
  EXPECT_EQ(parsed_with(most).rate, 0.5);
  EXPECT_THAT(
      [&] { parsed_with(most + " "); }, rejects("\" has more than 1 MiB"));
  std::filesystem::remove(path_);
  ASSERT_EQ(::mkfifo(path_.c_str(), 0600), 0);
  expect_rejected(path_.c_str(), "is no file");
  expect_rejected("/dev/zero", "is no file");
  expect_rejected("/", "is no file");
  expect_rejected("", "is no file");
  expect_rejected("/proc/self/mem", "cannot be read"); // at 0, by nobody
}

} // namespace
