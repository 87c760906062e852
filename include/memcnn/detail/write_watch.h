// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>

#include <cstddef>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// The inputs of an observed operator. RecordFunction::inputs() first asserts a
/// flag that LibTorch's release builds do not keep, and so throws in a program
/// compiled without NDEBUG; an explicit instantiation may name the member
/// itself.
c10::ArrayRef<const c10::IValue> inputs_of(const at::RecordFunction& function);

template <auto kInputs>
struct InputsOf {
  friend c10::ArrayRef<const c10::IValue> inputs_of(
      const at::RecordFunction& function) {
    return function.*kInputs;
  }
};
template struct InputsOf<&at::RecordFunction::inputs_>;

/// Copies tensors just before an operator writes to them, and only those: the
/// operators of this thread are looked at while it lives.
///
/// An operator says in its schema which arguments it writes; those that have
/// running statistics write them without saying so. What writes through a raw
/// pointer, or in another thread, is not seen.
class WriteWatch {
 public:
  explicit WriteWatch(const Tensors& tensors) : outer_(innermost()) {
    for (const at::Tensor& tensor : tensors) {
      entries_.push_back({tensor, at::Tensor()});
      by_memory_[memory_of(tensor)].push_back(entries_.size() - 1);
    }
    if (!at::isRecordFunctionEnabled()) {
      for (Entry& entry : entries_) { // nothing will be seen
        copy(entry);
      }
    }
    // One callback serves all that watch in this thread.
    if (outer_ == nullptr) {
      callback_ = at::addThreadLocalCallback(
          at::RecordFunctionCallback(&before_operator)
              .needsInputs(true)
              .scopes({at::RecordScope::FUNCTION}));
    }
    innermost() = this;
  }
  WriteWatch(const WriteWatch&) = delete;
  WriteWatch& operator=(const WriteWatch&) = delete;
  ~WriteWatch() {
    innermost() = outer_;
    if (outer_ == nullptr) {
      at::removeCallback(callback_);
    }
  }

  /// What tensor i held before it was written first; undefined if it was not.
  at::Tensor take_before(size_t i) {
    if (failure_) {
      std::rethrow_exception(std::exchange(failure_, nullptr));
    }
    return std::move(entries_[i].before);
  }

 private:
  struct Entry {
    at::Tensor tensor;
    at::Tensor before;
  };

  /// Which arguments an operator writes.
  struct Writes {
    std::vector<size_t> always;
    std::vector<size_t> in_training; // running statistics ...
    std::optional<size_t> training; // ... if this argument is true
  };

  static WriteWatch*& innermost() {
    static thread_local WriteWatch* watch = nullptr;
    return watch;
  }

  /// Tensors of one memory are written together.
  static const void* memory_of(const at::Tensor& tensor) {
    return tensor.has_storage()
        ? static_cast<const void*>(tensor.storage().unsafeGetStorageImpl())
        : tensor.unsafeGetTensorImpl();
  }

  /// Observers that throw are not heard: a copy that fails is told later.
  void copy_all(const std::vector<size_t>& entries) {
    try {
      for (const size_t i : entries) {
        copy(entries_[i]);
      }
    } catch (...) {
      failure_ = std::current_exception();
    }
  }

  static void copy(Entry& entry) {
    if (!entry.before.defined()) {
      const at::NoGradGuard no_grad;
      entry.before = entry.tensor.detach().clone();
    }
  }

  static Writes read(const c10::FunctionSchema& schema) {
    Writes writes;
    const auto& arguments = schema.arguments();
    for (size_t i = 0; i < arguments.size(); ++i) {
      const std::string& name = arguments[i].name();
      const auto* alias = arguments[i].alias_info();
      if (alias != nullptr && alias->isWrite()) {
        writes.always.push_back(i);
      } else if (name == "running_mean" || name == "running_var") {
        writes.in_training.push_back(i);
      } else if (name == "training" || name == "use_input_stats") {
        writes.training = i;
      }
    }
    return writes;
  }

  /// Read once an operator: copying a schema is dear. Its name lives as long as
  /// the operator, so that the address tells operators apart.
  static const Writes& writes_of(const at::RecordFunction& function) {
    static thread_local std::unordered_map<const char*, Writes> known;
    const auto [found, is_new] = known.try_emplace(function.name());
    if (is_new) {
      if (const auto schema = function.operator_schema()) {
        found->second = read(*schema);
      }
    }
    return found->second;
  }

  static std::unique_ptr<at::ObserverContext> before_operator(
      const at::RecordFunction& function) {
    if (innermost() == nullptr) {
      return nullptr; // a thread that inherited the callback
    }
    const auto inputs = inputs_of(function);
    const Writes& writes = writes_of(function);
    for (const size_t i : writes.always) {
      see_written(inputs, i);
    }
    const bool training = !writes.training ||
        (*writes.training < inputs.size() &&
         inputs[*writes.training].isBool() &&
         inputs[*writes.training].toBool());
    if (training) {
      for (const size_t i : writes.in_training) {
        see_written(inputs, i);
      }
    }
    return nullptr;
  }

  static void see_written(c10::ArrayRef<const c10::IValue> inputs, size_t i) {
    if (i >= inputs.size()) {
      return;
    }
    if (inputs[i].isTensor()) {
      see_written(inputs[i].toTensor());
    } else if (inputs[i].isTensorList()) {
      for (const at::Tensor& tensor : inputs[i].toTensorVector()) {
        see_written(tensor);
      }
    }
  }

  static void see_written(const at::Tensor& tensor) {
    if (!tensor.defined()) {
      return;
    }
    const void* memory = memory_of(tensor);
    for (WriteWatch* watch = innermost(); watch != nullptr;
         watch = watch->outer_) {
      const auto found = watch->by_memory_.find(memory);
      if (found != watch->by_memory_.end()) {
        watch->copy_all(found->second);
      }
    }
  }

  WriteWatch* outer_;
  at::CallbackHandle callback_ = at::INVALID_CALLBACK_HANDLE;
  std::vector<Entry> entries_;
  std::exception_ptr failure_;
  std::unordered_map<const void*, std::vector<size_t>> by_memory_;
};

} // namespace memcnn::detail
