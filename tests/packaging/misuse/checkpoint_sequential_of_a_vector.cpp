// SPDX-License-Identifier: MIT
//
// Must not compile: a vector is no Sequential.

#include <memcnn/checkpoint_sequential.h>
#include <torch/nn/modules/linear.h>

#include <vector>

int main() {
  const std::vector<torch::nn::Linear> layers;
  memcnn::checkpoint_sequential(layers, 2, at::Tensor());
}
