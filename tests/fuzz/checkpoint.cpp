// SPDX-License-Identifier: MIT

// A checkpoint: the line that it begins with, and the description in it.

#include "fuzz.h"
#include "train/run/checkpoint_content.h"
#include "train/run/seal.h"

#include <string>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t count) {
  const std::string text = fuzz::input(bytes, count);
  fuzz::read_or_refuse([&] { training::unseal(text); });
  fuzz::read_or_refuse([&] {
    training::StateDict tensors;
    tensors.insert("about", training::detail::bytes_of(text));
    training::parse_checkpoint(training::archive_of(tensors));
  });
  return 0;
}
