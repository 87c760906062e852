// SPDX-License-Identifier: MIT
//
// Must not compile: an AnyModule knows forward alone.

#include <memcnn/coupling/additive.h>
#include <memcnn/sequence.h>

#include <torch/nn/modules/linear.h>

int main() {
  torch::nn::Linear linear(2, 2);
  torch::nn::AnyModule coupling(memcnn::AdditiveCoupling(linear, linear));
  memcnn::ReversibleSequence misuse(coupling);
}
