// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/in_destructor.h>
#include <memcnn/detail/norm_statistics.h>
#include <memcnn/detail/only_computes.h>
#include <memcnn/detail/operator_watch.h>
#include <memcnn/detail/parts.h>
#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// Gives a tensor a value that it had, and the version that it had with it:
/// what autograd saved of it then is valid again.
inline void
rewind(const at::Tensor& tensor, const at::Tensor& value, uint32_t version) {
  const at::NoGradGuard no_grad;
  // What is not strided is replaced as a whole, which an alias would not show.
  if (tensor.layout() == at::kStrided) {
    tensor.variable_data().copy_(value);
  } else {
    at::Tensor(tensor).copy_(value);
  }
  if (!tensor.is_inference()) {
    c10::VariableVersion counter =
        tensor.unsafeGetTensorImpl()->version_counter();
    counter.set_version(version);
  }
}

/// A tensor that is to be put back as it was found.
struct Found {
  at::Tensor tensor;
  at::Tensor value;
  uint32_t version;
};

/// Stops where a parameter or buffer that a run read has been written since.
inline void check_read(
    bool unchanged,
    const std::string& name,
    const at::Tensor& tensor,
    const torch::nn::Module& module) {
  TORCH_CHECK(
      unchanged,
      "memcnn: expected the parameters and buffers that forward read to be "
      "unchanged in backward, but got a change of '",
      name,
      "' (sizes ",
      tensor.sizes(),
      ") of module '",
      module.name(),
      "'. Run backward first, or change it out of place.");
}

/// Stops where it has other memory since.
inline void check_keeps_memory(bool keeps, const std::string& name) {
  TORCH_CHECK(
      keeps,
      "memcnn: expected '",
      name,
      "' to keep its memory from forward to backward, but got other memory by "
      "set_data() or set_(). Write to it in place, by copy_().");
}

/// What a module reads besides its arguments, and writes besides its result:
/// the train or eval mode of each of its parts, its parameters and its buffers.
///
/// Memory:   a copy of those parameters and buffers only that the run itself
///   wrote.
class ModuleState {
 public:
  /// The module as it is before a run ...
  explicit ModuleState(torch::nn::Module& module) : module_(&module) {
    // One that is registered twice is noted twice, which does no harm.
    const auto add = [&](const RegisteredTensors& items) {
      for (const auto& item : items) {
        if (item.value().defined()) {
          tensors_.emplace_back(item.key(), item.value());
        }
      }
    };
    for_each_part(module, [&](torch::nn::Module& part) {
      training_.push_back(part.is_training());
      if (!only_computes(part)) {
        operators_ = Operators::kAny;
      }
      add(parameters_in(part));
      if (!only_writes_its_buffers(part)) {
        add(buffers_in(part));
      }
    });
  }

  /// ... and `call`, the run, after which it is known what it wrote.
  /// `keep_after` keeps what it left, too.
  template <class Fn>
  auto run(Fn& call, at::Device device, bool keep_after) {
    OperatorWatch watch(tensors(), device, operators_);
    watch_ = &watch;
    auto value = call();
    watch_ = nullptr;
    draws_ = watch.draws();
    check_same_tensors(*module_);
    for (size_t i = 0; i < tensors_.size(); ++i) {
      Entry& entry = tensors_[i];
      entry.before = watch.take_before(i);
      entry.version_after = version_of(entry.tensor);
      TORCH_CHECK(
          entry.before.defined() || entry.version_after == entry.version_before,
          "memcnn: expected operators of this thread to write '",
          entry.name,
          "' (sizes ",
          entry.tensor.sizes(),
          ") while its module runs, but got a write by something else. Write "
          "it in the module's forward, or between two steps.");
      check_same_memory(entry);
      if (keep_after && entry.before.defined()) {
        entry.after = entry.tensor.detach().clone();
      }
    }
    return value;
  }

  /// While that run lasts: another one may be left where it is now.
  void note_stop() {
    draws_at_stop_ = watch_->draws();
    for (Entry& entry : tensors_) {
      entry.version_at_stop = version_of(entry.tensor);
    }
  }

  /// The draws of that run (OperatorWatch::draws()).
  std::optional<uint64_t> draws() const {
    return draws_;
  }

 private:
  friend class ModuleStateGuard;

  /// A parameter or buffer that the run may read.
  struct Entry {
    Entry(std::string name_, at::Tensor tensor_)
        : name(std::move(name_)),
          tensor(std::move(tensor_)),
          memory(tensor),
          version_before(version_of(tensor)),
          version_at_stop(version_before),
          version_after(version_before) {}

