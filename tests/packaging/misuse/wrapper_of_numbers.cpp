// SPDX-License-Identifier: MIT
//
// Must not compile: numbers are not what a graph runs on.

#include <memcnn/wrapper.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

struct NegateImpl : torch::nn::Module {
  int forward(int x) {
    return -x;
  }
  int inverse(int y) {
    return -y;
  }
};
TORCH_MODULE(Negate);

int main() {
  memcnn::InvertibleModuleWrapper misuse(Negate{});
}
