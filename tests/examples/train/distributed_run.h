// SPDX-License-Identifier: MIT
#pragma once

#include "support/program_ranks.h"
#include "support/train_program.h"

#include <nlohmann/json.hpp>

#include <sstream>
#include <string>
#include <vector>

/// Runs memcnn_train --distributed.
class DistributedTest : public memcnn_test::TrainProgramTest {
 protected:
  using Json = nlohmann::json;

  /// The words of a command.
  static std::vector<std::string> command(const std::string& arguments) {
    std::vector<std::string> argv{MEMCNN_TRAIN};
    std::istringstream words(arguments);
    for (std::string word; words >> word;) {
      argv.push_back(word);
    }
    return argv;
  }

  /// Steps of 12 images, which 2 and 3 processes can share.
  static std::string shared(
      const std::string& arguments,
      const char* batch_size = "12") {
    return arguments + " --batch-size " + batch_size +
        " --log-every 1 --threads 1 --no-cuda --distributed";
  }

  std::vector<memcnn_test::Result> run(
      int ranks,
      const std::string& arguments) {
    return memcnn_test::ProgramRanks(
               ranks, directory_, command(shared(arguments)))
        .wait();
  }

  /// What a log says, but for what depends on the speed of the machine. That is
  /// memory, too: threads of gloo's hold a small tensor a moment longer.
  std::vector<Json> log_of(const std::string& folder) const {
    std::vector<Json> found;
    std::istringstream lines(
        memcnn_test::read(directory_ / folder / "log.jsonl"));
    for (std::string line; std::getline(lines, line);) {
      found.push_back(Json::parse(line));
      for (const char* field :
           {"ms_per_step", "data_ms_per_step", "held_bytes", "peak_bytes"}) {
        found.back().erase(field);
      }
    }
    return found;
  }

  /// Likewise of the results.
  Json results_of(const std::string& folder) const {
    Json results =
        Json::parse(memcnn_test::read(directory_ / folder / "results.json"));
    results.erase("step");
    return results;
  }
};