    std::string name; // for messages
    at::Tensor tensor;
    NotedMemory memory;
    uint32_t version_before;
    uint32_t version_at_stop; // at the last of these
    uint32_t version_after;
    at::Tensor before; // defined where the run wrote the tensor
    at::Tensor after; // likewise, where that is asked for
  };

  bool wrote_something() const {
    return std::any_of(
        tensors_.begin(), tensors_.end(), [](const Entry& entry) {
          return entry.before.defined();
        });
  }

  Tensors tensors() const {
    Tensors result;
    for (const Entry& entry : tensors_) {
      result.push_back(entry.tensor);
    }
    return result;
  }

  static void check_same_memory(const Entry& entry) {
    check_keeps_memory(entry.memory.is_of(entry.tensor), entry.name);
  }

  /// Stops where tensors were replaced since the constructor. New buffers are
  /// no matter: the second run finds them.
  void check_same_tensors(const torch::nn::Module& module) const {
    // What nobody replaced is met again in the same order.
    auto next = tensors_.begin();
    any_registered(module, [&](const at::Tensor& tensor) {
      next += next != tensors_.end() && tensor.is_same(next->tensor);
      return next == tensors_.end();
    });
    for (; next != tensors_.end(); ++next) {
      const Entry& entry = *next;
      TORCH_CHECK(
          any_registered(
              module,
              [&](const at::Tensor& tensor) {
                return tensor.is_same(entry.tensor);
              }),
          "memcnn: expected '",
          entry.name,
          "' (sizes ",
          entry.tensor.sizes(),
          ") to stay registered from forward to backward, but got another "
          "tensor in its place. Write to it in place, by copy_().");
    }
  }

  template <class Fn>
  static bool any_registered(const torch::nn::Module& module, const Fn& test) {
    return any_part(module, [&](const torch::nn::Module& part) {
      return any_tensor(parameters_in(part), test) ||
          any_tensor(buffers_in(part), test);
    });
  }

  torch::nn::Module* module_;
  std::vector<bool> training_;
  Operators operators_ = Operators::kThatOnlyCompute;
  std::vector<Entry> tensors_;
  std::optional<uint64_t> draws_;
  std::optional<uint64_t> draws_at_stop_;
  const OperatorWatch* watch_ = nullptr; // while the run lasts
};

/// Puts a module into the state that it had before a recorded run, or after it,
/// and back into the found one at the end: what runs in between sees what
/// forward saw and leaves nothing changed (Note [Recomputation], rules 1 to 3).
class ModuleStateGuard {
 public:
  enum class Moment { kBefore, kAfter };

  ModuleStateGuard(
      torch::nn::Module& module,
      const ModuleState& recorded,
      Moment moment)
      : module_(module),
        recorded_(recorded),
        moment_(moment),
        parts_(parts_of(module)) {
    TORCH_CHECK(
        parts_.size() == recorded.training_.size(),
        "memcnn: expected module '",
        module.name(),
        "' to keep its ",
        recorded.training_.size(),
        " parts between forward and backward, but got ",
        parts_.size(),
        ". Add or remove children before forward or after backward.");
    recorded.check_same_tensors(module);
    check_unchanged();
    for (const auto& part : parts_) {
      found_training_.push_back(part->is_training());
    }
    try {
      // All are noted before one is set: they may be views of one memory.
      std::vector<const ModuleState::Entry*> to_set;
      for (const auto& entry : recorded.tensors_) {
        if (entry.before.defined() && note_found(entry)) {
          to_set.push_back(&entry);
        }
      }
      for (const ModuleState::Entry* entry : to_set) {
        set_to_moment(*entry);
      }
      set_modes(recorded.training_);
    } catch (...) {
      restore();
      throw;
    }
  }
  ModuleStateGuard(const ModuleStateGuard&) = delete;
  ModuleStateGuard& operator=(const ModuleStateGuard&) = delete;

  ~ModuleStateGuard() {
    restore();
  }

  /// Runs `call` in that state.
  template <class Fn>
  auto run(Fn& call, at::Device device) {
    // Where the recorded run wrote nothing, a write is an error anyway.
    std::optional<OperatorWatch> watch;
    if (moment_ == Moment::kAfter || recorded_.wrote_something() ||
        recorded_.draws()) {
      watch.emplace(recorded_.tensors(), device, recorded_.operators_);
    }
    watch_ = watch ? &*watch : nullptr;
    is_stopped_ = false;
    const StatisticsStill still(parts_);
    try {
      auto value = call();
      note_writes(watch);
      if (!is_stopped_) {
        note_end();
      }
      return value;
    } catch (...) {
      note_writes(watch);
      throw;
    }
  }

