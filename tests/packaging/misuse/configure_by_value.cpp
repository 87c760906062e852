// SPDX-License-Identifier: MIT
//
// Must not compile: the function would change a copy of the options.

#include <memcnn/configure.h>

int main() {
  memcnn::ReversibleSequence sequence;
  memcnn::configure(sequence, [](memcnn::ReversibleSequenceOptions options) {
    options.debug(true);
  });
}
