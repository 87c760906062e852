// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/describe.h>

#include <c10/util/StringUtil.h>

#include <optional>
#include <ostream>
#include <string>

namespace memcnn::detail {

/// Options as a module prints them: those that are set, "(debug=true)", or
/// nothing.
class PrintedOptions {
 public:
  template <class T>
  PrintedOptions&
  add(const char* name, const T& value, const T& standard = T()) {
    if (value != standard) {
      text_ += c10::str(text_.empty() ? "(" : ", ", name, "=", text(value));
    }
    return *this;
  }

  friend std::ostream& operator<<(
      std::ostream& stream,
      const PrintedOptions& options) {
    return stream << options.text_ << (options.text_.empty() ? "" : ")");
  }

 private:
  static std::string text(bool value) {
    return yes_no(value);
  }
  template <class T>
  static std::string text(const T& value) {
    return c10::str(value);
  }
  template <class T>
  static std::string text(const std::optional<T>& value) {
    return c10::str(*value); // set, as it is not the standard
  }

  std::string text_;
};

} // namespace memcnn::detail