  /// While a run lasts: it is left now, where the recorded one could be.
  void note_stop() {
    is_stopped_ = true;
    note_end();
  }

  bool is_stopped() const {
    return is_stopped_;
  }

  /// Whether the last run drew, up to its end, what the recorded one drew.
  bool draws_as_recorded() const {
    return draws_ ==
        (is_stopped_ ? recorded_.draws_at_stop_ : recorded_.draws_);
  }

 private:
  void note_end() {
    draws_ = watch_ != nullptr ? watch_->draws() : std::nullopt;
    check_writes();
  }

  void check_unchanged() const {
    for (const auto& entry : recorded_.tensors_) {
      ModuleState::check_same_memory(entry);
      check_read(
          entry.before.defined() ||
              entry.version_after == version_of(entry.tensor),
          entry.name,
          entry.tensor,
          module_);
    }
  }

  /// Returns whether the tensor has to be set; then its value is kept.
  bool note_found(const ModuleState::Entry& entry) {
    const at::Tensor& tensor = entry.tensor;
    TORCH_CHECK(
        tensor.sizes() == entry.before.sizes(),
        "memcnn: expected '",
        entry.name,
        "' to keep its sizes ",
        entry.before.sizes(),
        " between forward and backward, but got ",
        tensor.sizes(),
        ". Resize it before forward or after backward.");
    const uint32_t version = version_of(tensor);
    const bool counted = entry.version_after != entry.version_before;
    if (moment_ == Moment::kAfter && counted &&
        version == entry.version_after) {
      return false; // it is as the run left it
    }
    found_.push_back({tensor, tensor.detach().clone(), version});
    return true;
  }

  void set_to_moment(const ModuleState::Entry& entry) const {
    const at::Tensor& tensor = entry.tensor;
    if (moment_ == Moment::kAfter) {
      rewind(tensor, entry.after, entry.version_after);
    } else {
      rewind(tensor, entry.before, entry.version_before);
    }
  }

  /// What the run wrote, and its recording did not, is put back, too.
  void note_writes(std::optional<OperatorWatch>& watch) {
    for (size_t i = 0; watch && i < recorded_.tensors_.size(); ++i) {
      const auto& entry = recorded_.tensors_[i];
      at::Tensor before = watch->take_before(i);
      const bool known =
          std::any_of(found_.begin(), found_.end(), [&](const Found& found) {
            return found.tensor.is_same(entry.tensor);
          });
      if (before.defined() && !known) {
        found_.push_back(
            {entry.tensor, std::move(before), entry.version_after});
      }
    }
  }

  /// The run that was recorded has to write again what it wrote.
  void check_writes() const {
    for (const auto& entry : recorded_.tensors_) {
      TORCH_CHECK(
          moment_ == Moment::kAfter ||
              version_of(entry.tensor) ==
                  (is_stopped_ ? entry.version_at_stop : entry.version_after),
          "memcnn: expected '",
          module_.name(),
          "' to write in backward what it wrote in forward, but got other "
          "writes of '",
          entry.name,
          "' (sizes ",
          entry.tensor.sizes(),
          "). Keep in a registered buffer what decides whether it writes.");
    }
  }

  void restore() {
    set_modes(found_training_);
    in_destructor([&] {
      for (auto found = found_.rbegin(); found != found_.rend(); ++found) {
        rewind(found->tensor, found->value, found->version);
      }
    });
  }

  /// train() sets a module and all below it; in the order of modules() each
  /// part comes after those above it, so that the last word is its own.
  void set_modes(const std::vector<bool>& training) {
    for (size_t i = 0; i < parts_.size(); ++i) {
      if (parts_[i]->is_training() != training[i]) {
        for (size_t j = 0; j < parts_.size(); ++j) {
          parts_[j]->train(training[j]);
        }
        return;
      }
    }
  }

  torch::nn::Module& module_;
  const ModuleState& recorded_;
  Moment moment_;
  std::vector<std::shared_ptr<torch::nn::Module>> parts_;
  std::vector<bool> found_training_;
  std::vector<Found> found_;
  const OperatorWatch* watch_ = nullptr; // of a run, while it lasts
  bool is_stopped_ = false;
  std::optional<uint64_t> draws_;
};

} // namespace memcnn::detail
