// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "support/printable.h"
#include "train/weights/match.h"
#include "train/weights/state_dict.h"

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/ScalarType.h>
#include <c10/core/TensorImpl.h>
#include <fmt/format.h>

#include <filesystem>
#include <string>
#include <unordered_map>
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

/// Refuses a file all of whose names have a part before those of the network.
inline void check_prefix(
    const std::string& prefix,
    const std::string& model,
    const std::filesystem::path& path) {
  if (!prefix.empty()) {
    throw support::Error(fmt::format(
        "expected {} to have all weights of {}, but all its names begin with "
        "{}, which those of {} do not. Write it anew with "
        "name.removeprefix({}) for each name.",
        path.string(),
        model,
        quoted(prefix),
        model,
        quoted(prefix)));
  }
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

/// Whether the network's tensor can take the values: rounded from one
/// floating-point dtype to another, else as they are. Integers are not weights,
/// but to(dtype) of a module makes its counters floating-point as well.
inline bool fits(const at::Tensor& tensor, const at::Tensor& wanted) {
  if (tensor.is_floating_point() && wanted.is_floating_point()) {
    return true;
  }
  const auto converted = tensor.to(wanted.scalar_type());
  return !wanted.requires_grad() &&
      at::equal(converted.to(tensor.scalar_type()), tensor);
}

/// Refuses entries of other sizes, or of values that the dtype cannot take.
inline void check_tensors(
    const StateDict& network,
    const std::string& model,
    const Match& match,
    const std::filesystem::path& path) {
  for (const auto& item : match.found) {
    const at::Tensor& wanted = network[item.key()];
    const at::Tensor& tensor = item.value();
    if (tensor.sizes() != wanted.sizes()) {
      throw support::Error(fmt::format(
          "expected {} in {} to have {}, but got {}. Give the file of a {} of "
          "the same sizes.",
          quoted(item.key()),
          path.string(),
          described(wanted),
          described(tensor),
          model));
    }
    if (!fits(tensor, wanted)) {
      throw support::Error(fmt::format(
          "expected {} in {} to have dtype {}, or to be a buffer of values that "
          "it holds exactly, but got {}. Give the file of a {} of the same "
          "dtypes.",
          quoted(item.key()),
          path.string(),
          name_of(wanted.scalar_type()),
          name_of(tensor.scalar_type()),
          model));
    }
  }
}

inline bool have_equal_values(const at::Tensor& one, const at::Tensor& other) {
  return one.dtype() == other.dtype() &&
      at::allclose(one, other, /*rtol=*/0, /*atol=*/0, /*equal_nan=*/true);
}

/// Refuses other values for each name of a tensor that has several.
inline void check_shared(
    const StateDict& network,
    const std::string& model,
    const Match& match,
    const std::filesystem::path& path) {
  std::unordered_map<const c10::TensorImpl*, std::string> firsts;
  for (const auto& item : match.found) {
    const auto* const tensor = network[item.key()].unsafeGetTensorImpl();
    const std::string first = firsts.emplace(tensor, item.key()).first->second;
    if (first != item.key() &&
        !have_equal_values(item.value(), match.found[first])) {
      throw support::Error(fmt::format(
          "expected {} in {} to have the values of {}, with which it is one "
          "tensor in {}, but got others. Give the file of a {} that shares "
          "them, too.",
          quoted(item.key()),
          path.string(),
          quoted(first),
          model,
          model));
    }
  }
}

} // namespace detail

/// Overwrites tensors of a network with those that a file has under the same
/// names, or under names with other parts of Python's wrappers. Floating-point
/// values are rounded to the network's dtype; others have to fit.
///
/// Throws:   Error if the file cannot be read, or has not the very entries of
///           the network, which is then as it was. `model` is what to call it.
inline void overwrite(
    const StateDict& network,
    const std::string& model,
    const std::filesystem::path& path) {
  const StateDict file = read_state_dict(path);
  const Match match = training::match(network, file);
  if (match.found.is_empty()) {
    detail::check_prefix(prefix_of(network, file), model, path);
  }
  detail::check_names(network, model, match, path);
  detail::check_tensors(network, model, match, path);
  detail::check_shared(network, model, match, path);
  const at::NoGradGuard no_grad;
  for (const auto& item : network) {
    if (!match.found.contains(item.key())) {
      at::Tensor(item.value()).zero_(); // if it has no other name
    }
  }
  for (const auto& item : match.found) {
    at::Tensor(network[item.key()]).copy_(item.value());
  }
}

} // namespace training
