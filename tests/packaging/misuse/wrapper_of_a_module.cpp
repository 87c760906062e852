// SPDX-License-Identifier: MIT
//
// Must not compile: a module itself is given, not a holder of one.

#include <memcnn/coupling/additive.h>
#include <memcnn/wrapper.h>
#include <torch/nn/modules/linear.h>

int main() {
  torch::nn::Linear linear(2, 2);
  memcnn::AdditiveCoupling coupling(linear, linear);
  memcnn::InvertibleModuleWrapper misuse(*coupling);
}
