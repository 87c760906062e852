// SPDX-License-Identifier: MIT

// Files of CIFAR's binary version, of one record: for both programs that read
// them.

#include "revnet/images.h"
#include "fuzz.h"
#include "input_file.h"
#include "train/data/cifar.h"

#include <c10/util/Exception.h>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t count) {
  const fuzz::InputFile file(fuzz::input(bytes, count));
  for (const auto& files :
       {training::cifar10_files(), training::cifar100_files()}) {
    fuzz::read_or_refuse([&] {
      training::detail::read_cifar_files(
          files,
          file.path().parent_path(),
          {file.path().filename()},
          /*records_per_file=*/1);
    });
  }
  try {
    read_cifar10({file.path().string()});
  } catch (const c10::ValueError& error) {
    fuzz::check_message(error.what_without_backtrace());
  }
  return 0;
}
