// SPDX-License-Identifier: MIT
//
// Must not compile: which forward is meant cannot be told.

#include <memcnn/wrapper.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

struct NegateImpl : torch::nn::Module {
  at::Tensor forward(at::Tensor x) {
    return -x;
  }
  at::Tensor forward(at::Tensor x, at::Tensor mask) {
    return -x * mask;
  }
  at::Tensor inverse(at::Tensor y) {
    return -y;
  }
};
TORCH_MODULE(Negate);

int main() {
  memcnn::InvertibleModuleWrapper misuse(Negate{});
}
