// SPDX-License-Identifier: MIT
//
// Must not compile: the options are those of another class.

#include <memcnn/coupling/additive.h>
#include <memcnn/wrapper.h>
#include <torch/nn/modules/linear.h>

int main() {
  torch::nn::Linear linear(2, 2);
  memcnn::AdditiveCoupling misuse(
      linear, memcnn::InvertibleModuleWrapperOptions());
}
