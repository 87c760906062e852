// SPDX-License-Identifier: MIT
//
// Must not compile: a linear layer returns no scale.

#include <memcnn/coupling/affine.h>

#include <torch/nn/modules/linear.h>

int main() {
  torch::nn::Linear linear(2, 2);
  memcnn::AffineCoupling misuse(linear, linear);
}
