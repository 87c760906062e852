// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "support/nearest.h"
#include "support/printable.h"
#include "support/synonyms.h"
#include "support/version.h"

#include <fmt/format.h>
#include <fmt/ranges.h> // fmt::join(), from fmt 11 on
#include <CLI/CLI.hpp>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <system_error>
#include <vector>

// What the command lines of all programs have in common.

namespace support {

/// Whole numbers in decimal digits. --help and the error say the bounds.
///
/// For transform(), not check(): what is left of the text is what CLI11 then
/// reads, to which 010 would be 8.
inline CLI::Validator whole_number(int64_t least, int64_t most) {
  const std::string bounds = fmt::format("{} to {}", least, most);
  return CLI::Validator(
      [=](std::string& text) -> std::string {
        int64_t value = 0;
        const char* end = text.data() + text.size();
        const auto [rest, error] = std::from_chars(text.data(), end, value);
        if (error != std::errc() || rest != end || value < least ||
            value > most) {
          const bool is_whole =
              error != std::errc::invalid_argument && rest == end;
          return is_whole
              ? fmt::format("Value {} not in range {}", text, bounds)
              : fmt::format(
                    "Value {} is no whole number from {}", text, bounds);
        }
        text = std::to_string(value);
        return "";
      },
      bounds);
}

/// Whole numbers from `least` on. Nobody needs more than the most, and products
/// of two stay far below int64_t's end.
inline CLI::Validator count_from(int64_t least) {
  return whole_number(least, /*most=*/1000000000);
}

/// Those that LibTorch's generators take, but for the ones that do not fit an
/// int64_t.
inline CLI::Validator seed() {
  return whole_number(0, std::numeric_limits<int64_t>::max());
}

/// More threads than any machine of today has cores for, and few enough for any
/// system to start.
inline CLI::Validator threads_from(int64_t least) {
  return whole_number(least, /*most=*/1024);
}

/// Numbers from 0 to `most`. CLI::NonNegativeNumber accepts NaN.
inline CLI::Validator number_up_to(double most) {
  const std::string bounds = fmt::format("0 to {:g}", most);
  return CLI::Validator(
      [=](const std::string& text) -> std::string {
        std::istringstream stream(text);
        double value = 0;
        const bool is_number = (stream >> value) && stream.peek() == EOF;
        return is_number && value >= 0 && value <= most
            ? ""
            : fmt::format("Value {} not in range {}", text, bounds);
      },
      bounds);
}

/// One of these names. Beside CLI::IsMember, the error asks for the nearest.
inline CLI::Validator one_of(const std::vector<std::string>& names) {
  const std::string all = fmt::format("{{{}}}", fmt::join(names, ","));
  return CLI::Validator(
      [=](const std::string& text) -> std::string {
        return std::find(names.begin(), names.end(), text) != names.end()
            ? ""
            : fmt::format(
                  "{} not in {}{}", text, all, did_you_mean(text, names));
      },
      all);
}

/// Of a file or folder. An empty one would count as none given.
inline CLI::Validator file_name() {
  return CLI::Validator(
      [](const std::string& text) -> std::string {
        return text.empty() ? "a file name cannot be empty" : "";
      },
      /*validator_desc=*/"");
}

/// Files that are read as a whole before any of their options is known. CLI11
/// would wait for a pipe, read a device for ever, and take one that cannot be
/// read for an empty one.
inline CLI::Validator config_file() {
  constexpr size_t kMostBytes = 1 << 20; // thousands of times any in use
  return CLI::Validator(
      [](const std::string& path) -> std::string {
        std::error_code error;
        if (!std::filesystem::is_regular_file(path, error)) {
          return fmt::format("\"{}\" is no file", path);
        }
        std::string bytes(kMostBytes + 1, '\0');
        std::ifstream file(path, std::ios::binary);
        file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
        if (file) {
          return fmt::format("\"{}\" has more than 1 MiB", path);
        }
        const bool is_read = file.is_open() && !file.bad();
        return is_read ? "" : fmt::format("\"{}\" cannot be read", path);
      },
      /*validator_desc=*/"");
}

/// --version and --config, and defaults in the text of --help.
inline void add_common_options(CLI::App& app) {
  app.option_defaults()->always_capture_default();
  app.set_version_flag(
      "--version", fmt::format("{} {}", app.get_name(), version()));
  app.set_config("--config")
      ->description("Read options from this TOML file; those given here win")
      ->option_text("FILE")
      ->check(config_file());
  app.allow_config_extras(CLI::config_extras_mode::error);
}

namespace detail {

inline std::vector<std::string> argument_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    names.push_back(option->get_name());
  }
  return names;
}

/// What CLI11 says. Values of a file given as --config come back in it.
inline std::string said(const CLI::ParseError& error) {
  return printable(error.what(), /*most_bytes=*/500);
}

[[noreturn]] inline void stop_on_unknown(
    const CLI::App& app,
    const std::string& got) {
  throw Error(fmt::format(
      "expected a known argument, but got {}. There are {}.",
      got,
      fmt::join(argument_names(app), ", ")));
}

/// Refuses what CLI11 has left over, such as a flag that there is not. Its value
/// may have gone to a positional argument, and be what CLI11 complains of.
inline void check_nothing_left(const CLI::App& app) {
  const auto left = app.remaining();
  if (left.empty()) {
    return;
  }
  const auto flag =
      std::find_if(left.begin(), left.end(), [](const std::string& argument) {
        return argument.rfind('-', 0) == 0;
      });
  const std::string argument = flag != left.end() ? *flag : left.front();
  const std::string name = argument.substr(0, argument.find('='));
  stop_on_unknown(
      app,
      fmt::format(
          "\"{}\"{}", argument, hint_on_name(name, argument_names(app))));
}

/// A key of a file is the name of an option without its dashes.
inline std::string unknown_key(
    const std::string& key,
    const std::vector<std::string>& keys) {
  const auto dot = key.rfind('.');
  if (dot != std::string::npos && key.substr(dot) == ".++") { // CLI11's mark
    return fmt::format(
        "\"[{}]\" (options stand in no section)", key.substr(0, dot));
  }
  return fmt::format("\"{}\"{}", key, hint_on_name(key, keys));
}

/// CLI11 calls any file INI.
[[noreturn]] inline void stop_on_key(
    const CLI::App& app,
    const CLI::ConfigError& error) {
  std::vector<std::string> keys = argument_names(app);
  for (std::string& key : keys) {
    key = bare(key);
  }
  const std::string unknown = "INI was not able to parse ";
  std::string got = said(error);
  if (got.rfind(unknown, 0) == 0) {
    got = unknown_key(got.substr(unknown.size()), keys);
  }
  stop_on_unknown(
      app,
      fmt::format("in {}: {}", app.get_config_ptr()->as<std::string>(), got));
}

} // namespace detail

/// Reads the command line into the variables of the options. False where --help
/// or --version was all that was asked for.
///
/// Throws:   Error if an argument is missing, unknown or not allowed.
inline bool parse(CLI::App& app, int argc, const char** argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ConfigError& error) {
    detail::stop_on_key(app, error);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {
      app.exit(error);
      return false;
    }
    detail::check_nothing_left(app);
    throw Error(fmt::format(
        "expected a valid command line, but got: {}. See {} --help.",
        detail::said(error),
        app.get_name()));
  }
  return true;
}

} // namespace support
