// SPDX-License-Identifier: MIT
#pragma once

#include "support/version.h"
#include "train/base/config.h"
#include "train/base/files.h"
#include "train/numerics/numerics.h"
#include "train/run/run_state.h"
#include "train/step/memory_use.h"
#include "train/step/trainer.h"

#include <torch/utils.h>
#include <torch/version.h>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace training {

/// A line on the terminal that says what is going on, and goes when there is
/// something to keep. Nothing where stderr is no terminal.
class ProgressLine {
 public:
  void show(const std::string& text) {
    if (!on_) {
      return;
    }
    std::fprintf(stderr, "\r\033[K%s", text.c_str());
    std::fflush(stderr);
    shown_ = true;
  }

  void clear() {
    if (shown_) {
      std::fputs("\r\033[K", stderr);
      std::fflush(stderr);
      shown_ = false;
    }
  }

  ~ProgressLine() {
    clear();
  }

 private:
  static bool is_terminal() {
#if defined(__unix__) || defined(__APPLE__)
    return isatty(STDERR_FILENO) != 0;
#else
    return false;
#endif
  }

  bool on_ = is_terminal();
  bool shown_ = false;
};

/// Text in printf's manner.
template <class... Args>
std::string format(const char* pattern, Args... args) {
  const int size = std::snprintf(nullptr, 0, pattern, args...);
  std::string text(static_cast<size_t>(size), '\0');
  std::snprintf(text.data(), text.size() + 1, pattern, args...);
  return text;
}

/// Time that the rest of a run takes, as "3 h 12 min", "12 min" or "40 s".
inline std::string remaining_time(double milliseconds) {
  const auto seconds = static_cast<long>(milliseconds / 1000);
  if (seconds < 100) {
    return format("%ld s", seconds);
  }
  const long minutes = (seconds + 30) / 60;
  return minutes < 100 ? format("%ld min", minutes)
                       : format("%ld h %ld min", minutes / 60, minutes % 60);
}

/// The row of the steps since the last one, as the log has it.
inline nlohmann::ordered_json make_row(
    const Config& config,
    const RunState& state) {
  const SinceRow& since = state.since_row;
  const auto steps = static_cast<double>(since.steps);
  const double images = steps * static_cast<double>(config.batch_size);
  return {
      {"iteration", state.iteration},
      {"loss", since.loss / steps},
      {"accuracy", static_cast<double>(since.hits.first) / images},
      {"top5", static_cast<double>(since.hits.top5) / images},
      {"lr", learning_rate_at(config, state.iteration - 1)},
      {"ms_per_step", since.milliseconds / steps},
      {"data_ms_per_step", since.data_milliseconds / steps},
      {"held_bytes", since.memory.held_after_forward},
      {"peak_bytes", since.memory.peak}};
}

inline void print_row(const nlohmann::ordered_json& row) {
  std::printf(
      "iteration:%lld loss:%.4f accuracy:%.4f top5:%.4f lr:%g "
      "ms_per_step:%.1f\n",
      row.at("iteration").get<long long>(),
      row.at("loss").get<double>(),
      row.at("accuracy").get<double>(),
      row.at("top5").get<double>(),
      row.at("lr").get<double>(),
      row.at("ms_per_step").get<double>());
  std::fflush(stdout);
}

inline void print_evaluation(int64_t iteration, const Evaluation& evaluation) {
  std::printf(
      "iteration:%lld test_loss:%.4f test_accuracy:%.4f test_top5:%.4f\n",
      static_cast<long long>(iteration),
      evaluation.loss,
      evaluation.accuracy,
      evaluation.top5);
  std::fflush(stdout);
}

inline void print_numerics(int64_t iteration, const NumericsReport& report) {
  const Deviation inverse = report.inverse();
  std::printf(
      "iteration:%lld inverse_error:%.2e inverse_error_block:%s "
      "gradient_deviation:%.2e gradient_deviation_parameter:%s\n",
      static_cast<long long>(iteration),
      inverse.relative,
      inverse.name.c_str(),
      report.gradient.relative,
      report.gradient.name.c_str());
  std::fflush(stdout);
}

inline void print_warning(const std::string& text) {
  std::fprintf(stderr, "memcnn_train: warning: %s\n", text.c_str());
}

