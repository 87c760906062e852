// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/run_settings.h"
#include "train/data/cifar.h"
#include "train/data/images.h"
#include "train/data/synthetic.h"

#include <fmt/format.h>

#include <filesystem>
#include <string>
#include <vector>

namespace training {

inline const std::vector<std::string>& dataset_names() {
  static const std::vector<std::string> all{"cifar10", "cifar100", "synthetic"};
  return all;
}

/// The files that load_dataset() reads.
inline std::vector<std::filesystem::path> dataset_files(
    const RunSettings& config) {
  if (config.dataset == "cifar10") {
    return cifar_paths(cifar10_files(), config.data_dir);
  }
  if (config.dataset == "cifar100") {
    return cifar_paths(cifar100_files(), config.data_dir);
  }
  return {};
}

/// Loads the data set of a configuration.
inline DataSet load_dataset(const RunSettings& config) {
  if (config.dataset == "cifar10") {
    return read_cifar(cifar10_files(), config.data_dir);
  }
  if (config.dataset == "cifar100") {
    return read_cifar(cifar100_files(), config.data_dir);
  }
  if (config.dataset == "synthetic") {
    return make_synthetic();
  }
  throw support::Error(fmt::format(
      "expected DATASET to be cifar10, cifar100 or synthetic, but got "
      "\"{}\".",
      config.dataset));
}

} // namespace training
