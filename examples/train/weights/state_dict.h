// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/files.h"
#include "train/weights/saved_tensors.h"

#include <ATen/core/Tensor.h>
#include <caffe2/serialize/inline_container.h>
#include <fmt/format.h>
#include <torch/ordered_dict.h>

#include <exception>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>
#include <vector>

namespace training {

/// Named tensors, as model.state_dict() returns them in Python.
using StateDict = torch::OrderedDict<std::string, at::Tensor>;

namespace detail {

[[noreturn]] inline void stop_on_unreadable(const std::string& path) {
  throw support::Error(fmt::format(
      "expected {} to be a whole file of torch.save(), but it cannot be read: "
      "it is truncated, corrupt, or something else. Write it anew with "
      "torch.save(model.state_dict(), file).",
      path));
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
inline const pickle::Dict& state_dict_of(
    const pickle::Value& saved,
    const std::string& path) {
  const auto* const dict = saved.as<pickle::Dict>();
  if (dict == nullptr) {
    throw support::Error(fmt::format(
        "expected {} to hold a dict of tensors, but it holds something else. "
        "Write it with torch.save(model.state_dict(), file).",
        path));
  }
  for (const char* key : {"state_dict", "model"}) {
    const auto* const inner = find(*dict, key);
    if (inner != nullptr && inner->as<pickle::Dict>() != nullptr) {
      return *inner->as<pickle::Dict>();
    }
  }
  return *dict;
}

inline StateDict tensors_of(const pickle::Dict& dict, const std::string& path) {
  StateDict tensors;
  for (const auto& [key, value] : dict.items) {
    const auto* const name = key->as<std::string>();
    const auto* const tensor = value->as<at::Tensor>();
    if (name == nullptr || tensor == nullptr) {
      throw support::Error(fmt::format(
          "expected every entry of {} to be a named tensor, but {}. Write it "
          "with torch.save(model.state_dict(), file).",
          path,
          name == nullptr ? "one has no name" : "\"" + *name + "\" is none"));
    }
    if (tensors.contains(*name)) {
      stop_on_unreadable(path);
    }
    tensors.insert(*name, *tensor);
  }
  return tensors;
}

/// torch.save() wrote pickles one after the other before torch 1.6.
inline bool has_old_format(const std::string& path) {
  const std::string magic =
      "\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
  std::string start(magic.size(), '\0');
  std::ifstream(path, std::ios::binary)
      .read(start.data(), static_cast<std::streamsize>(start.size()));
  return start == magic;
}

inline StateDict read_archive(const std::string& path) {
  caffe2::serialize::PyTorchStreamReader archive(path);
  const auto text = [&](const char* record) {
    std::string bytes(archive.getRecordSize(record), '\0');
    archive.getRecord(record, bytes.data(), bytes.size());
    return bytes;
  };
  if (archive.hasRecord("byteorder") && text("byteorder") != "little") {
    throw support::Error(fmt::format(
        "expected {} to be of a little-endian machine, but it is of a "
        "big-endian one. Write it on a little-endian one.",
        path));
  }
  const std::string bytes = text("data.pkl");
  SavedTensors objects(archive);
  pickle::Unpickler unpickler(bytes, path, objects);
  return tensors_of(state_dict_of(unpickler.run(), path), path);
}

} // namespace detail

/// Reads what torch.save(model.state_dict(), file) writes in Python; a plain
/// dict of tensors, and a dict with one of the two as "state_dict" or "model".
/// Runs no code of the file. The tensors are on the CPU, with the file's dtypes.
///
/// Throws:   Error if the file is missing, damaged, or holds anything else.
inline StateDict read_state_dict(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    throw support::Error(fmt::format(
        "expected {} to be a file of weights, but there is no such file.",
        path.string()));
  }
  if (detail::has_old_format(path.string())) {
    throw support::Error(fmt::format(
        "expected {} to be in the format of torch 1.6 or later, but it is in "
        "the one before. Load it with torch.load() in Python and write it anew "
        "with torch.save().",
        path.string()));
  }
  try {
    return detail::read_archive(path.string());
  } catch (const support::Error&) {
    throw;
  } catch (const std::exception&) {
    detail::stop_on_unreadable(path.string());
  }
}

namespace detail {

/// The bytes of the file.
inline std::string archived(const StateDict& state) {
  std::string file;
  caffe2::serialize::PyTorchStreamWriter archive(
      [&](const void* bytes, size_t count) {
        file.append(static_cast<const char*>(bytes), count);
        return count;
      });

  pickle::Pickler pickler;
  pickler.ordered_dict().mark();
  std::vector<at::Tensor> stored;
  for (const auto& item : state) {
    stored.push_back(item.value().detach().cpu().contiguous());
    pickler.text(item.key());
    push_tensor(pickler, stored.back(), std::to_string(stored.size() - 1));
  }
  const std::string bytes = pickler.set_items().finish();
  archive.writeRecord("data.pkl", bytes.data(), bytes.size());
  archive.writeRecord("byteorder", "little", 6);
  for (size_t key = 0; key < stored.size(); ++key) {
    archive.writeRecord(
        "data/" + std::to_string(key),
        stored[key].data_ptr(),
        stored[key].nbytes());
  }
  archive.writeEndOfFile();
  return file;
}

} // namespace detail

/// Writes what model.load_state_dict(torch.load(file, weights_only=True)) reads
/// in Python.
///
/// Throws:   Error if the file cannot be written.
inline void write_state_dict(
    const std::filesystem::path& path,
    const StateDict& state) {
  write_file(path, detail::archived(state), "--save-weights");
}

} // namespace training