/// Prints the end of a run for people to read.
inline void print_summary(
    const Config& config,
    const RunState& state,
    const Trainer& trainer,
    const Evaluation& evaluation) {
  std::printf(
      "\n%s on %s, engine %s, batches of %lld on %s\n",
      config.model.c_str(),
      config.dataset.c_str(),
      config.engine.c_str(),
      static_cast<long long>(config.batch_size),
      trainer.device().str().c_str());
  std::printf(
      "  test accuracy       %8.2f %%    (among the first five: %.2f %%)\n"
      "  parameters          %8.2f MiB  (%lld)\n",
      100 * evaluation.accuracy,
      100 * evaluation.top5,
      to_mebibytes(trainer.parameter_bytes()),
      static_cast<long long>(trainer.parameter_count()));
  if (state.iteration > 0) {
    std::printf(
        "  time per step       %8.1f ms   (median of %zu steps)\n"
        "  held after forward  %8.2f MiB  (waits for backward)\n"
        "  peak of the step    %8.2f MiB  (beyond parameters, momentum, "
        "batch)\n",
        state.milliseconds_per_step(),
        state.step_milliseconds.size(),
        to_mebibytes(state.memory.held_after_forward),
        to_mebibytes(state.memory.peak));
  }
  std::fflush(stdout);
}

/// Prints a network beside its plain twin.
inline void print_comparison(
    const Config& config,
    const RunState& saving,
    const RunState& plain) {
  const auto row = [](const char* what, double ours, double theirs) {
    std::printf(
        "  %-26s%12.2f%12.2f%10.2f\n", what, ours, theirs, ours / theirs);
  };
  std::printf(
      "\n%s and its plain twin, %lld steps each from the same weights\n"
      "  %-26s%12s%12s%10s\n",
      config.model.c_str(),
      static_cast<long long>(saving.iteration),
      "",
      config.engine.c_str(),
      "plain",
      "ratio");
  row("held after forward (MiB)",
      to_mebibytes(saving.memory.held_after_forward),
      to_mebibytes(plain.memory.held_after_forward));
  row("peak of the step (MiB)",
      to_mebibytes(saving.memory.peak),
      to_mebibytes(plain.memory.peak));
  row("time per step (ms)",
      saving.milliseconds_per_step(),
      plain.milliseconds_per_step());
  row("loss, mean of the steps",
      saving.since_row.loss / static_cast<double>(saving.iteration),
      plain.since_row.loss / static_cast<double>(plain.iteration));
  std::fflush(stdout);
}

/// What results.json holds of a measured run.
inline nlohmann::ordered_json measured(const RunState& state) {
  return {
      {"median_ms_per_step", state.milliseconds_per_step()},
      {"held_after_forward_bytes", state.memory.held_after_forward},
      {"peak_of_the_step_bytes", state.memory.peak}};
}

/// Writes what is known of a run before it has done anything.
inline void write_run(
    const std::filesystem::path& path,
    const Config& config,
    const DataSet& data,
    const std::string& fingerprint,
    const Trainer& trainer) {
  const nlohmann::ordered_json run = {
      {"config", recipe(config)},
      {"device", trainer.device().str()},
      {"threads", torch::get_num_threads()},
      {"parameters", trainer.parameter_count()},
      {"parameter_bytes", trainer.parameter_bytes()},
      {"classes", data.num_classes},
      {"train_images", data.train.size()},
      {"test_images", data.test.size()},
      {"data_fingerprint", fingerprint},
      {"memcnn", support::version()},
      {"libtorch", TORCH_VERSION}};
  write_file(path, run.dump(2) + "\n");
}

inline void write_results(
    const std::filesystem::path& path,
    const Config& config,
    const RunState& state,
    const Trainer& trainer,
    const Evaluation& evaluation,
    const nlohmann::ordered_json& comparison) {
  nlohmann::ordered_json results = {
      {"config", recipe(config)},
      {"device", trainer.device().str()},
      {"parameters", trainer.parameter_count()},
      {"parameter_bytes", trainer.parameter_bytes()},
      {"test_accuracy", evaluation.accuracy},
      {"test_top5", evaluation.top5},
      {"test_loss", evaluation.loss},
      {"step", measured(state)},
      {"rows", state.rows}};
  if (!comparison.is_null()) {
    results["comparison"] = comparison;
  }
  write_file(path, results.dump(2) + "\n");
}

} // namespace training
