// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/dear_operators.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/operator_handler.h>
#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/_lazy_clone.h>
#include <ATen/ops/clone.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/COW.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// Parameters, by their memory.
using ParameterMemories = std::unordered_set<const void*>;

/// A call of a dear operator in a first run: what it got, and what it returned,
/// if that is kept.
class DearCall {
 public:
  using Values = std::vector<c10::IValue>;

  DearCall(
      const OperatorHandler::Call& call,
      const ParameterMemories& parameters)
      : op_(call.op), dear_(call.dear) {
    for (const c10::IValue& argument : call.arguments()) {
      auto& noted = arguments_.emplace_back();
      if (is_defined(argument)) {
        const at::Tensor& tensor = argument.toTensor();
        const void* memory = memory_of(tensor);
        const bool is_parameter = parameters.count(memory) != 0;
        noted = Argument{TensorMeta(tensor), is_parameter ? memory : nullptr};
      }
    }
  }

  /// Notes what it returned, and keeps that if it is to be.
  void set_results(
      const OperatorHandler::Call& call,
      const Values& arguments,
      bool keep) {
    multiply_adds_ =
        call.dear.multiply_adds(arguments, call.results()[0].toTensor());
    Values results = call.results().vec();
    if (call.dear.first_result != nullptr) {
      results[0] = c10::IValue();
    }
    if (!can_be_kept(results)) {
      return;
    }
    bytes_ = bytes_of(results);
    is_kept_ = keep;
    for (size_t i = 0; keep && i < results.size(); ++i) {
      results_.push_back(shared(results[i]));
      versions_.push_back(version_of(results_.back()));
      if (is_defined(results[i])) {
        storages_.push_back(
            results[i].toTensor().storage().getWeakStorageImpl());
      }
    }
  }

