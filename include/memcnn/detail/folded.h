// SPDX-License-Identifier: MIT
#pragma once

#include <torch/nn/module.h>

#include <cstddef>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

namespace memcnn::detail {

/// A module's child, printed: "0" and "torch::nn::ReLU()".
struct PrintedChild {
  std::string name;
  std::string text;
};

inline void print_folded(
    std::ostream& stream,
    const torch::nn::Module& module,
    const std::string& indentation);

inline std::vector<PrintedChild> printed_children(
    const torch::nn::Module& module,
    const std::string& indentation) {
  std::vector<PrintedChild> printed;
  for (const auto& child : module.named_children()) {
    std::ostringstream text;
    print_folded(text, *child.value(), indentation);
    printed.push_back({child.key(), text.str()});
  }
  return printed;
}

/// Whether children that print alike are a run of one kind: numbered by their
/// container, as those are that nobody has named.
inline bool are_numbered(
    const std::vector<PrintedChild>& children,
    size_t first,
    size_t last) {
  for (size_t i = first; i <= last; ++i) {
    if (children[i].name != std::to_string(i)) {
      return false;
    }
  }
  return true;
}

/// Prints a module as LibTorch's operator<< does, but a run of children that
/// print alike once, with their count.
inline void print_folded(
    std::ostream& stream,
    const torch::nn::Module& module,
    const std::string& indentation) {
  module.pretty_print(stream);
  const std::string inner = indentation + "  ";
  const std::vector<PrintedChild> children = printed_children(module, inner);
  if (children.empty()) {
    return;
  }
  stream << "(\n";
  for (size_t first = 0, last = 0; first < children.size(); first = ++last) {
    while (last + 1 < children.size() &&
           children[last + 1].text == children[first].text &&
           are_numbered(children, first, last + 1)) {
      ++last;
    }
    stream << inner << "(" << children[first].name;
    if (last > first) {
      stream << "-" << children[last].name << "): " << last - first + 1
             << " x ";
    } else {
      stream << "): ";
    }
    stream << children[first].text << "\n";
  }
  stream << indentation << ")";
}

} // namespace memcnn::detail
