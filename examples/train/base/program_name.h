// SPDX-License-Identifier: MIT
#pragma once

#include <string>

namespace training {

/// The program that messages speak of. Another one says its name first thing in
/// main().
inline std::string& program_name() {
  static std::string name = "memcnn_train";
  return name;
}

} // namespace training
