// SPDX-License-Identifier: MIT
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace memcnn_test {

/// The dict of tensors that tests/reference/generate.py has stored.
inline std::map<std::string, torch::Tensor> load_reference(
    const std::string& name) {
  const std::string path =
      std::string(MEMCNN_TEST_DATA_DIR) + "/" + name + ".pt";
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error(
        "cannot read " + path + ". Run tests/reference/generate.py.");
  }
  const std::vector<char> bytes(
      (std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& entry : torch::pickle_load(bytes).toGenericDict()) {
    tensors[entry.key().toStringRef()] = entry.value().toTensor();
  }
  return tensors;
}

/// The names of all parameters and buffers.
inline std::vector<std::string> keys(const torch::nn::Module& module) {
  std::vector<std::string> keys = module.named_parameters().keys();
  for (const auto& buffer : module.named_buffers()) {
    keys.push_back(buffer.key());
  }
  return keys;
}

/// Copies the weights that are stored as "state.<name>" into a module, which has
/// to have these names and no others.
inline void load_weights(
    torch::nn::Module& module,
    const std::map<std::string, torch::Tensor>& reference) {
  static const std::string kPrefix = "state.";
  std::set<std::string> stored;
  for (const auto& [key, tensor] : reference) {
    if (key.compare(0, kPrefix.size(), kPrefix) == 0) {
      stored.insert(key.substr(kPrefix.size()));
    }
  }
  const auto own = keys(module);
  ASSERT_EQ(std::set<std::string>(own.begin(), own.end()), stored);
  const torch::NoGradGuard no_grad;
  for (auto& parameter : module.named_parameters()) {
    parameter->copy_(reference.at(kPrefix + parameter.key()));
  }
  for (auto& buffer : module.named_buffers()) {
    buffer->copy_(reference.at(kPrefix + buffer.key()));
  }
}

} // namespace memcnn_test
