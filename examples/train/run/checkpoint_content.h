// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/format_error.h"
#include "train/run/log.h"
#include "train/run/run_state.h"
#include "train/step/memory_use.h"
#include "train/step/step_result.h"
#include "train/weights/state_dict.h"

#include <torch/types.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>
#include <utility>

namespace training {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Hits, first, top5)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(MemoryUse, held_after_forward, peak)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(LogMark, bytes, checksum)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(
    StepSums,
    steps,
    loss,
    hits,
    milliseconds,
    data_milliseconds,
    memory)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(
    RunState,
    iteration,
    iterations,
    earlier_iterations,
    since_row,
    step_milliseconds,
    memory,
    log)

namespace detail {

/// Nothing but bytes one after the other is a text.
inline std::string text_of(const torch::Tensor& bytes) {
  if (bytes.dtype() != torch::kUInt8 || bytes.dim() != 1 ||
      !bytes.is_contiguous()) {
    throw FormatError("its description is no text");
  }
  const auto* const first = bytes.const_data_ptr<uint8_t>();
  return std::string(first, first + bytes.numel());
}

inline torch::Tensor bytes_of(const std::string& text) {
  const auto size = static_cast<int64_t>(text.size());
  const auto bytes = torch::empty({size}, torch::kUInt8);
  std::copy(text.begin(), text.end(), bytes.data_ptr<uint8_t>());
  return bytes;
}

/// JSON, but not of a depth that would overflow the stack of who writes it.
inline nlohmann::json parse_description(const std::string& text) {
  constexpr int kMostDepth = 8;
  return nlohmann::json::parse(
      text, [](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
        if (depth > kMostDepth) {
          throw FormatError("its description is corrupt");
        }
        return true;
      });
}

} // namespace detail

/// What a checkpoint holds.
struct Checkpoint {
  nlohmann::json recipe;
  uint32_t images = 0; // their fingerprint
  RunState state;
  StateDict tensors; // of the trainer
};

inline std::string checkpoint_bytes(const Checkpoint& checkpoint) {
  const nlohmann::json about = {
      {"recipe", checkpoint.recipe},
      {"images", checkpoint.images},
      {"processes", checkpoint.state.processes},
      {"state", checkpoint.state}};
  StateDict tensors = checkpoint.tensors;
  tensors.insert("about", detail::bytes_of(about.dump()));
  return archive_of(tensors);
}

/// What checkpoint_bytes() was given. Whether it fits the run, and its tensors
/// the trainer, is for others to say.
///
/// Throws:   FormatError if it is anything else.
inline Checkpoint parse_checkpoint(std::string bytes) {
  std::istringstream file(std::move(bytes));
  Checkpoint checkpoint;
  checkpoint.tensors = read_tensors(file);
  try {
    const auto about = detail::parse_description(
        detail::text_of(tensor_in(checkpoint.tensors, "about")));
    checkpoint.recipe = about.at("recipe");
    checkpoint.images = about.at("images");
    about.at("state").get_to(checkpoint.state);
    // Not said by versions that know of one only.
    checkpoint.state.processes = about.value("processes", int64_t{1});
  } catch (const nlohmann::json::exception&) {
    throw FormatError("its description is corrupt");
  }
  const RunState& state = checkpoint.state;
  const auto steps = static_cast<int64_t>(state.step_milliseconds.size());
  if (state.iteration != steps || state.since_row.steps < 0 ||
      state.since_row.steps > steps) {
    throw FormatError("it counts other steps than it has measured");
  }
  return checkpoint;
}

} // namespace training
