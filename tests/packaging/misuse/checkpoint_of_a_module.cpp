// SPDX-License-Identifier: MIT
//
// Must not compile: a module itself is given, not a holder of one.

#include <memcnn/checkpoint.h>
#include <torch/nn/modules/linear.h>

int main() {
  torch::nn::LinearImpl linear(2, 2);
  memcnn::checkpoint(linear, at::Tensor());
}