  /// Whether another call is of the same operator, with arguments alike.
  bool fits(const OperatorHandler::Call& call) const {
    const Arguments arguments = call.arguments();
    if (!(op_ == call.op) || arguments_.size() != arguments.size()) {
      return false;
    }
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (arguments_[i].has_value() != is_defined(arguments[i]) ||
          (arguments_[i] && !arguments_[i]->fits(arguments[i].toTensor()))) {
        return false;
      }
    }
    return true;
  }

  /// Whether LibTorch may compute it by other operators where a graph is
  /// recorded.
  bool has_other_forms() const {
    return dear_.has_other_forms;
  }

  bool uses_parameter() const {
    return std::any_of(
        arguments_.begin(), arguments_.end(), [](const auto& argument) {
          return argument && argument->parameter != nullptr;
        });
  }

  /// Whether another call may be one of these.
  bool may_become(const OperatorHandler::Call& call) const {
    return has_other_forms() && call.dear.has_other_forms && !(op_ == call.op);
  }

  /// All results, for a call that is like this one; none where it has to run,
  /// as where one was written. They are let go, or stay as they are.
  Values results_for(const OperatorHandler::Call& call, bool let_go) {
    Values results;
    for (size_t i = 0; i < results_.size(); ++i) {
      if (version_of(results_[i]) != versions_[i]) {
        return {};
      }
      results.push_back(let_go ? results_[i] : another(results_[i]));
    }
    if (let_go) {
      results_.clear();
    }
    if (!results.empty() && call.dear.first_result != nullptr) {
      auto first = call.dear.first_result(
          call.arguments(), results[1].toTensor(), results[2].toTensor());
      if (!first) {
        return {};
      }
      results[0] = std::move(*first);
    }
    return results;
  }

  /// Whether the results were kept, and not given up since.
  bool is_kept() const {
    return is_kept_;
  }

  /// They are not to be kept, in other runs neither.
  void give_up() {
    is_kept_ = false;
    let_go();
  }

  /// They need not be there any more.
  void let_go() {
    results_.clear();
  }

  /// Whether they are there, and nobody else holds their memory.
  bool is_alone() const {
    size_t i = 0;
    const auto is_held = [&](const c10::IValue& result) {
      if (!is_defined(result)) {
        return true;
      }
      const c10::Storage& own = result.toTensor().storage();
      const size_t owners = own.use_count();
      const auto storage = storages_[i++].lock();
      return storage.get() == own.unsafeGetStorageImpl()
          ? owners > 1
          : storage && storage->data() == own.data();
    };
    return !std::all_of(results_.begin(), results_.end(), is_held);
  }

  /// Those that are there.
  Tensors tensors() const {
    Tensors result;
    for (const c10::IValue& value : results_) {
      if (is_defined(value)) {
        result.push_back(value.toTensor());
      }
    }
    return result;
  }

  double multiply_adds() const {
    return multiply_adds_;
  }

  /// Of the results, kept or not.
  int64_t bytes() const {
    return bytes_;
  }

  /// "aten::mm (sizes [3, 4], Float, cpu; 'weight', sizes [4, 5], Float, cpu)"
  std::string described(const torch::nn::Module& branch) const {
    std::string words;
    for (const auto& argument : arguments_) {
      if (argument) {
        words += (words.empty() ? "" : "; ") +
            name_of_parameter(argument->parameter, branch) +
            describe(argument->meta);
      }
    }
    return op_.operator_name().name + " (" + words + ")";
  }

 private:
  /// What an argument is like; of which parameter it is, or a view, if of one.
  struct Argument {
    bool fits(const at::Tensor& tensor) const {
      return meta.fits(tensor) &&
          (parameter == nullptr || parameter == memory_of(tensor));
    }

    TensorMeta meta;
    const void* parameter;
  };

  static bool is_defined(const c10::IValue& value) {
    return value.isTensor() && value.toTensor().defined();
  }

  static const void* data_of(const c10::IValue& value) {
    return value.toTensor().storage().data();
  }

  /// A value in the same memory, for as long as nobody writes it (rule 2).
  static c10::IValue shared(const c10::IValue& value) {
    if (!is_defined(value)) {
      return value;
    }
    const at::Tensor& tensor = value.toTensor();
    return can_copy_on_write(tensor) ? at::_lazy_clone(tensor)
                                     : with_its_version(tensor);
  }

  /// Likewise, which may be written.
  static c10::IValue another(const c10::IValue& value) {
    if (!is_defined(value)) {
      return value;
    }
    const at::Tensor& tensor = value.toTensor();
    return can_copy_on_write(tensor) ? at::_lazy_clone(tensor)
                                     : at::clone(tensor);
  }

  /// On other devices LibTorch copies in the default stream, which neither waits
  /// for the stream that computes, nor may be used in a capture.
  static bool can_copy_on_write(const at::Tensor& tensor) {
    const c10::Storage& storage = tensor.storage();
    return tensor.is_cpu() &&
        (c10::impl::cow::is_cow_data_ptr(storage.data_ptr()) ||
         c10::impl::cow::has_simple_data_ptr(*storage.unsafeGetStorageImpl()));
  }

  /// An alias of whose version is known whether the tensor was written.
  static at::Tensor with_its_version(const at::Tensor& tensor) {
    const at::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
    return at::Tensor(impl.shallow_copy_and_detach(
        impl.version_counter(), /*allow_tensor_metadata_change=*/true));
  }

  static int64_t version_of(const c10::IValue& value) {
    return is_defined(value) ? value.toTensor()._version() : 0;
  }

  static bool can_be_kept(const Values& results) {
    return std::all_of(
        results.begin(), results.end(), [](const c10::IValue& result) {
          return !is_defined(result) ||
              (result.toTensor().layout() == at::kStrided &&
               result.toTensor().has_storage() && data_of(result) != nullptr);
        });
  }

  static int64_t bytes_of(const Values& results) {
    int64_t bytes = 0;
    for (const c10::IValue& result : results) {
      if (is_defined(result)) {
        bytes += static_cast<int64_t>(result.toTensor().storage().nbytes());
      }
    }
    return bytes;
  }

  static std::string name_of_parameter(
      const void* memory,
      const torch::nn::Module& branch) {
    for (const auto& parameter : branch.named_parameters()) {
      if (memory != nullptr && memory_of(parameter.value()) == memory) {
        return "'" + parameter.key() + "', ";
      }
    }
    return "";
  }

  c10::OperatorHandle op_;
  const DearOperator& dear_; // of all operators, which stay
  std::vector<std::optional<Argument>> arguments_; // of those that are tensors
  Values results_; // none where they are not there
  std::vector<int64_t> versions_; // as they were kept
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages_; // likewise
  double multiply_adds_ = 0;
  int64_t bytes_ = 0;
  bool is_kept_ = false;
};

} // namespace memcnn::detail
