// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/capture.h>
#include <memcnn/detail/in_destructor.h>

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// Held for the length of one draw in a branch, with a look at the generator
/// before and after, and where a generator is put back: threads that do either
/// wait for each other, so that a look tells from where a draw went on.
inline std::recursive_mutex& draw_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

/// The states of the default generators that a module on one device can draw
/// from: the CPU's and, where the module runs elsewhere, that device's.
///
/// Memory:   5,056 bytes for the CPU, 16 bytes for each CUDA device, host memory.
class GeneratorState {
 public:
  /// Stops where a capture shuts the device's generator (Note [Graph capture],
  /// rule 2).
  static void check_readable(at::Device device) {
    TORCH_CHECK(
        is_readable(device),
        "memcnn: expected a LibTorch whose random numbers can be replayed in a "
        "capture, which is 2.10 or later, but got ",
        TORCH_VERSION,
        " in ",
        describe_capture(capture_of(device)),
        " of ",
        device,
        ". Set preserve_rng_state(false) where no branch draws, or run eagerly.");
  }

  /// Reads the states as they are now, but for one that cannot be read.
  static GeneratorState now(at::Device device) {
    GeneratorState state;
    state.add(at::Device(at::kCPU));
    // Asking for a generator initialises its device; a tensor that lives
    // there has done so already, a meta tensor draws nothing.
    if (!device.is_cpu() && !device.is_meta()) {
      state.add(device);
    }
    return state;
  }

  /// Makes the default generators continue from these states.
  void restore() const {
    const std::lock_guard<std::recursive_mutex> no_draws(draw_mutex());
    for (const auto& [generator, state] : states_) {
      at::Generator handle = generator;
      const std::lock_guard<std::mutex> lock(handle.mutex());
      handle.set_state(state);
    }
  }

  /// A number that tells states apart, where keeping one costs too much.
  uint64_t hash() const {
    uint64_t result = 0;
    for (const auto& [generator, state] : states_) {
      const std::string_view bytes(
          static_cast<const char*>(state.const_data_ptr()), state.nbytes());
      result = result * 31 + std::hash<std::string_view>()(bytes);
    }
    return result;
  }

  /// Whether nothing was drawn since: both hold the same bytes.
  bool operator==(const GeneratorState& other) const {
    if (states_.size() != other.states_.size()) {
      return false;
    }
    for (size_t i = 0; i < states_.size(); ++i) {
      const at::Tensor& a = states_[i].second;
      const at::Tensor& b = other.states_[i].second;
      if (a.nbytes() != b.nbytes() ||
          std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) !=
              0) {
        return false;
      }
    }
    return true;
  }

 private:
  static bool is_readable(at::Device device) {
    return capture_facts().generators_are_open || capture_of(device) == 0;
  }

  void add(at::Device device) {
    if (!is_readable(device)) {
      return;
    }
    at::Generator generator = at::globalContext().defaultGenerator(device);
    // Operators take the same mutex, so it is held for the read only.
    const std::lock_guard<std::mutex> lock(generator.mutex());
    at::Tensor state = generator.get_state();
    states_.emplace_back(generator, std::move(state));
  }

  std::vector<std::pair<at::Generator, at::Tensor>> states_;
};

/// Leaves the caller's generators as it found them.
class GeneratorGuard {
 public:
  explicit GeneratorGuard(at::Device device)
      : found_(GeneratorState::now(device)) {}
  GeneratorGuard(const GeneratorGuard&) = delete;
  GeneratorGuard& operator=(const GeneratorGuard&) = delete;
  ~GeneratorGuard() {
    in_destructor([&] { found_.restore(); });
  }

 private:
  GeneratorState found_;
};

} // namespace memcnn::detail
