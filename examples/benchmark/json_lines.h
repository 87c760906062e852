// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/config.h"
#include "benchmark/json_value.h"
#include "benchmark/measurement.h"
#include "benchmark/step_measures.h"
#include "support/version.h"

#include <fmt/format.h>
#include <torch/version.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdio>
#include <vector>

namespace benchmark {

namespace detail {

/// What the engine ran on.
inline nlohmann::ordered_json setting_of(
    const Config& config,
    const Measurement& result) {
  return {
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
      {"precision", config.precision},
      {"graph", config.graph},
      {"memory_format", config.memory_format},
      {"sequence_format", config.sequence_format},
      {"coupling", config.coupling},
      {"default_allocator", config.default_allocator}};
}

inline double shortest_step(const Measurement& result) {
  double shortest = result.times.front().step;
  for (const StepTime& time : result.times) {
    shortest = std::min(shortest, time.step);
  }
  return shortest;
}

} // namespace detail

/// What is known of one engine, for figures.py.
inline nlohmann::ordered_json to_json(
    const Config& config,
    const Measurement& result) {
  nlohmann::ordered_json json = detail::setting_of(config, result);
  if (!result.budget.empty()) {
    json["budget"] = result.budget;
  }
  if (result.failed()) {
    json["error"] = result.error;
    return json;
  }
  json["parameters"] = result.parameters;
  json["grad_norm_first"] = result.grad_norm_first;
  json["grad_rel_error"] = detail::json_if(result.grad_rel_error);
  json["grad_agrees"] = result.grad_agrees();
  json["bn_updates"] = result.bn_updates;
  json["step_s"] = median_of(result.times, &StepTime::step);
  if (!config.graph) {
    json["forward_s"] = median_of(result.times, &StepTime::forward);
    json["backward_s"] = median_of(result.times, &StepTime::backward);
  }
  json["enqueue_s"] = median_of(result.times, &StepTime::enqueue);
  json["step_min_s"] = detail::shortest_step(result);
  json["ratio_to_plain"] = detail::json_if(result.ratio_to_plain);
  if (!config.graph) {
    json["fused_limit"] = detail::json_if(result.fused_limit);
  }
  json["saved_bytes"] = result.memory.saved;
  json["peak_bytes"] = result.memory.peak;
  json["left_bytes"] = result.memory.left;
  if (result.graph_bytes) {
    json["graph_bytes"] = *result.graph_bytes;
  }
  if (result.budget_bytes) {
    json["budget_bytes"] = *result.budget_bytes;
  }
  if (result.kept) {
    json["kept_bytes"] = result.kept->bytes;
    json["kept_blocks"] = result.kept->blocks;
    json["kept_results"] = result.kept->results;
    json["multiply_adds"] = result.kept->multiply_adds;
    json["spared_multiply_adds"] = result.kept->spared;
  }
  return json;
}

inline void print_json(
    const Config& config,
    const std::vector<Measurement>& results) {
  for (const Measurement& result : results) {
    fmt::print("{}\n", to_json(config, result).dump());
  }
  std::fflush(stdout);
}

} // namespace benchmark
