// SPDX-License-Identifier: MIT
#pragma once

namespace memcnn::detail {

/// A module's options that may be changed after its construction: what
/// configure() finds, whatever else the module is.
template <class Options>
struct Configurable {
  Options options;
};

} // namespace memcnn::detail
