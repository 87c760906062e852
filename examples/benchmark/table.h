// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/config.h"
#include "benchmark/measurement.h"
#include "benchmark/rows.h"
#include "benchmark/step_measures.h"
#include "support/version.h"

#include <fmt/format.h>
#include <torch/version.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace benchmark {

namespace detail {

struct Column {
  std::string title;
  std::function<std::string(const Measurement&)> cell;
};

/// A column of medians.
template <class Pick>
Column milliseconds(const std::string& title, Pick pick) {
  return {title, [pick](const Measurement& result) {
            return fixed(1e3 * median_of(result.times, pick), 1);
          }};
}

/// A column of tensor memory.
inline Column memory(const std::string& title, int64_t StepMemory::*bytes) {
  return {title, [bytes](const Measurement& result) {
            return fixed(mebibytes(result.memory.*bytes), 2);
          }};
}

/// Of the time that a step takes.
inline std::vector<Column> columns_of_time(const Config& config) {
  const auto ratio = [](const Measurement& result) {
    return fixed(result.ratio_to_plain, 3);
  };
  const auto limit = [](const Measurement& result) {
    return result.engine == "plain" ? "-" : fixed(result.fused_limit, 3);
  };
  std::vector<Column> columns;
  if (!config.graph) {
    columns = {
        milliseconds("forward ms", &StepTime::forward),
        milliseconds("backward ms", &StepTime::backward)};
  }
  columns.push_back(milliseconds("step ms", &StepTime::step));
  if (config.device == "cuda") {
    columns.push_back(milliseconds("enqueue ms", &StepTime::enqueue));
  }
  columns.push_back({"to plain", ratio});
  if (!config.graph) {
    columns.push_back({"fused limit", limit});
  }
  return columns;
}

inline std::vector<Column> columns_for(const Config& config) {
  const auto graph = [](const Measurement& result) {
    return fixed(mebibytes(*result.graph_bytes), 2);
  };
  const auto error = [](const Measurement& result) {
    return scientific(result.grad_rel_error);
  };
  std::vector<Column> columns = columns_of_time(config);
  columns.insert(columns.begin(), {"engine", &Measurement::name});
  columns.push_back(memory("held MiB", &StepMemory::saved));
  columns.push_back(memory("peak MiB", &StepMemory::peak));
  if (config.graph) {
    columns.push_back({"graph MiB", graph});
  }
  columns.push_back({"gradient error", error});
  return columns;
}

inline std::vector<Row> rows_of(
    const std::vector<Column>& columns,
    const std::vector<Measurement>& results) {
  std::vector<Row> rows(1);
  for (const Column& column : columns) {
    rows[0].push_back(column.title);
  }
  for (const Measurement& result : results) {
    Row& row = rows.emplace_back();
    if (result.failed()) {
      const auto& error = result.error;
      row = {result.name(), "error: " + error.substr(0, error.find('\n'))};
      continue;
    }
    for (const Column& column : columns) {
      row.push_back(column.cell(result));
    }
  }
  return rows;
}

inline void print_heading(const Config& config) {
  fmt::print(
      "{} {} couplings of 2 x {} channels, batch {}, {} x {}, {}{}, {}, {}, {} "
      "{}\n",
      config.depth,
      config.coupling,
      config.channels,
      config.batch,
      config.size,
      config.size,
      config.dtype,
      config.precision == "ieee" ? "" : " in " + config.precision,
      config.memory_format,
      config.device,
      config.threads,
      config.threads == 1 ? "thread" : "threads");
  fmt::print(
      "memcnn {}, LibTorch {}; medians of {} {}, engines in turn\n\n",
      support::version(),
      TORCH_VERSION,
      config.steps,
      config.graph ? "replays of a graph" : "steps");
}

inline void print_legend(const Config& config) {
  fmt::print(
      "\n"
      "to plain         the step by the plain one of the same round; median\n");
  if (!config.graph) {
    fmt::print(
        "fused limit      (2 f + b) / (f + b), with plain's forward and "
        "backward times:\n"
        "                 the least that running every block again to its end "
        "can take\n");
  }
  fmt::print(
      "held, peak       tensors after forward and at most, beyond those before "
      "it{}\n"
      "gradient error   norm of the difference to plain by the norm of "
      "plain{}\n",
      config.graph ? ";\n                 of a step before the capture" : "",
      config.graph ? ";\n                 of a replay to plain without a graph"
                   : "");
  if (config.graph) {
    fmt::print(
        "graph            memory that replays have for themselves, free space "
        "included;\n"
        "                 a replay is not parted into forward and backward\n");
  }
  if (config.device == "cuda") {
    fmt::print(
        "enqueue          the program's share: close to the step, the GPU "
        "waits for it\n");
  }
}

inline void print_kept(const Measurement& result) {
  const int64_t budget = *result.budget_bytes;
  const bool all = budget == std::numeric_limits<int64_t>::max();
  std::ostringstream kept;
  kept << *result.kept;
  fmt::print(
      "{}: budget {}, kept {}\n",
      result.name(),
      all ? "of any size" : fmt::format("{:.2f} MiB", mebibytes(budget)),
      kept.str());
}

} // namespace detail

/// The engines that were asked for, as a table for people.
inline void print_table(
    const Config& config,
    const std::vector<Measurement>& results) {
  detail::print_heading(config);
  detail::print_rows(detail::rows_of(detail::columns_for(config), results));
  detail::print_legend(config);
  for (const Measurement& result : results) {
    if (result.budget_bytes && result.kept) {
      detail::print_kept(result);
    }
  }
  std::fflush(stdout);
}

} // namespace benchmark
