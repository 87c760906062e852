// SPDX-License-Identifier: MIT
#pragma once

// Which entry of a file is which of a network: names in Python and C++ differ
// where one side has wrapped a module that the other has not.

#include "support/nearest.h"
#include "train/weights/state_dict.h"

#include <ATen/core/Tensor.h>
#include <c10/core/TensorImpl.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace training {

namespace detail {

/// A name without the parts that Python's wrappers add: "_fn" is MemCNN's
/// InvertibleModuleWrapper, "module" DataParallel, "_orig_mod" torch.compile().
inline std::string bare(const std::string& name) {
  std::istringstream parts(name);
  std::string result;
  for (std::string part; std::getline(parts, part, '.');) {
    if (part != "_fn" && part != "module" && part != "_orig_mod") {
      result += (result.empty() ? "" : ".") + part;
    }
  }
  return result;
}

/// Files of torch 0.4.0 and before lack these counters, which nothing but a
/// cumulative average depends on.
inline bool may_be_missing(const std::string& name) {
  constexpr std::string_view kEnding = ".num_batches_tracked";
  return name.size() > kEnding.size() &&
      name.substr(name.size() - kEnding.size()) == kEnding;
}

/// "weight" of "conv.weight".
inline std::string last_part(const std::string& name) {
  return name.substr(name.rfind('.') + 1);
}

/// Whether an entry is another name of one of those: where a module is used
/// twice, Python has its tensors under the names of both places.
inline bool is_another_name(
    const std::string& name,
    const at::Tensor& tensor,
    const StateDict& others) {
  return std::any_of(others.begin(), others.end(), [&](const auto& other) {
    return last_part(other.key()) == last_part(name) &&
        are_one(tensor, other.value());
  });
}

/// A network's names by their bare ones; empty where two have one.
inline std::unordered_map<std::string, std::string> by_bare_name(
    const StateDict& network) {
  std::unordered_map<std::string, std::string> names;
  for (const auto& name : network.keys()) {
    const auto [place, is_new] = names.emplace(bare(name), name);
    if (!is_new) {
      place->second.clear(); // the whole name says which is meant
    }
  }
  return names;
}

} // namespace detail

/// The entries of a file that are a network's, under the names that it has for
/// them, and what one has that the other has not. A tensor that the network has
/// under several names may be in the file under any of them.
struct Match {
  StateDict found;
  std::vector<std::string> missing;
  std::vector<std::string> unknown;
};

/// Goes by whole names, then by those without the parts of Python's wrappers.
inline Match match(const StateDict& network, const StateDict& file) {
  auto wrapped = detail::by_bare_name(network);
  Match result;
  std::vector<std::string> others;
  for (const auto& item : file) {
    const auto& name = item.key();
    const std::string meant =
        network.contains(name) ? name : wrapped[detail::bare(name)];
    const bool is_another = meant.empty() || result.found.contains(meant) ||
        (meant != name && file.contains(meant));
    if (is_another) {
      others.push_back(name);
    } else {
      result.found.insert(meant, item.value());
    }
  }
  for (const auto& name : others) {
    if (!detail::is_another_name(name, file[name], result.found)) {
      result.unknown.push_back(name);
    }
  }
  std::unordered_set<const c10::TensorImpl*> named;
  for (const auto& name : result.found.keys()) {
    named.insert(network[name].unsafeGetTensorImpl());
  }
  for (const auto& item : network) {
    const bool is_new = named.insert(item.value().unsafeGetTensorImpl()).second;
    if (is_new && !detail::may_be_missing(item.key())) {
      result.missing.push_back(item.key());
    }
  }
  return result;
}

/// What stands before all names of a file, such as "model.", and makes other
/// names of a network's; empty if it is nothing.
inline std::string prefix_of(const StateDict& network, const StateDict& file) {
  if (file.is_empty()) {
    return "";
  }
  const auto names = file.keys();
  const std::string prefix =
      names.front().substr(0, names.front().find('.') + 1);
  const auto meant = detail::by_bare_name(network);
  bool any_is_meant = false;
  for (const auto& name : names) {
    if (prefix.empty() || name.compare(0, prefix.size(), prefix) != 0) {
      return "";
    }
    any_is_meant |= meant.count(detail::bare(name.substr(prefix.size()))) != 0;
  }
  return any_is_meant ? prefix : "";
}

/// The one of a network's names that an unknown one was most likely meant to
/// be; empty where none is near.
inline std::string nearest_name(
    const std::string& unknown,
    const std::vector<std::string>& names) {
  constexpr size_t kMostBytes = 256; // a file may have a name of any length
  std::vector<std::string> bare_names;
  for (const auto& name : names) {
    bare_names.push_back(detail::bare(name));
  }
  const auto nearest =
      support::nearest(detail::bare(unknown.substr(0, kMostBytes)), bare_names);
  const auto place = std::find(bare_names.begin(), bare_names.end(), nearest);
  return place == bare_names.end() ? "" : names[place - bare_names.begin()];
}

} // namespace training
