// SPDX-License-Identifier: MIT
//
// Must not compile: blocks in braces have names.

#include <memcnn/sequence.h>

struct ScaleImpl : torch::nn::Module {
  at::Tensor forward(at::Tensor x) {
    return x * 2;
  }
  at::Tensor inverse(at::Tensor y) {
    return y / 2;
  }
};
TORCH_MODULE(Scale);

int main() {
  Scale a, b;
  memcnn::ReversibleSequence misuse({a, b});
}
