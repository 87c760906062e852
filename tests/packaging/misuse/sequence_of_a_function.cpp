// SPDX-License-Identifier: MIT
//
// Must not compile: a function has no inverse.

#include <memcnn/sequence.h>

int main() {
  memcnn::ReversibleSequence misuse([](at::Tensor x) { return -x; });
}
