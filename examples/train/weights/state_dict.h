// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/files.h"
#include "train/weights/pickle.h"

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/ordered_dict.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace training {

/// Named tensors, as model.state_dict() returns them in Python.
using StateDict = torch::OrderedDict<std::string, at::Tensor>;

namespace detail {

/// One of Python's classes torch.FloatStorage and so on.
struct StorageClass {
  at::ScalarType dtype;
  const char* name;
};

inline constexpr StorageClass kStorageClasses[] = {
    {at::kFloat, "FloatStorage"},
    {at::kDouble, "DoubleStorage"},
    {at::kHalf, "HalfStorage"},
    {at::kBFloat16, "BFloat16Storage"},
    {at::kLong, "LongStorage"},
    {at::kInt, "IntStorage"},
    {at::kShort, "ShortStorage"},
    {at::kChar, "CharStorage"},
    {at::kByte, "ByteStorage"},
    {at::kBool, "BoolStorage"},
};

[[noreturn]] inline void stop_on_unreadable(const std::string& path) {
  throw support::Error(
      "expected " + path +
      " to be a whole file of torch.save(), but it cannot be read: it is "
      "truncated, corrupt, or something else. Write it anew with "
      "torch.save(model.state_dict(), file).");
}

/// The objects that torch.save() writes for tensors. Tensors share memory where
/// they did so in Python.
class SavedTensors final : public pickle::Objects {
 public:
  SavedTensors(
      caffe2::serialize::PyTorchStreamReader& archive,
      std::string path)
      : archive_(archive), path_(std::move(path)) {}

  bool knows(const std::string& global) const override {
    return global == kOrderedDict || global == kRebuildTensor ||
        global == kRebuildParameter || storage_class(global) != nullptr;
  }

  pickle::Data call(const std::string& global, const pickle::Tuple& arguments)
      override {
    const auto& items = arguments.items;
    if (global == kOrderedDict && items.empty()) {
      return pickle::Dict{};
    }
    if (global == kRebuildTensor && items.size() >= 6) {
      // LibTorch checks that all of it is within the storage.
      return argument<at::Tensor>(arguments, 0)
          .as_strided(
              integers(argument<pickle::Tuple>(arguments, 2)),
              integers(argument<pickle::Tuple>(arguments, 3)),
              /*storage_offset=*/argument<int64_t>(arguments, 1));
    }
    if (global == kRebuildParameter && !items.empty()) {
      return argument<at::Tensor>(arguments, 0);
    }
    stop_on_unreadable(path_);
  }

  /// A storage, as a tensor of one dim.
  pickle::Data stored(const pickle::Tuple& id) override {
    const auto* storage = storage_class(argument<pickle::Global>(id, 1).name);
    const int64_t count = argument<int64_t>(id, 4);
    if (storage == nullptr || count < 0) {
      stop_on_unreadable(path_);
    }
    const at::Tensor& bytes = record(argument<std::string>(id, 2));
    const auto item = static_cast<int64_t>(c10::elementSize(storage->dtype));
    if (count > bytes.numel() / item) {
      stop_on_unreadable(path_);
    }
    return bytes.narrow(0, 0, count * item).view(storage->dtype);
  }

 private:
  static constexpr const char* kOrderedDict = "collections.OrderedDict";
  static constexpr const char* kRebuildTensor =
      "torch._utils._rebuild_tensor_v2";
  static constexpr const char* kRebuildParameter =
      "torch._utils._rebuild_parameter";

  static const StorageClass* storage_class(const std::string& global) {
    const auto* const found = std::find_if(
        std::begin(kStorageClasses),
        std::end(kStorageClasses),
        [&](const StorageClass& one) {
          return global == std::string("torch.") + one.name;
        });
    return found == std::end(kStorageClasses) ? nullptr : found;
  }

  template <class T>
  const T& argument(const pickle::Tuple& arguments, size_t index) const {
    const T* const found = index < arguments.items.size()
        ? arguments.items[index]->as<T>()
        : nullptr;
    if (found == nullptr) {
      stop_on_unreadable(path_);
    }
    return *found;
  }

  std::vector<int64_t> integers(const pickle::Tuple& tuple) const {
    std::vector<int64_t> values;
    for (size_t index = 0; index < tuple.items.size(); ++index) {
      values.push_back(argument<int64_t>(tuple, index));
    }
    return values;
  }

  /// What the archive has under a key, as bytes. Read once, for all that share
  /// it.
  const at::Tensor& record(const std::string& key) {
    at::Tensor& bytes = records_[key];
    if (!bytes.defined()) {
      const std::string name = "data/" + key;
      const auto size = archive_.getRecordSize(name);
      bytes = at::empty({static_cast<int64_t>(size)}, at::kByte);
      archive_.getRecord(name, bytes.data_ptr(), size);
    }
    return bytes;
  }

  caffe2::serialize::PyTorchStreamReader& archive_;
  std::string path_;
  std::unordered_map<std::string, at::Tensor> records_;
};

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
    throw support::Error(
        "expected " + path +
        " to hold a dict of tensors, but it holds something else. Write it "
        "with torch.save(model.state_dict(), file).");
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
      throw support::Error(
          "expected every entry of " + path + " to be a named tensor, but " +
          (name == nullptr ? "one has no name" : "\"" + *name + "\" is none") +
          ". Write it with torch.save(model.state_dict(), file).");
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
    throw support::Error(
        "expected " + path +
        " to be of a little-endian machine, but it is of a big-endian one. "
        "Write it on a little-endian one.");
  }
  const std::string bytes = text("data.pkl");
  SavedTensors objects(archive, path);
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
    throw support::Error(
        "expected " + path.string() +
        " to be a file of weights, but there is no such file.");
  }
  if (detail::has_old_format(path.string())) {
    throw support::Error(
        "expected " + path.string() +
        " to be in the format of torch 1.6 or later, but it is in the one "
        "before. Load it with torch.load() in Python and write it anew with "
        "torch.save().");
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

inline const char* storage_name(at::ScalarType dtype) {
  for (const auto& one : kStorageClasses) {
    if (one.dtype == dtype) {
      return one.name;
    }
  }
  TORCH_CHECK_TYPE(
      false,
      "write_state_dict(): expected a dtype that torch.save() had a storage "
      "class for, but got ",
      dtype,
      ".");
}

/// Describes a contiguous tensor whose values are stored beside the pickle.
inline void push_tensor(
    pickle::Pickler& pickler,
    const at::Tensor& tensor,
    const std::string& key) {
  pickler.global("torch._utils", "_rebuild_tensor_v2").mark();
  pickler.mark()
      .text("storage")
      .global("torch", storage_name(tensor.scalar_type()))
      .text(key)
      .text("cpu")
      .integer(tensor.numel())
      .tuple()
      .stored();
  pickler.integer(/*offset=*/0)
      .integers(tensor.sizes())
      .integers(tensor.strides())
      .boolean(/*requires_grad=*/false);
  pickler.global("collections", "OrderedDict").mark().tuple().call(); // hooks
  pickler.tuple().call();
}

/// The bytes of the file.
inline std::string archived(const StateDict& state) {
  std::string file;
  caffe2::serialize::PyTorchStreamWriter archive(
      [&](const void* bytes, size_t count) {
        file.append(static_cast<const char*>(bytes), count);
        return count;
      });

  pickle::Pickler pickler;
  pickler.global("collections", "OrderedDict").mark().tuple().call().mark();
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
