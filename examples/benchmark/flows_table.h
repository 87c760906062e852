// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/flows_config.h"
#include "benchmark/flows_contest.h"
#include "benchmark/json_value.h"
#include "benchmark/rows.h"
#include "benchmark/step_measures.h"
#include "support/version.h"

#include <fmt/format.h>
#include <torch/version.h>

#include <nlohmann/json.hpp>

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <string>
#include <vector>

namespace benchmark {

namespace detail {

inline Row flow_titles(const FlowConfig& config) {
  Row titles = {"engine", "steps a level"};
  const auto add = [&](std::initializer_list<const char*> more) {
    titles.insert(titles.end(), more.begin(), more.end());
  };
  if (config.steps > 0) {
    add({"forward ms", "backward ms", "step ms", "to plain", "fused limit"});
  }
  add({"parameters MiB", "gradients MiB", "held MiB"});
  if (config.log_det) {
    add({"log-det bytes"});
  }
  add({"peak MiB", "gradient error"});
  return titles;
}

inline Row flow_row(const FlowConfig& config, const FlowMeasurement& result) {
  Row row = {result.engine.name(), std::to_string(result.depth)};
  if (config.steps > 0) {
    for (const auto part :
         {&StepTime::forward, &StepTime::backward, &StepTime::step}) {
      row.push_back(fixed(1e3 * median_of(result.times, part), 1));
    }
    row.push_back(fixed(result.ratio_to_plain, 3));
    row.push_back(result.engine.is_plain ? "-" : fixed(result.fused_limit, 3));
  }
  for (const int64_t bytes :
       {result.parameter_bytes, result.memory.left, result.memory.saved}) {
    row.push_back(fixed(mebibytes(bytes), 2));
  }
  if (config.log_det) {
    const auto& bytes = result.log_det_bytes;
    row.push_back(bytes ? std::to_string(*bytes) : "-");
  }
  row.push_back(fixed(mebibytes(result.memory.peak), 2));
  row.push_back(scientific(result.grad_rel_error));
  return row;
}

inline void print_flow_heading(const FlowConfig& config) {
  fmt::print(
      "Glow of {} levels, width {}, 1x1 {}; batch {}, 3 x {} x {}, float32, {}, "
      "{}, {} {}\n",
      config.levels,
      config.width,
      config.matrix,
      config.batch,
      config.size,
      config.size,
      config.memory_format,
      config.device,
      config.threads,
      config.threads == 1 ? "thread" : "threads");
  fmt::print("memcnn {}, LibTorch {}", support::version(), TORCH_VERSION);
  if (config.steps > 0) {
    fmt::print("; medians of {} steps, engines in turn", config.steps);
  }
  fmt::print("\n\n");
}

} // namespace detail

/// All depths and engines, as a table for people.
inline void print_flows(
    const FlowConfig& config,
    const std::vector<FlowMeasurement>& results) {
  detail::print_flow_heading(config);
  std::vector<detail::Row> rows = {detail::flow_titles(config)};
  for (const FlowMeasurement& result : results) {
    rows.push_back(detail::flow_row(config, result));
  }
  detail::print_rows(rows);
  fmt::print(
      "\n"
      "held, peak       tensors after forward and at most, beyond parameters and "
      "image;\n"
      "                 the gradients are in the peak\n"
      "gradient error   norm of the difference to plain by the norm of plain\n");
  if (config.steps > 0) {
    fmt::print(
        "to plain         the step by the plain one of the same round; median\n"
        "fused limit      (2 f + b) / (f + b), with plain's forward and backward "
        "times\n");
  }
}

/// What is known of one depth, an object an engine and line.
inline void print_flow_json(
    const FlowConfig& config,
    const std::vector<FlowMeasurement>& results) {
  for (const FlowMeasurement& result : results) {
    nlohmann::ordered_json json = {
        {"engine", result.engine.is_plain ? "plain" : "saving"},
        {"anchor_every", result.engine.anchor_every},
        {"version", support::version()},
        {"torch", TORCH_VERSION},
        {"depth", result.depth},
        {"levels", config.levels},
        {"width", config.width},
        {"matrix", config.matrix},
        {"memory_format", config.memory_format},
        {"batch", config.batch},
        {"size", config.size},
        {"device", config.device},
        {"threads", config.threads},
        {"parameter_bytes", result.parameter_bytes},
        {"image_bytes", result.image_bytes},
        {"saved_bytes", result.memory.saved},
        {"peak_bytes", result.memory.peak},
        {"left_bytes", result.memory.left}};
    if (result.log_det_bytes) {
      json["log_det_bytes"] = *result.log_det_bytes;
    }
    json["grad_rel_error"] = detail::json_if(result.grad_rel_error);
    if (!result.times.empty()) {
      json["step_s"] = median_of(result.times, &StepTime::step);
      json["forward_s"] = median_of(result.times, &StepTime::forward);
      json["backward_s"] = median_of(result.times, &StepTime::backward);
    }
    json["ratio_to_plain"] = detail::json_if(result.ratio_to_plain);
    fmt::print("{}\n", json.dump());
  }
  std::fflush(stdout); // before the next depth, which may take minutes
}

} // namespace benchmark
