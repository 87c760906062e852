// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/dear_operators.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/operator_handler.h>
#include <memcnn/detail/parts.h>
#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/_lazy_clone.h>
#include <ATen/ops/clone.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/COW.h>
#include <c10/util/Exception.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace memcnn::detail {

// Note [Kept results]
// ~~~~~~~~~~~~~~~~~~~
// The time of a second run lies in convolutions, products of matrices and
// attention (detail/dear_operators.h), while its bytes lie in what all operators
// save. The results of these few are kept, the others run again.
//
// 1. A call whose result was kept in the first run does not run in the second:
//    below autograd it is given that result (detail/operator_handler.h). The
//    graph, its saved arguments and its gradients, second ones too, are
//    autograd's own. What follows a kept result computes from the very bits of
//    forward.
// 2. A kept result shares its memory with what the branch got until one of them
//    is written in place, as ReLU(inplace) does: the writer then gets memory of
//    its own (copy on write).
// 3. The second run calls the same dear operators as the first, in the same
//    order, with arguments of the same sizes, dtypes and devices, and with the
//    same parameters, or backward stops. Other operators may differ. A product
//    of activations may be computed by another operator where a graph is
//    recorded, as LibTorch chooses: it runs again.
// 4. A result is let go as the second run takes it, unless the graph is
//    retained, and at the latest when the backward step of its block is done.
// 5. A call that draws random numbers, as attention with dropout does, always
//    runs again: what follows it would draw others.
// 6. Of batch normalisation that trains the statistics are kept, two numbers a
//    channel; the second run normalises with them, bit for bit as the first did
//    (detail/batch_statistics.h). On a CPU, where they take most of its time.
// 7. In debug mode the comparison at the first run's very argument keeps out of
//    this: everything runs.

class KeptResults;

/// Who decides which results of a run are kept: asked before each call, and told
/// of it after it.
class ResultKeeper {
 public:
  virtual bool keeps_next() = 0;
  virtual void add(std::shared_ptr<KeptResults> results, size_t call) = 0;

 protected:
  ~ResultKeeper() = default;
};

/// The calls of dear operators in the first run of a branch, and those of their
/// results that are kept for the second (Note [Kept results]).
class KeptResults : public std::enable_shared_from_this<KeptResults> {
 private:
  using Values = std::vector<c10::IValue>;
  struct DearCall;

 public:
  explicit KeptResults(const torch::nn::Module& branch) {
    for_each_parameter(branch, [&](const at::Tensor& parameter) {
      parameters_.insert(memory_of(parameter));
    });
  }

  /// While it lives, the first run.
  class FirstRun final : public OperatorHandler {
   public:
    FirstRun(KeptResults& results, ResultKeeper& keeper)
        : results_(results), keeper_(keeper) {}

   private:
    void handle(const Call& call) override {
      if (!call.dear.is_dear(call.arguments())) {
        run(call);
        return;
      }
      ask_for_all_results(call);
      DearCall noted = results_.noted(call);
      const bool keep = keeper_.keeps_next();
      const Values arguments = call.arguments().vec();
      run(call);
      noted.multiply_adds =
          call.dear.multiply_adds(arguments, call.results()[0].toTensor());
      Values results = call.results().vec();
      if (call.dear.first_result != nullptr) {
        results[0] = c10::IValue();
      }
      if (can_be_kept(results)) {
        noted.bytes = bytes_of(results);
        if (keep) {
          noted.keep(results);
        }
      }
      results_.calls_.push_back(std::move(noted));
      keeper_.add(results_.shared_from_this(), results_.calls_.size() - 1);
    }

    KeptResults& results_;
    ResultKeeper& keeper_;
  };

  /// While it lives, a second run; if it releases, results are let go as they
  /// are taken.
  class SecondRun final : public OperatorHandler {
   public:
    SecondRun(
        KeptResults& results,
        const torch::nn::Module& branch,
        bool release)
        : results_(results), branch_(branch), release_(release) {}

    /// It has come to its end.
    void end() {
      if (is_other_form_) {
        skip_products();
      }
      results_.check_count(next_, branch_);
    }

