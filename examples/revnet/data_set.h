// SPDX-License-Identifier: MIT
#pragma once

#include "cifar.h"
#include "config.h"
#include "error.h"
#include "images.h"
#include "synthetic.h"

#include <string>
#include <vector>

namespace training {

inline const std::vector<std::string>& dataset_names() {
  static const std::vector<std::string> all{"cifar10", "cifar100", "synthetic"};
  return all;
}

/// Loads the data set of a configuration.
inline DataSet load_dataset(const Config& config) {
  if (config.dataset == "cifar10") {
    return read_cifar(cifar10_files(), config.data_dir);
  }
  if (config.dataset == "cifar100") {
    return read_cifar(cifar100_files(), config.data_dir);
  }
  if (config.dataset == "synthetic") {
    return make_synthetic();
  }
  throw Error(
      "expected DATASET to be cifar10, cifar100 or synthetic, but got \"" +
      config.dataset + "\".");
}

} // namespace training
