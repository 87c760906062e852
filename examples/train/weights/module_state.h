// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/weights/match.h"
#include "train/weights/overwrite.h"
#include "train/weights/state_dict.h"

#include <memcnn/sequence.h>

#include <fmt/format.h>
#include <torch/nn/module.h>

#include <cstddef>
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace training {

namespace detail {

/// Parameters and buffers of a module, but not of its children.
inline void add_own(
    const torch::nn::Module& module,
    const std::string& prefix,
    StateDict& state) {
  for (const auto& item : module.named_parameters(/*recurse=*/false)) {
    state.insert(prefix + item.key(), item.value());
  }
  for (const auto& item : module.named_buffers(/*recurse=*/false)) {
    state.insert(prefix + item.key(), item.value());
  }
}

/// What Python has between the name of a block in a sequence and those of its
/// children: a ReversibleSequence is a Sequential of wrapped couplings there.
inline std::string wrapper_of(const torch::nn::Module& block) {
  const bool is_wrapped = block.named_children().contains("_fn") ||
      block.as<memcnn::ReversibleSequence>() != nullptr;
  return is_wrapped ? "." : "._fn.";
}

/// A child, and what stands before the names in it.
struct Child {
  std::string prefix;
  std::shared_ptr<torch::nn::Module> module;
};

/// The name of a block that is in a sequence again, where blocks have names:
/// the sequence has one of a block alone. Empty if there is none.
inline std::string named_again(const memcnn::ReversibleSequenceImpl& sequence) {
  const auto named = sequence.named_children(); // as they were first used
  std::string again;
  bool has_names = false;
  size_t child = 0;
  for (size_t index = 0; index < sequence.size(); ++index) {
    const auto block = sequence.ptr(index);
    if (child < named.size() && named[child].value() == block) {
      has_names |= named[child].key() != std::to_string(index);
      ++child;
      continue;
    }
    for (const auto& item : named) {
      again = item.value() == block ? item.key() : again;
    }
  }
  return has_names ? again : "";
}

/// Blocks of a sequence; one that is there twice is one child here, and two in
/// Python: the second by its index, unless names were given.
inline std::vector<Child> blocks_of(
    const memcnn::ReversibleSequenceImpl& sequence) {
  std::vector<Child> blocks;
  for (const auto& item : sequence.named_children()) {
    blocks.push_back({item.key() + wrapper_of(*item.value()), item.value()});
  }
  if (!named_again(sequence).empty()) {
    return blocks;
  }
  std::set<std::shared_ptr<torch::nn::Module>> seen;
  for (size_t index = 0; index < sequence.size(); ++index) {
    const auto block = sequence.ptr(index);
    if (!seen.insert(block).second) {
      blocks.push_back({std::to_string(index) + wrapper_of(*block), block});
    }
  }
  return blocks;
}

/// Refuses a module some of whose names in Python are not known.
inline void check_names_in_python(const torch::nn::Module& module) {
  const auto* const sequence = module.as<memcnn::ReversibleSequence>();
  const std::string again = sequence == nullptr ? "" : named_again(*sequence);
  if (!again.empty()) {
    throw support::Error(fmt::format(
        "save_state_dict(): expected each block of a sequence with names to be "
        "in it once, but got {} more than once, of which the first name alone "
        "is kept. Add the blocks without names, or give "
        "write_state_dict(path, state_of(module)).",
        quoted(again)));
  }
  for (const auto& child : module.children()) {
    check_names_in_python(*child);
  }
}

inline std::vector<Child> children_in_python(const torch::nn::Module& module) {
  if (const auto* sequence = module.as<memcnn::ReversibleSequence>()) {
    return blocks_of(*sequence);
  }
  std::vector<Child> children;
  const auto named = module.named_children();
  for (const auto& item : named) {
    children.push_back({item.key() + ".", item.value()});
  }
  // One module as both branches of a coupling, likewise.
  if (named.contains("Fm") && !named.contains("Gm")) {
    children.push_back({"Gm.", named["Fm"]});
  }
  return children;
}

inline void add_as_in_python(
    const torch::nn::Module& module,
    const std::string& prefix,
    StateDict& state) {
  add_own(module, prefix, state);
  for (const auto& child : children_in_python(module)) {
    add_as_in_python(*child.module, prefix + child.prefix, state);
  }
}

} // namespace detail

/// Parameters and buffers of a module, by the names that it has for them: the
/// tensors themselves, not copies.
inline StateDict state_of(const torch::nn::Module& module) {
  StateDict state(module.named_parameters());
  state.update(module.named_buffers());
  return state;
}

/// The same by the names of a Python model with the same children, in which
/// MemCNN's InvertibleModuleWrapper is around each block of a sequence.
inline StateDict python_state_of(const torch::nn::Module& module) {
  StateDict state;
  detail::add_as_in_python(module, /*prefix=*/"", state);
  return state;
}

namespace detail {

/// state_of(), with the names that Python alone has: the second ones of modules
/// that are used twice.
inline StateDict state_of_all_names(const torch::nn::Module& module) {
  StateDict state = state_of(module);
  std::set<std::string> known;
  for (const auto& name : state.keys()) {
    known.insert(bare(name));
  }
  for (const auto& item : python_state_of(module)) {
    const std::string name = bare(item.key());
    if (known.insert(name).second) {
      state.insert(name, item.value());
    }
  }
  return state;
}

} // namespace detail

/// Does what model.load_state_dict(torch.load(path)) does in Python. Blocks of
/// a sequence may be wrapped in the file or not, and tensors that the module
/// shares may be shared in it, equal, or there under one name.
///
/// Throws:   Error if the file cannot be read, or has not the very entries of
///           the module; the module is then as it was.
inline void load_state_dict(
    const std::filesystem::path& path,
    torch::nn::Module& module) {
  overwrite(detail::state_of_all_names(module), module.name(), path);
}

/// Writes what model.load_state_dict(torch.load(path)) reads in Python, where
/// blocks of a sequence are wrapped.
///
/// Throws:   Error if the file cannot be written, or if a block is used twice in a
///           sequence with names, which keeps the first of the two.
inline void save_state_dict(
    const std::filesystem::path& path,
    const torch::nn::Module& module) {
  detail::check_names_in_python(module);
  write_state_dict(path, python_state_of(module));
}

} // namespace training
