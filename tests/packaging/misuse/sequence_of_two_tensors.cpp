// SPDX-License-Identifier: MIT
//
// Must not compile: a block of a chain takes what the one before gives.

#include <memcnn/sequence.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <tuple>

struct SwapImpl : torch::nn::Module {
  using Pair = std::tuple<at::Tensor, at::Tensor>;
  Pair forward(at::Tensor a, at::Tensor b) {
    return {b, a};
  }
  Pair inverse(at::Tensor b, at::Tensor a) {
    return {a, b};
  }
};
TORCH_MODULE(Swap);

int main() {
  memcnn::ReversibleSequence misuse(Swap{});
}
