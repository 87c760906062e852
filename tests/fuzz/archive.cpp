// SPDX-License-Identifier: MIT

// A file of weights as a whole: the archive, the pickle in it, and its tensors.

#include "fuzz.h"
#include "train/weights/state_dict.h"

#include <sstream>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t count) {
  fuzz::read_or_refuse([&] {
    std::istringstream file(fuzz::input(bytes, count));
    for (const auto& item : training::read_tensors(file)) {
      if (item.value().numel() <= 1000) { // an expanded one may say any number
        item.value().clone(); // reads all of it
      }
    }
  });
  return 0;
}
