// SPDX-License-Identifier: MIT
#pragma once

// What torch.save() writes of a tensor: in the pickle, its dtype, sizes and so
// on; beside it, the storage, which tensors may share.

#include "support/printable.h"
#include "train/base/format_error.h"
#include "train/weights/dtypes.h"
#include "train/weights/pickler.h"
#include "train/weights/unpickler.h"
#include "train/weights/zip_reader.h"

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace training {

namespace detail {

/// Whether Python's `global` makes plain data, which a checkpoint may have
/// beside its tensors. It is passed over, not made.
inline bool makes_plain_data(const std::string& global) {
  constexpr std::string_view kPlain[] = {
      "torch.Size",
      "torch.device",
      "torch.complex64",
      "torch.complex128",
      "_codecs.encode", // bytes, in protocol 2
      "set",
      "frozenset",
      "bytearray",
      "complex"};
  constexpr std::string_view kTorch = "torch.";
  std::string_view name = global;
  for (const std::string_view module : {"__builtin__.", "builtins."}) {
    if (name.substr(0, module.size()) == module) {
      name.remove_prefix(module.size());
    }
  }
  const bool is_dtype = std::any_of(
      std::begin(kStorageClasses),
      std::end(kStorageClasses),
      [&](const StorageClass& one) {
        return name.substr(0, kTorch.size()) == kTorch &&
            name.substr(kTorch.size()) == one.dtype_name;
      });
  return is_dtype ||
      std::find(std::begin(kPlain), std::end(kPlain), name) != std::end(kPlain);
}

/// The objects that torch.save() writes for tensors. Tensors share memory where
/// they did so in Python.
///
/// Throws:   FormatError if they are not as it writes them.
class SavedTensors final : public pickle::Objects {
 public:
  explicit SavedTensors(ZipReader& archive) : archive_(archive) {}

  bool knows(const std::string& global) const override {
    return global == kOrderedDict || global == kRebuildTensor ||
        global == kRebuildParameter || find_storage_class(global) != nullptr ||
        makes_plain_data(global);
  }

  pickle::Data call(const std::string& global, const pickle::Tuple& arguments)
      override {
    const auto& items = arguments.items;
    if (global == kOrderedDict && items.empty()) {
      return pickle::Dict{};
    }
    if (global == kRebuildTensor && items.size() >= 6) {
      const at::Tensor tensor = part_of(
          argument<at::Tensor>(arguments, 0),
          integers(arguments, 2),
          integers(arguments, 3),
          argument<int64_t>(arguments, 1));
      return items.size() == 6
          ? tensor
          : with_metadata(tensor, argument<pickle::Dict>(arguments, 6));
    }
    if (global == kRebuildParameter && !items.empty()) {
      return argument<at::Tensor>(arguments, 0);
    }
    if (makes_plain_data(global)) {
      return pickle::Other{};
    }
    stop_on_other();
  }

  /// A storage, as a tensor of one dim.
  pickle::Data stored(const pickle::Tuple& id) override {
    const auto* const storage =
        find_storage_class(argument<pickle::Global>(id, 1).name);
    if (storage == nullptr) {
      stop_on_other();
    }
    const at::Tensor& bytes = record(argument<std::string>(id, 2));
    const auto item = static_cast<int64_t>(c10::elementSize(storage->dtype));
    const auto count = argument<int64_t>(id, 4);
    if (count < 0 || count > bytes.numel() / item) {
      stop_on_excess();
    }
    return bytes.narrow(0, 0, count * item).view(storage->dtype);
  }

 private:
  static constexpr const char* kOrderedDict = "collections.OrderedDict";
  static constexpr const char* kRebuildTensor =
      "torch._utils._rebuild_tensor_v2";
  static constexpr const char* kRebuildParameter =
      "torch._utils._rebuild_parameter";

  /// As many as LibTorch's kernels take. A pickle can name one tuple again and
  /// again, and each tensor has a copy.
  static constexpr size_t kMostDims = 64;

  [[noreturn]] static void stop_on_other() {
    throw FormatError("its pickle describes no tensor as torch.save() does");
  }

  [[noreturn]] static void stop_on_excess() {
    throw FormatError("a tensor in it is larger than what is stored of it");
  }

  static at::Tensor part_of(
      const at::Tensor& storage,
      const std::vector<int64_t>& sizes,
      const std::vector<int64_t>& strides,
      int64_t offset) {
    try {
      return storage.as_strided(sizes, strides, offset);
    } catch (const c10::Error&) { // it checks all there is to check
      stop_on_excess();
    }
  }

  /// Applies the bits of a view that Python evaluates late: a name is there where
  /// its bit is set.
  static at::Tensor with_metadata(
      const at::Tensor& tensor,
      const pickle::Dict& metadata) {
    at::Tensor result = tensor;
    for (const auto& item : metadata.items) {
      const auto* const name = item.first->as<std::string>();
      if (name == nullptr || tensor.scalar_type() == at::kBool) {
        stop_on_other();
      }
      if (*name != "neg") {
        throw FormatError(fmt::format(
            "a tensor in it has the metadata \"{}\", which is not applied",
            support::printable(*name)));
      }
      // A view as there: sizes are not yet compared with the network's.
      result = at::_neg_view(tensor);
    }
    return result;
  }

  template <class T>
  static const T& argument(const pickle::Tuple& arguments, size_t index) {
    const T* const found = index < arguments.items.size()
        ? arguments.items[index]->as<T>()
        : nullptr;
    if (found == nullptr) {
      stop_on_other();
    }
    return *found;
  }

  static std::vector<int64_t> integers(
      const pickle::Tuple& arguments,
      size_t index) {
    const auto& tuple = argument<pickle::Tuple>(arguments, index);
    if (tuple.items.size() > kMostDims) {
      stop_on_other();
    }
    std::vector<int64_t> values;
    for (size_t at = 0; at < tuple.items.size(); ++at) {
      values.push_back(argument<int64_t>(tuple, at));
    }
    return values;
  }

  /// What the archive has under a key, as bytes. Read once, for all that share
  /// it.
  const at::Tensor& record(const std::string& key) {
    at::Tensor& bytes = records_[key];
    if (!bytes.defined()) {
      const std::string name = "data/" + key;
      const auto size = static_cast<int64_t>(archive_.size(name));
      bytes = at::empty({size}, at::kByte);
      archive_.read(name, bytes.data_ptr());
    }
    return bytes;
  }

  ZipReader& archive_;
  std::unordered_map<std::string, at::Tensor> records_;
};

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
      .boolean(/*requires_grad=*/false)
      .ordered_dict() // of hooks
      .tuple()
      .call();
}

} // namespace detail

} // namespace training
