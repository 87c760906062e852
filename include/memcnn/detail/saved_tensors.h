// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/describe.h>
#include <memcnn/detail/held_bytes.h>
#include <memcnn/detail/operator_watch.h>
#include <memcnn/detail/saved.h>
#include <memcnn/detail/saving_hooks.h>
#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace memcnn::detail {

// Note [Early stop]
// ~~~~~~~~~~~~~~~~~
// What runs again in checkpoint() ends when the last tensor that backward needs
// is there: operators after it, and the one that saves it as its argument, do
// not run. A block that ends in a convolution computes it once.
//
// 1. The first run builds a graph, whose operators save their tensors as always;
//    but each of these is let go at once. The second run saves the same tensors
//    in the same order, is left when the last one is there, and the first run's
//    graph goes backward with them.
// 2. Memory is that of a full second run: between the runs no tensor is held but
//    the inputs, and in backward each one goes when its operator is done.
// 3. An operator that saves a tensor and then writes it, as RReLU does with its
//    random slopes, has to end: a module with such a one runs again as a whole.
// 4. What the module wrote and drew until the stop has to be what it wrote and
//    drew until then in forward; it is left as found, as after a whole run.
// 5. A tensor saved in backward is like the one saved in forward in its place,
//    and none is missing, or backward stops: sizes, dtype and device are
//    compared.
// 6. Where forward was differentiated with create_graph, parts of it save memory
//    themselves, or it has other trained parameters by now, all runs again.
// 7. Of dear operators (Note [Kept results]) the second run calls those after
//    which forward saved a tensor: results of others are not kept.

/// Said where another backward pass than the module's own meets its graph.
inline constexpr const char* kForeignBackward =
    "memcnn: expected backward to come from the outputs of the module in "
    "checkpoint(), but got a backward pass inside of forward, or from a tensor "
    "that forward keeps in a member, such as a loss. Return that tensor from "
    "forward; for a backward pass inside of forward set early_stop(false).";

/// What the operators of one run save for backward: which tensors, in which
/// order, and the tensors themselves where they are not let go.
class SavedTensors final : public TensorSaver {
 public:
  /// Keeps what the first run saves, until it is dropped, and counts it here.
  void keep(std::shared_ptr<HeldBytes> held) {
    kept_ = std::move(held);
  }

  /// The first run. Tensors are let go, or kept; `on_save` is told after each.
  template <class Fn>
  auto note(const Fn& call, std::function<void()> on_save) {
    SavingEngine::install();
    on_save_ = std::move(on_save);
    const Scope scope(*this, Run::kFirst);
    return call();
  }

  /// A second run: provides the tensors, and ends with the last one if it may,
  /// as `on_stop` is told before.
  template <class Fn>
  void fill(const Fn& call, std::function<void()> on_stop) {
    next_ = 0;
    on_save_ = std::move(on_stop);
    try {
      const Scope scope(*this, Run::kSecond);
      call();
    } catch (const Stop&) {
    }
    TORCH_CHECK(
        next_ >= entries_.size(),
        "memcnn: expected the module to save in backward the ",
        entries_.size(),
        " tensors that it saved in forward, but got ",
        next_,
        ". It depends on something that is neither its argument nor a "
        "registered parameter or buffer: debug(true) compares its values.");
  }

  /// Whether backward finds all tensors as they were saved.
  bool are_there() const {
    return std::all_of(
        entries_.begin(), entries_.end(), [](const Entry& entry) {
          const auto slot = entry.slot.lock();
          return !slot || (slot->tensor.defined() && slot->tensor.unchanged());
        });
  }

  /// Lets all tensors go, and those that come.
  void drop() {
    kept_.reset();
    for (const Entry& entry : entries_) {
      if (const auto slot = entry.slot.lock()) {
        slot->share = {};
        slot->tensor = Saved();
      }
    }
  }

  /// Whether a module in the first run would have saved memory itself.
  bool is_around_another() const {
    return is_around_another_;
  }

  /// Whether a second run ends before the first one did.
  bool may_stop() const {
    return may_stop_ && !is_around_another_;
  }

