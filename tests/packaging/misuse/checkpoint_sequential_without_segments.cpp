// SPDX-License-Identifier: MIT
//
// Must not compile: nobody says how many segments.

#include <memcnn/checkpoint_sequential.h>

int main() {
  memcnn::checkpoint_sequential(torch::nn::Sequential(), at::Tensor());
}