   private:
    void handle(const Call& call) override {
      if (!call.dear.is_dear(call.arguments())) {
        run(call);
        return;
      }
      ask_for_all_results(call);
      DearCall* noted = expected(call);
      Values results = noted ? taken(*noted, call) : Values();
      if (results.empty()) {
        run(call);
        return;
      }
      torch::jit::drop(call.stack, call.arguments().size());
      for (c10::IValue& result : results) {
        call.stack.push_back(std::move(result));
      }
    }

    /// The call of the first run in the place of this one (rule 3); null if that
    /// was another form of the product.
    DearCall* expected(const Call& call) {
      if (is_other_form_) {
        skip_products(&call);
      }
      auto& calls = results_.calls_;
      if (next_ < calls.size() && fits(calls[next_], call)) {
        is_other_form_ = false;
        return &calls[next_++];
      }
      is_other_form_ = next_ < calls.size() && calls[next_].has_other_forms &&
          results_.noted(call).has_other_forms && !results_.fit_any(call);
      results_.check_order(is_other_form_, next_, call, branch_);
      return nullptr;
    }

    /// Those of the first run in whose place other forms ran: one at least, and
    /// all up to one that fits.
    void skip_products(const Call* call = nullptr) {
      const auto& calls = results_.calls_;
      do {
        ++next_;
      } while (next_ < calls.size() && calls[next_].has_other_forms &&
               !(call != nullptr && fits(calls[next_], *call)));
    }

