// SPDX-License-Identifier: MIT

// The pickle of a file of weights, beside two storages of eight bytes.

#include "fuzz.h"
#include "train/weights/state_dict.h"

#include <sstream>
#include <string>

namespace {

std::string storages() {
  training::StateDict state;
  state.insert("a", at::ones({2}));
  state.insert("b", at::ones({1}, at::kDouble));
  return training::archive_of(state);
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t count) {
  static const std::string archive = storages();
  const std::string pickle = fuzz::input(bytes, count);
  fuzz::read_or_refuse([&] {
    std::istringstream file(archive);
    training::ZipReader zip(file);
    training::detail::SavedTensors objects(zip);
    training::pickle::Unpickler unpickler(pickle, objects);
    training::detail::tensors_of(
        training::detail::state_dict_of(unpickler.run()));
  });
  return 0;
}
