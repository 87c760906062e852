// SPDX-License-Identifier: MIT
//
// Must not compile: a wrapper takes one module; two are a coupling's.

#include <memcnn/wrapper.h>
#include <torch/nn/modules/linear.h>

int main() {
  torch::nn::Linear linear(2, 2);
  memcnn::InvertibleModuleWrapper misuse(linear, linear);
}