    /// All results of a call; none where it has to run.
    Values taken(DearCall& noted, const Call& call) const {
      Values results;
      for (const c10::IValue& result : noted.results) {
        results.push_back(release_ ? result : shared(result));
      }
      if (release_) {
        noted.results.clear();
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

    KeptResults& results_;
    const torch::nn::Module& branch_;
    bool release_;
    size_t next_ = 0;
    bool is_other_form_ = false; // of calls from the next one on
  };

  /// Whether the result of a call was kept and not given up since.
  bool keeps(size_t call) const {
    return calls_[call].is_kept;
  }

  /// The multiply-adds of a call.
  double multiply_adds_of(size_t call) const {
    return calls_[call].multiply_adds;
  }

  /// The bytes of the result of a call.
  int64_t bytes_of(size_t call) const {
    return calls_[call].bytes;
  }

  /// The result of a call is not to be kept, in other runs neither. Returns its
  /// bytes.
  int64_t give_up(size_t call) {
    calls_[call].is_kept = false;
    calls_[call].results.clear();
    return calls_[call].bytes;
  }

  /// Lets the kept result of a call go where nobody else holds its memory;
  /// returns its bytes if so.
  int64_t let_go_unshared(size_t call) {
    DearCall& noted = calls_[call];
    if (noted.results.empty() || noted.is_shared()) {
      return 0;
    }
    noted.results.clear();
    return noted.bytes;
  }

  /// Lets all results go.
  void let_go() {
    for (DearCall& call : calls_) {
      call.results.clear();
    }
  }

 private:
  /// What an argument is like; of which parameter it is, or a view, if of one.
  struct Argument {
    TensorMeta meta;
    const void* parameter;
  };

  struct DearCall {
    explicit DearCall(c10::OperatorHandle op_) : op(std::move(op_)) {}

    void keep(const Values& results_) {
      for (const c10::IValue& result : results_) {
        results.push_back(shared(result));
        if (is_defined(result)) {
          storages.push_back(result.toTensor().storage().getWeakStorageImpl());
        }
      }
      is_kept = true;
    }

    /// Whether what the branch got still holds the memory of all results.
    bool is_shared() const {
      size_t i = 0;
      return std::all_of(
          results.begin(), results.end(), [&](const c10::IValue& result) {
            if (!is_defined(result)) {
              return true;
            }
            const auto storage = storages[i++].lock();
            return storage && storage->data() == data_of(result);
          });
    }

    c10::OperatorHandle op;
    bool has_other_forms = false;
    std::vector<std::optional<Argument>> arguments; // of those that are tensors
    Values results; // none where they are not there
    std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages; // likewise
    double multiply_adds = 0;
    int64_t bytes = 0;
    bool is_kept = false;
  };

  static bool is_defined(const c10::IValue& value) {
    return value.isTensor() && value.toTensor().defined();
  }

  static const void* data_of(const c10::IValue& value) {
    return value.toTensor().storage().data();
  }

  /// A value whose memory is shared until somebody writes it (rule 2).
  static c10::IValue shared(const c10::IValue& value) {
    if (!is_defined(value)) {
      return value;
    }
    const at::Tensor& tensor = value.toTensor();
    const c10::Storage& storage = tensor.storage();
    const bool can_be_shared =
        c10::impl::cow::is_cow_data_ptr(storage.data_ptr()) ||
        c10::impl::cow::has_simple_data_ptr(*storage.unsafeGetStorageImpl());
    return can_be_shared ? at::_lazy_clone(tensor) : at::clone(tensor);
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

  static void ask_for_all_results(const OperatorHandler::Call& call) {
    if (const auto position = call.dear.asks_for_backward) {
      torch::jit::peek(call.stack, *position, call.arguments().size()) = true;
    }
  }

  DearCall noted(const OperatorHandler::Call& call) const {
    DearCall result(call.op);
    result.has_other_forms = call.dear.has_other_forms;
    for (const c10::IValue& argument : call.arguments()) {
      auto& noted = result.arguments.emplace_back();
      if (is_defined(argument)) {
        const at::Tensor& tensor = argument.toTensor();
        const bool is_parameter = parameters_.count(memory_of(tensor)) != 0;
        noted = Argument{
            TensorMeta(tensor), is_parameter ? memory_of(tensor) : nullptr};
        result.has_other_forms = result.has_other_forms && !is_parameter;
      }
    }
    return result;
  }

  static bool fits(const DearCall& noted, const OperatorHandler::Call& call) {
    const Arguments arguments = call.arguments();
    if (!(noted.op == call.op) || noted.arguments.size() != arguments.size()) {
      return false;
    }
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto& expected = noted.arguments[i];
      if (expected.has_value() != is_defined(arguments[i])) {
        return false;
      }
      if (expected) {
        const at::Tensor& tensor = arguments[i].toTensor();
        if (!expected->meta.fits(tensor) ||
            (expected->parameter != nullptr &&
             expected->parameter != memory_of(tensor))) {
          return false;
        }
      }
    }
    return true;
  }

  bool fit_any(const OperatorHandler::Call& call) const {
    return std::any_of(calls_.begin(), calls_.end(), [&](const auto& noted) {
      return fits(noted, call);
    });
  }

  void check_order(
      bool is_right,
      size_t number,
      const OperatorHandler::Call& call,
      const torch::nn::Module& branch) const {
    TORCH_CHECK(
        is_right,
        "memcnn: expected '",
        branch.name(),
        "' to run in backward the operators that it ran in forward, ",
        number < calls_.size() ? described(calls_[number], branch)
                               : std::string("none any more"),
        " as number ",
        number,
        " of its convolutions, products and attention, but got ",
        described(noted(call), branch),
        kAdvice);
  }

  void check_count(size_t count, const torch::nn::Module& branch) const {
    TORCH_CHECK(
        count >= calls_.size(),
        "memcnn: expected '",
        branch.name(),
        "' to run in backward the operators that it ran in forward, ",
        calls_.size(),
        " convolutions, products and attentions, but got ",
        count,
        ", without ",
        described(calls_[std::min(count, calls_.size() - 1)], branch),
        kAdvice);
  }

  /// "aten::mm (sizes [3, 4], Float, cpu; 'weight', sizes [4, 5], Float, cpu)"
  static std::string described(
      const DearCall& call,
      const torch::nn::Module& branch) {
    std::string words;
    for (const auto& argument : call.arguments) {
      if (argument) {
        words += (words.empty() ? "" : "; ") +
            name_of_parameter(argument->parameter, branch) +
            describe(argument->meta);
      }
    }
    return call.op.operator_name().name + " (" + words + ")";
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

  static constexpr const char* kAdvice =
      ". It depends on something that is neither its argument nor a registered "
      "parameter or buffer, or on whether a graph is recorded: debug(true) "
      "compares its values, memory_budget(0) runs all again.";

  std::unordered_set<const void*> parameters_; // by their memory
  std::vector<DearCall> calls_;
};

} // namespace memcnn::detail
