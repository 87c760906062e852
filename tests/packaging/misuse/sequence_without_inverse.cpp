// SPDX-License-Identifier: MIT
//
// Must not compile: a linear layer has no inverse.

#include <memcnn/sequence.h>

#include <torch/nn/modules/linear.h>

int main() {
  torch::nn::Linear linear(2, 2);
  memcnn::ReversibleSequence misuse(linear);
}
