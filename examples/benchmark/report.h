// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/config.h"
#include "benchmark/measurement.h"
#include "support/version.h"

#include <torch/version.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace benchmark {

namespace detail {

/// Text in printf's manner.
template <class... Args>
std::string format(const char* pattern, Args... args) {
  const int size = std::snprintf(nullptr, 0, pattern, args...);
  std::string text(static_cast<size_t>(size), '\0');
  std::snprintf(text.data(), text.size() + 1, pattern, args...);
  return text;
}

inline std::string format_if(const char* pattern, std::optional<double> value) {
  return value ? format(pattern, *value) : "-";
}

inline double mebibytes(int64_t bytes) {
  return static_cast<double>(bytes) / (1024.0 * 1024.0);
}

inline std::string first_line(const std::string& text) {
  return text.substr(0, text.find('\n'));
}

inline nlohmann::ordered_json json_if(std::optional<double> value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json();
}

/// Cells to the right, the first column to the left; rows of one cell more are
/// a name and a text.
inline void print_columns(const std::vector<std::vector<std::string>>& rows) {
  const size_t columns = rows.front().size();
  std::vector<size_t> widths(columns, 0);
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size() && (i == 0 || row.size() == columns);
         ++i) {
      widths[i] = std::max(widths[i], row[i].size());
    }
  }
  for (const auto& row : rows) {
    std::printf("%-*s", static_cast<int>(widths[0]), row[0].c_str());
    for (size_t i = 1; i < row.size(); ++i) {
      const int width = row.size() == columns ? static_cast<int>(widths[i]) : 0;
      std::printf("  %*s", width, row[i].c_str());
    }
    std::printf("\n");
  }
}

} // namespace detail

/// The engines that were asked for, as a table for people.
inline void print_table(
    const Config& config,
    const std::vector<Measurement>& results) {
  using detail::format;
  using detail::mebibytes;
  const bool cuda = config.device == "cuda";
  std::printf(
      "%lld %s couplings of 2 x %lld channels, batch %lld, %lld x %lld, %s, "
      "%s, %s, %lld %s\n",
      static_cast<long long>(config.depth),
      config.coupling.c_str(),
      static_cast<long long>(config.channels),
      static_cast<long long>(config.batch),
      static_cast<long long>(config.size),
      static_cast<long long>(config.size),
      config.dtype.c_str(),
      config.memory_format.c_str(),
      config.device.c_str(),
      static_cast<long long>(config.threads),
      config.threads == 1 ? "thread" : "threads");
  std::printf(
      "memcnn %s, LibTorch %s; medians of %lld steps, engines in turn\n\n",
      support::version().c_str(),
      TORCH_VERSION,
      static_cast<long long>(config.steps));

  std::vector<std::vector<std::string>> rows = {
      {"engine",
       "forward ms",
       "backward ms",
       "step ms",
       "to plain",
       "fused limit",
       "held MiB",
       "peak MiB",
       "gradient error"}};
  if (cuda) {
    rows[0].insert(rows[0].begin() + 4, "enqueue ms");
  }
  for (const Measurement& result : results) {
    if (result.failed()) {
      rows.push_back(
          {result.engine, "error: " + detail::first_line(result.error)});
      continue;
    }
    rows.push_back(
        {result.engine,
         format("%.1f", 1e3 * median_of(result.times, forward_of)),
         format("%.1f", 1e3 * median_of(result.times, backward_of)),
         format("%.1f", 1e3 * median_of(result.times, step_of)),
         detail::format_if("%.3f", result.ratio_to_plain),
         result.engine == "plain"
             ? "-"
             : detail::format_if("%.3f", result.fused_limit),
         format("%.2f", mebibytes(result.memory.saved)),
         format("%.2f", mebibytes(result.memory.peak)),
         detail::format_if("%.1e", result.grad_rel_error)});
    if (cuda) {
      rows.back().insert(
          rows.back().begin() + 4,
          format("%.1f", 1e3 * median_of(result.times, enqueue_of)));
    }
  }
  detail::print_columns(rows);

  std::printf(
      "\n"
      "to plain         the step by the plain one of the same round; median\n"
      "fused limit      (2 f + b) / (f + b), with plain's forward and backward "
      "times:\n"
      "                 the least that running every block again can take\n"
      "held, peak       tensors after forward and at most, beyond those before "
      "it\n"
      "gradient error   norm of the difference to plain by the norm of "
      "plain\n");
  if (cuda) {
    std::printf(
        "enqueue          the program's share: close to the step, the GPU "
        "waits for it\n");
  }
  for (const Measurement& result : results) {
    if (result.kept_blocks) {
      const bool all =
          *result.budget_bytes == std::numeric_limits<int64_t>::max();
      std::printf(
          "%-15s  budget %s: %zu of %lld blocks kept\n",
          result.engine.c_str(),
          all ? "of any size"
              : format("%.2f MiB", mebibytes(*result.budget_bytes)).c_str(),
          *result.kept_blocks,
          static_cast<long long>(config.depth));
    }
  }
  std::fflush(stdout);
}

/// One line for machines.
inline nlohmann::ordered_json to_json(
    const Config& config,
    const Measurement& result) {
  nlohmann::ordered_json json = {
      {"engine", result.engine},
      {"version",
       result.engine == "plain" ? TORCH_VERSION : support::version()},
      {"torch", TORCH_VERSION},
      {"depth", config.depth},
      {"channels", config.channels},
      {"batch", config.batch},
      {"size", config.size},
      {"device", config.device},
      {"threads", config.threads},
      {"dtype", config.dtype},
      {"memory_format", config.memory_format},
      {"sequence_format", config.sequence_format},
      {"coupling", config.coupling},
      {"default_allocator", config.default_allocator}};
  if (result.failed()) {
    json["error"] = result.error;
    return json;
  }
  json["parameters"] = result.parameters;
  json["grad_norm_first"] = result.grad_norm_first;
  json["grad_rel_error"] = detail::json_if(result.grad_rel_error);
  json["grad_agrees"] = result.grad_agrees();
  json["bn_updates"] = result.bn_updates;
  json["step_s"] = median_of(result.times, step_of);
  json["forward_s"] = median_of(result.times, forward_of);
  json["backward_s"] = median_of(result.times, backward_of);
  json["enqueue_s"] = median_of(result.times, enqueue_of);
  json["step_min_s"] = std::min_element(
                           result.times.begin(),
                           result.times.end(),
                           [](const StepTime& a, const StepTime& b) {
                             return a.step() < b.step();
                           })
                           ->step();
  json["ratio_to_plain"] = detail::json_if(result.ratio_to_plain);
  json["fused_limit"] = detail::json_if(result.fused_limit);
  json["saved_bytes"] = result.memory.saved;
  json["peak_bytes"] = result.memory.peak;
  json["left_bytes"] = result.memory.left;
  if (result.budget_bytes) {
    json["budget_bytes"] = *result.budget_bytes;
    json["kept_blocks"] = *result.kept_blocks;
  }
  return json;
}

inline void print_json(
    const Config& config,
    const std::vector<Measurement>& results) {
  for (const Measurement& result : results) {
    std::printf("%s\n", to_json(config, result).dump().c_str());
  }
  std::fflush(stdout);
}

} // namespace benchmark
