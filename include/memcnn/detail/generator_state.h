// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/capture.h>
#include <memcnn/detail/in_destructor.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/MT19937RNGEngine.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/hash.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
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

/// The state of the CPU's default generator, read where it lies: get_state()
/// writes it into a tensor of 5,056 bytes, number by number.
class CpuGeneratorState {
 public:
  static CpuGeneratorState now() {
    at::Generator handle = at::detail::getDefaultCPUGenerator();
    // Operators take the same mutex, so it is held for the read only.
    const std::lock_guard<std::mutex> lock(handle.mutex());
    auto& generator = *handle.get<at::CPUGeneratorImpl>();
    return {
        generator.engine().data(),
        generator.next_float_normal_sample(),
        generator.next_double_normal_sample()};
  }

  void restore() const {
    at::Generator handle = at::detail::getDefaultCPUGenerator();
    const std::lock_guard<std::mutex> lock(handle.mutex());
    auto& generator = *handle.get<at::CPUGeneratorImpl>();
    at::mt19937 engine;
    engine.set_data(engine_);
    generator.set_engine(engine);
    generator.set_next_float_normal_sample(next_float_);
    generator.set_next_double_normal_sample(next_double_);
  }

  uint64_t hash() const {
    const std::string_view numbers(
        reinterpret_cast<const char*>(engine_.state_.data()),
        sizeof(engine_.state_));
    return c10::get_hash(
        numbers,
        engine_.seed_,
        engine_.left_,
        engine_.next_,
        next_float_,
        next_double_);
  }

  bool operator==(const CpuGeneratorState& other) const {
    return engine_.seed_ == other.engine_.seed_ &&
        engine_.left_ == other.engine_.left_ &&
        engine_.next_ == other.engine_.next_ &&
        engine_.state_ == other.engine_.state_ &&
        next_float_ == other.next_float_ && next_double_ == other.next_double_;
  }

 private:
  CpuGeneratorState(
      const at::mt19937_data_pod& engine,
      std::optional<float> next_float,
      std::optional<double> next_double)
      : engine_(engine), next_float_(next_float), next_double_(next_double) {}

  at::mt19937_data_pod engine_;
  std::optional<float> next_float_; // normal numbers come in pairs
  std::optional<double> next_double_;
};

/// The states of the default generators that a module on one device can draw
/// from: the CPU's and, where the module runs elsewhere, that device's.
///
/// Memory:   2,544 bytes for the CPU, 16 bytes for a CUDA device, host memory.
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
    cpu_.restore();
    for (const auto& [generator, state] : states_) {
      at::Generator handle = generator;
      const std::lock_guard<std::mutex> lock(handle.mutex());
      handle.set_state(state);
    }
  }

  /// A number that tells states apart, where keeping one costs too much.
  uint64_t hash() const {
    uint64_t result = cpu_.hash();
    for (const auto& [generator, state] : states_) {
      result = result * 31 + std::hash<std::string_view>()(bytes_of(state));
    }
    return result;
  }

  /// Whether nothing was drawn since: both hold the same bytes.
  bool operator==(const GeneratorState& other) const {
    return cpu_ == other.cpu_ &&
        std::equal(
               states_.begin(),
               states_.end(),
               other.states_.begin(),
               other.states_.end(),
               [](const auto& a, const auto& b) {
                 return bytes_of(a.second) == bytes_of(b.second);
               });
  }

 private:
  static bool is_readable(at::Device device) {
    return capture_facts().generators_are_open || capture_of(device) == 0;
  }

  static std::string_view bytes_of(const at::Tensor& state) {
    return {static_cast<const char*>(state.const_data_ptr()), state.nbytes()};
  }

  void add(at::Device device) {
    if (!is_readable(device)) {
      return;
    }
    at::Generator generator = at::globalContext().defaultGenerator(device);
    const std::lock_guard<std::mutex> lock(generator.mutex());
    at::Tensor state = generator.get_state();
    states_.emplace_back(generator, std::move(state));
  }

  CpuGeneratorState cpu_ = CpuGeneratorState::now();
  std::vector<std::pair<at::Generator, at::Tensor>> states_; // of a device
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
