// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "support/printable.h"
#include "train/weights/match.h"
#include "train/weights/state_dict.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <filesystem>
#include <string>
#include <vector>

namespace training {

namespace detail {

inline std::string quoted(const std::string& name) {
  return "\"" + support::printable(name) + "\"";
}

inline std::string and_more(const std::vector<std::string>& names) {
  return names.size() == 1 ? "" : fmt::format(" and {} more", names.size() - 1);
}

/// "layer1.weight", and how many more there are like it.
inline std::string first_of(const std::vector<std::string>& names) {
  return quoted(names.front()) + and_more(names);
}

/// The same of names that the network does not have, but may have another for.
inline std::string first_unknown(
    const std::vector<std::string>& unknown,
    const std::vector<std::string>& names) {
  const std::string meant = nearest_name(unknown.front(), names);
  return quoted(unknown.front()) +
      (meant.empty() ? "" : " (did you mean " + quoted(meant) + "?)") +
      and_more(unknown);
}

/// Refuses entries that are not those of the network.
inline void check_names(
    const StateDict& network,
    const std::string& model,
    const Match& match,
    const std::filesystem::path& path) {
  if (!match.missing.empty()) {
    throw support::Error(fmt::format(
        "expected {} to have all weights of {}, but it lacks {}{}. Give the "
        "file of a {}.",
        path.string(),
        model,
        first_of(match.missing),
        match.unknown.empty()
            ? ""
            : ", and has " + first_unknown(match.unknown, match.missing),
        model));
  }
  if (!match.unknown.empty()) {
    throw support::Error(fmt::format(
        "expected {} to have the weights of {} alone, but it has {}, too. Give "
        "the file of a {}.",
        path.string(),
        model,
        first_unknown(match.unknown, network.keys()),
        model));
  }
}

/// Refuses entries that the network has in other sizes.
inline void check_sizes(
    const StateDict& network,
    const std::string& model,
    const Match& match,
    const std::filesystem::path& path) {
  for (const auto& item : match.found) {
    const at::Tensor& wanted = network[item.key()];
    const at::Tensor& tensor = item.value();
    if (tensor.sizes() != wanted.sizes() ||
        tensor.is_floating_point() != wanted.is_floating_point()) {
      throw support::Error(fmt::format(
          "expected {} in {} to have {}, but got {}. Give the file of a {} of "
          "the same sizes.",
          quoted(item.key()),
          path.string(),
          described(wanted),
          described(tensor),
          model));
    }
  }
}

} // namespace detail

/// Overwrites tensors of a network with those that a file has under the same
/// names, or under names with other parts of Python's wrappers. Floating-point
/// values are rounded to the network's dtype.
///
/// Throws:   Error if the file cannot be read, or has not the very entries of
///           the network, which is then as it was. `model` is what to call it.
inline void overwrite(
    const StateDict& network,
    const std::string& model,
    const std::filesystem::path& path) {
  const Match match = training::match(network, read_state_dict(path));
  detail::check_names(network, model, match, path);
  detail::check_sizes(network, model, match, path);
  const at::NoGradGuard no_grad;
  for (const auto& item : network) {
    at::Tensor target = item.value();
    if (match.found.contains(item.key())) {
      target.copy_(match.found[item.key()]);
    } else {
      target.zero_();
    }
  }
}

} // namespace training
