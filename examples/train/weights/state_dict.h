// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "support/printable.h"
#include "train/base/file_bytes.h"
#include "train/base/files.h"
#include "train/base/format_error.h"
#include "train/weights/other_formats.h"
#include "train/weights/saved_tensors.h"
#include "train/weights/zip_reader.h"

#include <ATen/core/Tensor.h>
#include <caffe2/serialize/inline_container.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <torch/ordered_dict.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <istream>
#include <sstream>
#include <string>
#include <vector>

namespace training {

/// Named tensors, as model.state_dict() returns them in Python.
using StateDict = torch::OrderedDict<std::string, at::Tensor>;

/// Throws:   FormatError if there is none of the name.
inline const at::Tensor& tensor_in(
    const StateDict& tensors,
    const std::string& name) {
  const at::Tensor* const found = tensors.find(name);
  if (found == nullptr) {
    throw FormatError(fmt::format("it lacks the tensor {}", name));
  }
  return *found;
}

/// What a tensor is like, for messages.
inline std::string described(const at::Tensor& tensor) {
  std::ostringstream sizes;
  sizes << tensor.sizes();
  return fmt::format(
      "sizes {} and dtype {}",
      support::printable(sizes.str()),
      detail::name_of(tensor.scalar_type()));
}

namespace detail {

/// Whether two tensors are one: the same part of the same memory.
inline bool are_one(const at::Tensor& tensor, const at::Tensor& other) {
  return tensor.is_alias_of(other) && tensor.dtype() == other.dtype() &&
      tensor.storage_offset() == other.storage_offset() &&
      tensor.sizes() == other.sizes() && tensor.strides() == other.strides() &&
      tensor.is_neg() == other.is_neg();
}

inline const pickle::Value* find(
    const pickle::Dict& dict,
    const std::string& key) {
  for (const auto& [name, value] : dict.items) {
    const auto* const text = name->as<std::string>();
    if (text != nullptr && *text == key) {
      return value;
    }
  }
  return nullptr;
}

/// The state dict of what was saved: itself, or an item of a checkpoint.
inline const pickle::Dict& state_dict_of(const pickle::Value& saved) {
  const auto* const dict = saved.as<pickle::Dict>();
  if (dict == nullptr) {
    throw FormatError("it holds no dict");
  }
  for (const char* key : {"state_dict", "model_state_dict", "model"}) {
    const auto* const inner = find(*dict, key);
    if (inner != nullptr && inner->as<pickle::Dict>() != nullptr) {
      return *inner->as<pickle::Dict>();
    }
  }
  return *dict;
}

inline StateDict tensors_of(const pickle::Dict& dict) {
  StateDict tensors;
  for (const auto& [key, value] : dict.items) {
    const auto* const name = key->as<std::string>();
    if (name == nullptr) {
      throw FormatError("it holds something without a name");
    }
    const auto* const tensor = value->as<at::Tensor>();
    if (tensor == nullptr || tensors.contains(*name)) {
      throw FormatError(fmt::format(
          "\"{}\" in it is {}",
          support::printable(*name),
          value->as<pickle::Dict>() != nullptr ? "a dict"
              : tensor == nullptr              ? "no tensor"
                                               : "there twice"));
    }
    tensors.insert(*name, *tensor);
  }
  return tensors;
}

/// The pickle of an archive. What it makes can take 250 times its own bytes: five
/// of them name a tensor of 64 dims once more.
inline std::string read_pickle(ZipReader& archive) {
  constexpr uint64_t kMostBytes = 4 << 20; // of some 20,000 tensors
  const std::string name = "data.pkl";
  if (archive.size(name) > kMostBytes) {
    throw FormatError(fmt::format(
        "its pickle has {} bytes, where a dict of tensors has at most {}",
        archive.size(name),
        kMostBytes));
  }
  return archive.text(name);
}

inline StateDict tensors_in(ZipReader& archive) {
  if (archive.has("byteorder") && archive.text("byteorder") != "little") {
    throw FormatError("it is of a big-endian machine");
  }
  const std::string bytes = read_pickle(archive);
  SavedTensors objects(archive);
  pickle::Unpickler unpickler(bytes, objects);
  return tensors_of(state_dict_of(unpickler.run()));
}

[[noreturn]] inline void stop_on_flaw(
    const std::filesystem::path& path,
    const std::string& flaw,
    const std::string& cure) {
  throw support::Error(fmt::format(
      "expected {} to be a state dict that torch.save() has written, but {}. {}",
      path.string(),
      flaw,
      cure));
}

} // namespace detail

/// Reads named tensors from what torch.save(), or archive_of(), has written.
/// Runs no code of the file. The tensors are on the CPU, with the file's dtypes.
///
/// Throws:   FormatError if the file is damaged, or holds anything else.
inline StateDict read_tensors(std::istream& file) {
  ZipReader archive(file);
  return detail::tensors_in(archive);
}

/// Reads what torch.save(model.state_dict(), file) writes in Python; a plain
/// dict of tensors, and a dict with one of the two as "state_dict",
/// "model_state_dict" or "model".
///
/// Throws:   Error if the file is missing, damaged, or holds anything else.
inline StateDict read_state_dict(const std::filesystem::path& path) {
  const FileContent start = read_file(AT_FDCWD, path.string(), kBytesOfFormat);
  if (!start.problem.empty()) {
    throw support::Error(fmt::format(
        "expected {} to be a file of weights, but reading it failed: {}. Give "
        "one that torch.save(model.state_dict(), file) has written.",
        path.string(),
        start.problem));
  }
  if (const auto other = other_format_of(start.bytes)) {
    detail::stop_on_flaw(path, other->clause, other->cure);
  }
  std::ifstream file(path, std::ios::binary);
  try {
    ZipReader archive(file);
    if (const auto other = other_format_of(archive)) {
      detail::stop_on_flaw(path, other->clause, other->cure);
    }
    return detail::tensors_in(archive);
  } catch (const FormatError& flaw) {
    detail::stop_on_flaw(path, flaw.what(), kWriteAnew);
  }
}

namespace detail {

/// For each entry, the first that has its tensor: a module that is used twice has
/// two names in Python, and is stored once.
inline std::vector<size_t> first_uses(const StateDict& state) {
  std::vector<size_t> firsts;
  for (size_t index = 0; index < state.size(); ++index) {
    size_t first = 0;
    while (!are_one(state[first].value(), state[index].value())) {
      ++first;
    }
    firsts.push_back(first);
  }
  return firsts;
}

} // namespace detail

/// The bytes of a file that read_tensors() reads, and Python's
/// torch.load(file, weights_only=True). Names of one tensor share what is stored.
inline std::string archive_of(const StateDict& state) {
  std::string file;
  caffe2::serialize::PyTorchStreamWriter archive(
      [&](const void* bytes, size_t count) {
        file.append(static_cast<const char*>(bytes), count);
        return count;
      });

  pickle::Pickler pickler;
  pickler.ordered_dict().mark();
  const std::vector<size_t> firsts = detail::first_uses(state);
  std::vector<at::Tensor> stored;
  for (size_t index = 0; index < state.size(); ++index) {
    const size_t key = firsts[index];
    stored.push_back(
        key < index
            ? at::Tensor()
            : state[key].value().detach().cpu().contiguous().resolve_neg());
    pickler.text(state[index].key());
    detail::push_tensor(pickler, stored[key], std::to_string(key));
  }
  const std::string bytes = pickler.set_items().finish();
  archive.writeRecord("data.pkl", bytes.data(), bytes.size());
  archive.writeRecord("byteorder", "little", 6);
  for (size_t key = 0; key < stored.size(); ++key) {
    if (stored[key].defined()) {
      archive.writeRecord(
          "data/" + std::to_string(key),
          stored[key].data_ptr(),
          stored[key].nbytes());
    }
  }
  archive.writeEndOfFile();
  return file;
}

/// Writes what model.load_state_dict(torch.load(file, weights_only=True)) reads
/// in Python. `flag` is what the user may change about the path.
///
/// Throws:   Error if the file cannot be written.
inline void write_state_dict(
    const std::filesystem::path& path,
    const StateDict& state,
    const std::string& flag = "path") {
  write_file(path, archive_of(state), flag);
}

} // namespace training
