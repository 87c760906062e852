// SPDX-License-Identifier: MIT
//
// Must not compile: a module itself is given, not a holder of one.

#include <memcnn/check.h>
#include <memcnn/coupling/additive.h>
#include <torch/nn/modules/linear.h>

int main() {
  torch::nn::Linear linear(2, 2);
  memcnn::AdditiveCoupling coupling(linear, linear);
  memcnn::check_invertible_module(*coupling, {2, 4});
}
