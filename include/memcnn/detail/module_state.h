// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/in_destructor.h>

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/instancenorm.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// The running statistics of a normalisation layer, or null for other modules.
///
/// While such a layer trains it writes them and never reads them, so that a
/// recomputation can do without them.
using RunningStatistics = std::array<at::Tensor*, 3>;

template <typename Norm>
bool find_statistics(torch::nn::Module& module, RunningStatistics& found) {
  auto* norm = dynamic_cast<Norm*>(&module);
  if (norm != nullptr) {
    found = {
        &norm->running_mean, &norm->running_var, &norm->num_batches_tracked};
  }
  return norm != nullptr;
}

inline bool find_running_statistics(
    torch::nn::Module& module,
    RunningStatistics& found) {
  return find_statistics<torch::nn::BatchNorm2dImpl>(module, found) ||
      find_statistics<torch::nn::BatchNorm1dImpl>(module, found) ||
      find_statistics<torch::nn::BatchNorm3dImpl>(module, found) ||
      find_statistics<torch::nn::InstanceNorm2dImpl>(module, found) ||
      find_statistics<torch::nn::InstanceNorm1dImpl>(module, found) ||
      find_statistics<torch::nn::InstanceNorm3dImpl>(module, found);
}

/// The buffers of one part (not of its children) that matter to a run in the
/// given mode: all but running statistics that are only written.
inline std::vector<at::Tensor> relevant_buffers(
    torch::nn::Module& part,
    bool training) {
  RunningStatistics unused{};
  std::vector<at::Tensor> relevant;
  if (training && find_running_statistics(part, unused)) {
    return relevant;
  }
  for (const at::Tensor& buffer : part.buffers(/*recurse=*/false)) {
    if (buffer.defined()) {
      relevant.push_back(buffer);
    }
  }
  return relevant;
}

/// Overwrites a buffer without moving its version counter: what autograd saved
/// of it stays valid.
inline void overwrite(const at::Tensor& buffer, const at::Tensor& value) {
  const at::NoGradGuard no_grad;
  buffer.variable_data().copy_(value);
}

/// What a module reads besides its arguments: the train or eval mode of each of
/// its parts, and their buffers.
///
/// Memory:   a copy of those buffers only that the run itself changed, running
///   statistics of normalisation layers excepted: these need none.
class ModuleState {
 public:
  /// Call before the module runs ...
  explicit ModuleState(torch::nn::Module& module) {
    for (const auto& part : module.modules()) {
      const bool training = part->is_training();
      training_.push_back(training);
      for (const at::Tensor& buffer : relevant_buffers(*part, training)) {
        // Nothing changes buffers in eval mode: there the version suffices.
        at::Tensor before = training ? buffer.detach().clone() : at::Tensor();
        buffers_.push_back({buffer, std::move(before), version(buffer)});
      }
    }
  }

  /// ... and this one after: copies of unchanged buffers are let go.
  void note_changes() {
    for (Buffer& entry : buffers_) {
      const bool changed = version(entry.buffer) != entry.version;
      TORCH_CHECK(
          !changed || entry.before.defined(),
          "memcnn: expected a module in eval mode to leave its buffers alone, "
          "but got a change of a buffer of sizes ",
          entry.buffer.sizes(),
          " in forward. Set the module to train mode, or use plain autograd.");
      if (!changed) {
        entry.before = at::Tensor();
      }
      entry.version = version(entry.buffer);
    }
  }

 private:
  friend class ModuleStateGuard;

  struct Buffer {
    at::Tensor buffer;
    at::Tensor before; // defined where the run changed the buffer
    uint32_t version;
  };

  static uint32_t version(const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->version_counter().current_version();
  }

  std::vector<bool> training_;
  std::vector<Buffer> buffers_;
};

/// Puts a module into a recorded state, and back into the found one at the end:
/// what runs in between sees what forward saw and changes no buffer
/// (Note [Recomputation], rules 1 and 2).
class ModuleStateGuard {
 public:
  ModuleStateGuard(torch::nn::Module& module, const ModuleState& recorded)
      : parts_(module.modules()) {
    TORCH_CHECK(
        parts_.size() == recorded.training_.size(),
        "memcnn: expected module '",
        module.name(),
        "' to keep its ",
        recorded.training_.size(),
        " parts between forward and backward, but got ",
        parts_.size(),
        ". Add or remove children before forward or after backward.");
    check_versions(recorded);
    for (size_t i = 0; i < parts_.size(); ++i) {
      found_training_.push_back(parts_[i]->is_training());
      // The run may change other buffers than forward did: all are put back.
      for (const at::Tensor& buffer :
           relevant_buffers(*parts_[i], recorded.training_[i])) {
        found_buffers_.emplace_back(buffer, buffer.detach().clone());
      }
    }
    try {
      for (const ModuleState::Buffer& entry : recorded.buffers_) {
        if (entry.before.defined()) {
          overwrite(entry.buffer, entry.before);
        }
      }
      set_modes(recorded.training_);
      set_statistics_aside();
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

 private:
  void restore() {
    for (auto& [statistic, value] : statistics_aside_) {
      *statistic = std::move(value);
    }
    set_modes(found_training_);
    in_destructor([&] {
      for (auto& [buffer, value] : found_buffers_) {
        overwrite(buffer, value);
      }
    });
  }

  static void check_versions(const ModuleState& recorded) {
    for (const ModuleState::Buffer& entry : recorded.buffers_) {
      TORCH_CHECK(
          entry.before.defined() ||
              entry.version == ModuleState::version(entry.buffer),
          "memcnn: expected the buffers that forward read to be unchanged in "
          "backward, but got a buffer of sizes ",
          entry.buffer.sizes(),
          " that was modified in between. Run backward first.");
    }
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

  void set_statistics_aside() {
    for (const auto& part : parts_) {
      RunningStatistics statistics{};
      if (part->is_training() && find_running_statistics(*part, statistics)) {
        for (at::Tensor* statistic : statistics) {
          statistics_aside_.emplace_back(statistic, std::move(*statistic));
          *statistic = at::Tensor();
        }
      }
    }
  }

  std::vector<std::shared_ptr<torch::nn::Module>> parts_;
  std::vector<bool> found_training_;
  std::vector<std::pair<at::Tensor, at::Tensor>> found_buffers_;
  std::vector<std::pair<at::Tensor*, at::Tensor>> statistics_aside_;
};

} // namespace memcnn::detail
