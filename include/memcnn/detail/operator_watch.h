// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/generator_state.h>
#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
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

/// Which operators run while an OperatorWatch lives.
enum class Operators { kAny, kThatOnlyCompute };

/// Looks at the operators of this thread while it lives. Copies tensors just
/// before an operator writes to them, and only those; notes the default
/// generators where one draws from them. A look costs as much as a small
/// operator: where none of them writes or draws it is spared.
///
/// An operator says in its schema which arguments it writes, and that it takes a
/// generator; those that have running statistics write them without saying so.
/// What writes through a raw pointer, or in another thread, is not seen.
class OperatorWatch {
 public:
  /// The generators are those that a module on the device can draw from.
  OperatorWatch(const Tensors& tensors, at::Device device, Operators operators)
      : outer_(innermost()),
        device_(device),
        is_looking_(outer_ != nullptr && outer_->is_looking_) {
    entries_.reserve(tensors.size());
    for (const at::Tensor& tensor : tensors) {
      entries_.push_back({tensor, memory_of(tensor), at::Tensor()});
    }
    if (operators == Operators::kAny) {
      look();
    }
    innermost() = this;
  }
  OperatorWatch(const OperatorWatch&) = delete;
  OperatorWatch& operator=(const OperatorWatch&) = delete;
  ~OperatorWatch() {
    innermost() = outer_;
    if (callback_ != at::INVALID_CALLBACK_HANDLE) {
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

  /// Whether the operator that runs in this thread is to write this tensor, and
  /// has not yet; where no operator is seen, that may be.
  static bool is_to_be_written(const at::Tensor& tensor) {
    const OperatorWatch* watch = innermost();
    return watch == nullptr || !at::isRecordFunctionEnabled() ||
        (watch->fill_.memory == memory_of(tensor) &&
         watch->fill_.version == tensor._version());
  }

  /// What the default generators were like before and after each draw, in short;
  /// none where no operator drew.
  std::optional<uint64_t> draws() const {
    return draws_;
  }

 private:
  struct Entry {
    at::Tensor tensor;
    const void* memory;
    at::Tensor before;
  };

  /// What the operator that writes found in the place, while it runs.
  struct Fill {
    const void* memory = nullptr;
    int64_t version = 0;
  };

  /// What an operator does, by the numbers of its arguments.
  struct Effects {
    std::vector<size_t> writes;
    std::vector<size_t> fills; // of these, what backward may read
    std::vector<size_t> writes_in_training; // running statistics ...
    std::optional<size_t> training; // ... if this is true
    std::optional<size_t> generator; // the default one where this is none
  };

  /// What has to be done when an operator ends that draws or writes.
  struct Ending final : at::ObserverContext {
    explicit Ending(Fill outer) : outer_fill(outer) {}

    std::unique_lock<std::recursive_mutex> draw; // of one that draws
    Fill outer_fill; // of the operator around it
  };

  void look() {
    if (!at::isRecordFunctionEnabled()) {
      for (Entry& entry : entries_) { // nothing will be seen
        copy(entry);
      }
    }
    // One callback serves all that watch in this thread.
    if (!is_looking_) {
      callback_ = at::addThreadLocalCallback(
          at::RecordFunctionCallback(&before_operator, &after_operator)
              .needsInputs(true)
              .scopes({at::RecordScope::FUNCTION}));
      is_looking_ = true;
    }
  }

  static OperatorWatch*& innermost() {
    static thread_local OperatorWatch* watch = nullptr;
    return watch;
  }

  /// Observers that throw are not heard: a copy that fails is told later.
  void copy_all_at(const void* memory) {
    try {
      for (Entry& entry : entries_) {
        if (entry.memory == memory) {
          copy(entry);
        }
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

  static Effects read(const c10::FunctionSchema& schema) {
    Effects effects;
    const auto& arguments = schema.arguments();
    for (size_t i = 0; i < arguments.size(); ++i) {
      const std::string& name = arguments[i].name();
      const auto* alias = arguments[i].alias_info();
      const bool is_statistic = name == "running_mean" || name == "running_var";
      if (alias != nullptr && alias->isWrite()) {
        effects.writes.push_back(i);
        if (!is_statistic) { // which backward reads where they are not written
          effects.fills.push_back(i);
        }
      } else if (is_statistic) {
        effects.writes_in_training.push_back(i);
      } else if (name == "training" || name == "use_input_stats") {
        effects.training = i;
      } else if (name == "generator") {
        effects.generator = i;
      }
    }
    return effects;
  }

  /// Read once an operator: copying a schema is dear. Its name lives as long as
  /// the operator, so that the address tells operators apart.
  static const Effects& effects_of(const at::RecordFunction& function) {
    static thread_local std::unordered_map<const char*, Effects> known;
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
    const Effects& effects = effects_of(function);
    const bool draws = effects.generator &&
        *effects.generator < inputs.size() &&
        inputs[*effects.generator].isNone();
    std::unique_ptr<Ending> ending;
    if (draws || !effects.fills.empty()) {
      ending = std::make_unique<Ending>(innermost()->fill_);
    }
    if (draws) {
      ending->draw = std::unique_lock(draw_mutex());
      see_draw();
    }
    for (const size_t i : effects.writes) {
      see_written(inputs, i);
    }
    for (const size_t i : effects.fills) {
      see_filled(inputs, i);
    }
    const bool training = !effects.training ||
        (*effects.training < inputs.size() &&
         inputs[*effects.training].isBool() &&
         inputs[*effects.training].toBool());
    if (training) {
      for (const size_t i : effects.writes_in_training) {
        see_written(inputs, i);
      }
    }
    return ending;
  }

  static void after_operator(
      const at::RecordFunction& /*function*/,
      at::ObserverContext* context) {
    if (context == nullptr) {
      return;
    }
    auto& ending = static_cast<Ending&>(*context);
    if (ending.draw) {
      see_draw();
      ending.draw.unlock();
    }
    // What it wrote may be freed, and its memory another tensor's.
    if (innermost() != nullptr) {
      innermost()->fill_ = ending.outer_fill;
    }
  }

  static void see_draw() {
    for (OperatorWatch* watch = innermost(); watch != nullptr;
         watch = watch->outer_) {
      watch->draws_ = watch->draws_.value_or(0) * 31 +
          GeneratorState::now(watch->device_).hash();
    }
  }

  static void see_filled(c10::ArrayRef<const c10::IValue> inputs, size_t i) {
    if (i < inputs.size() && inputs[i].isTensor()) {
      const at::Tensor& tensor = inputs[i].toTensor();
      if (tensor.defined() && !tensor.is_inference()) {
        innermost()->fill_ = {memory_of(tensor), tensor._version()};
      }
    }
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
    for (OperatorWatch* watch = innermost(); watch != nullptr;
         watch = watch->outer_) {
      watch->copy_all_at(memory);
    }
  }

  OperatorWatch* outer_;
  at::Device device_;
  bool is_looking_; // by itself or by an outer one
  at::CallbackHandle callback_ = at::INVALID_CALLBACK_HANDLE;
  std::vector<Entry> entries_;
  std::exception_ptr failure_;
  std::optional<uint64_t> draws_;
  Fill fill_;
};

} // namespace memcnn::detail