  /// Whether this thread is in a run whose tensors are provided twice: what
  /// saves memory itself then runs plainly.
  static bool are_dropped_here() {
    auto* saver = dynamic_cast<SavedTensors*>(TensorSaver::current());
    if (saver != nullptr) {
      saver->is_around_another_ = true;
    }
    return saver != nullptr;
  }

  std::unique_ptr<torch::autograd::SavedVariableHooks> next_hooks() override {
    return std::make_unique<Hooks>(*this);
  }

 private:
  enum class Run { kFirst, kSecond };

  /// Leaves a second run. It is no std::exception: what forward catches of
  /// these is another matter.
  struct Stop {};

  /// The place of one tensor, which the operator that needs it owns.
  struct Slot {
    Saved tensor;
    HeldBytes::Share share; // while it is kept
  };

  struct Entry {
    TensorMeta meta;
    std::weak_ptr<Slot> slot;
  };

  class Hooks final : public torch::autograd::SavedVariableHooks {
   public:
    explicit Hooks(SavedTensors& saver) : saver_(saver) {}

    void call_pack_hook(const at::Tensor& tensor) override {
      slot_ = saver_.save(tensor);
    }

    at::Tensor call_unpack_hook() override {
      TORCH_CHECK(slot_->tensor.defined(), kForeignBackward);
      TORCH_CHECK(
          slot_->tensor.unchanged(),
          "memcnn: expected what an operator saved for backward to be "
          "unchanged, but got a tensor that was modified in place (",
          describe(slot_->tensor.get()),
          "). Use the out-of-place form of the operation after it.");
      return slot_->tensor.get();
    }

   private:
    SavedTensors& saver_; // while the run lasts
    std::shared_ptr<Slot> slot_;
  };

  /// While it lives, operators of this thread save here.
  class Scope {
   public:
    Scope(SavedTensors& saver, Run run)
        : saver_(saver), outer_(TensorSaver::current()) {
      saver.run_ = run;
      TensorSaver::current() = &saver;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    ~Scope() {
      TensorSaver::current() = outer_;
      saver_.on_save_ = nullptr;
    }

   private:
    SavedTensors& saver_;
    TensorSaver* outer_;
  };

  std::shared_ptr<Slot> save(const at::Tensor& tensor) {
    return run_ == Run::kFirst ? note_next(tensor) : fill_next(tensor);
  }

  std::shared_ptr<Slot> note_next(const at::Tensor& tensor) {
    auto slot = std::make_shared<Slot>();
    entries_.push_back({TensorMeta(tensor), slot});
    may_stop_ = may_stop_ && !OperatorWatch::is_to_be_written(tensor);
    if (kept_) {
      slot->tensor = Saved(detached(tensor));
      slot->share = kept_->count(slot->tensor.get());
    }
    on_save_();
    return slot;
  }

  std::shared_ptr<Slot> fill_next(const at::Tensor& tensor) {
    const size_t i = next_++;
    std::shared_ptr<Slot> slot;
    if (i < entries_.size()) {
      check_alike(i, tensor);
      slot = entries_[i].slot.lock();
    }
    if (slot == nullptr) { // of an operator that backward does not reach
      slot = std::make_shared<Slot>();
    }
    slot->tensor = Saved(detached(tensor));
    if (next_ == entries_.size() && may_stop_) {
      on_save_();
      throw Stop();
    }
    return slot;
  }

  void check_alike(size_t i, const at::Tensor& tensor) const {
    TORCH_CHECK(
        entries_[i].meta.fits(tensor),
        "memcnn: expected the module to save in backward the tensors "
        "that it saved in forward, but got ",
        describe(tensor),
        " in place of ",
        describe(entries_[i].meta),
        ". It depends on something that is neither its argument nor a "
        "registered parameter or buffer: debug(true) compares its values.");
  }

  std::vector<Entry> entries_;
  std::function<void()> on_save_;
  Run run_ = Run::kFirst;
  size_t next_ = 0;
  bool is_around_another_ = false;
  bool may_stop_ = true;
  std::shared_ptr<HeldBytes> kept_; // null where tensors are let go
};

} // namespace memcnn::detail
