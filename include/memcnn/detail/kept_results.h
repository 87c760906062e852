// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/dear_call.h>
#include <memcnn/detail/operator_handler.h>
#include <memcnn/detail/parts.h>
#include <memcnn/detail/tensors.h>

#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
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
// 2. A kept result shares its memory with what the branch got. On a CPU, until
//    one of them is written in place, as ReLU(inplace) does: the writer then gets
//    memory of its own (copy on write). On other devices a result that the branch
//    wrote is none any more, and the operator runs again.
// 3. The second run calls the same dear operators as the first, in the same
//    order, with arguments of the same sizes, dtypes and devices, and with the
//    same parameters, or backward stops. Other operators may differ. Of which
//    operators products and attention consist depends on whether a graph is
//    recorded, as LibTorch chooses: those that the first run did not call, in
//    the place of some that it did, run, and so do all products of activations
//    from there to the next call that tells its place by a parameter. Under
//    autocast parameters are cast, and not told apart.
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
 public:
  explicit KeptResults(const torch::nn::Module& branch) {
    for_each_parameter(branch, [&](const at::Tensor& parameter) {
      parameters_.insert(memory_of(parameter));
    });
  }

  /// While it lives, a run of the branch, whose dear calls are taken.
  class Run : public OperatorHandler {
   protected:
    ~Run() = default;

    virtual void take(const Call& call) = 0;

   private:
    void handle(const Call& call) final {
      if (!call.dear.is_dear(call.arguments())) {
        run(call);
        return;
      }
      if (const auto position = call.dear.asks_for_backward) {
        torch::jit::peek(call.stack, *position, call.arguments().size()) = true;
      }
      take(call);
    }
  };

  /// The first run.
  class FirstRun final : public Run {
   public:
    FirstRun(KeptResults& results, ResultKeeper& keeper)
        : results_(results), keeper_(keeper) {}

   private:
    void take(const Call& call) override {
      DearCall noted(call, results_.parameters_);
      const bool keep = keeper_.keeps_next();
      const DearCall::Values arguments = call.arguments().vec();
      run(call);
      noted.set_results(call, arguments, keep);
      results_.calls_.push_back(std::move(noted));
      keeper_.add(results_.shared_from_this(), results_.calls_.size() - 1);
    }

    KeptResults& results_;
    ResultKeeper& keeper_;
  };

  /// A second run; if it releases, results are let go as they are taken.
  class SecondRun final : public Run {
   public:
    SecondRun(
        KeptResults& results,
        const torch::nn::Module& branch,
        bool release)
        : results_(results), branch_(branch), release_(release) {}

    /// It has come to its end.
    void end() {
      skip_other_forms([](const DearCall& /*noted*/) { return false; });
      check_count();
    }

   private:
    void take(const Call& call) override {
      DearCall* noted = repeated(call);
      DearCall::Values results =
          noted ? noted->results_for(call, release_) : DearCall::Values();
      if (results.empty()) {
        run(call);
        return;
      }
      torch::jit::drop(call.stack, call.arguments().size());
      for (c10::IValue& result : results) {
        call.stack.push_back(std::move(result));
      }
    }

    /// The call of the first run that this one repeats; null where it is another
    /// form of some (rule 3).
    DearCall* repeated(const Call& call) {
      if (!is_other_form_ && next_fits(call)) {
        return &results_.calls_[next_++];
      }
      const DearCall found(call, results_.parameters_);
      // Which of the products of activations it would be cannot be told.
      if (is_other_form_ &&
          (found.uses_parameter() || !found.has_other_forms())) {
        skip_other_forms(
            [&](const DearCall& noted) { return noted.fits(call); });
        if (next_fits(call)) {
          is_other_form_ = false;
          others_ = 0;
          return &results_.calls_[next_++];
        }
      }
      check_other_form(found, call);
      is_other_form_ = true;
      ++others_;
      return nullptr;
    }

    bool next_fits(const Call& call) const {
      const auto& calls = results_.calls_;
      return next_ < calls.size() && calls[next_].fits(call);
    }

    /// Calls of the first run in whose place others ran, up to one that `ends`
    /// it. Of those with a parameter no more than of the others, which may have
    /// got a copy of it.
    template <class Ends>
    void skip_other_forms(const Ends& ends) {
      const auto& calls = results_.calls_;
      size_t weights = others_;
      for (size_t i = next_; is_other_form_ && i <= calls.size(); ++i) {
        if (i == calls.size() || ends(calls[i]) ||
            !calls[i].has_other_forms() ||
            (calls[i].uses_parameter() && weights-- == 0)) {
          next_ = i;
          return;
        }
      }
    }

    void check_other_form(const DearCall& found, const Call& call) const {
      const auto& calls = results_.calls_;
      const bool has_next = next_ < calls.size();
      const bool is_other_form = is_other_form_
          ? found.has_other_forms()
          : has_next && calls[next_].may_become(call);
      const auto fits = [&](const DearCall& noted) {
        return noted.fits(call);
      };
      TORCH_CHECK(
          is_other_form &&
              !(found.uses_parameter() &&
                std::any_of(calls.begin(), calls.end(), fits)),
          "memcnn: expected '",
          branch_.name(),
          "' to run in backward the operators that it ran in forward, ",
          has_next ? calls[next_].described(branch_)
                   : std::string("none any more"),
          " as number ",
          next_,
          " of its convolutions, products and attention, but got ",
          found.described(branch_),
          kAdvice);
    }

    void check_count() const {
      const auto& calls = results_.calls_;
      TORCH_CHECK(
          next_ >= calls.size(),
          "memcnn: expected '",
          branch_.name(),
          "' to run in backward the operators that it ran in forward, ",
          calls.size(),
          " convolutions, products and attentions, but got ",
          next_,
          ", without ",
          calls[(std::min)(next_, calls.size() - 1)].described(branch_),
          kAdvice);
    }

    static constexpr const char* kAdvice =
        ". It depends on something that is neither its argument nor a "
        "registered parameter or buffer, or on whether a graph is recorded: "
        "debug(true) compares its values, memory_budget(0) runs all again.";

    KeptResults& results_;
    const torch::nn::Module& branch_;
    bool release_;
    size_t next_ = 0;
    bool is_other_form_ = false; // the last call, of some from the next one on
    size_t others_ = 0; // how many these were
  };

  /// Whether the result of a call was kept and not given up since.
  bool keeps(size_t call) const {
    return calls_[call].is_kept();
  }

  /// The multiply-adds of a call.
  double multiply_adds_of(size_t call) const {
    return calls_[call].multiply_adds();
  }

  /// The bytes of the result of a call.
  int64_t bytes_of(size_t call) const {
    return calls_[call].bytes();
  }

  /// The kept result of a call: several tensors, where it returns several.
  Tensors results_of(size_t call) const {
    return calls_[call].tensors();
  }

  /// The result of a call is not to be kept, in other runs neither. Returns its
  /// bytes.
  int64_t give_up(size_t call) {
    calls_[call].give_up();
    return calls_[call].bytes();
  }

  /// Lets the kept result of a call go where nobody else holds its memory;
  /// returns its bytes if so.
  int64_t let_go_unshared(size_t call) {
    if (!calls_[call].is_alone()) {
      return 0;
    }
    calls_[call].let_go();
    return calls_[call].bytes();
  }

  /// Lets all results go.
  void let_go() {
    for (DearCall& call : calls_) {
      call.let_go();
    }
  }

 private:
  ParameterMemories parameters_;
  std::vector<DearCall> calls_;
};

} // namespace memcnn::detail
