// SPDX-License-Identifier: MIT
#pragma once

#include "error.h"

#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <system_error>

namespace training {

/// Writes a file so that either the old or the whole new one is there, never a
/// part: `write` fills a file beside it, which then takes its name.
inline void write_atomically(
    const std::filesystem::path& path,
    const std::function<void(const std::string&)>& write) {
  const std::filesystem::path partial = path.string() + ".partial";
  try {
    write(partial.string());
    std::filesystem::rename(partial, path);
  } catch (const std::exception&) {
    std::error_code ignored;
    std::filesystem::remove(partial, ignored);
    throw Error(
        "expected " + path.string() +
        " to be writable, but writing it failed. Make room on the disk, or "
        "give another --results-dir.");
  }
}

inline void write_text(
    const std::filesystem::path& path,
    const std::string& text) {
  write_atomically(path, [&](const std::string& partial) {
    std::ofstream file;
    file.exceptions(std::ios::failbit | std::ios::badbit);
    file.open(partial, std::ios::binary);
    file << text;
    file.close();
  });
}

/// Makes the directory, and proves before any work is done that files can be
/// written into it.
inline void prepare_results_dir(const std::filesystem::path& directory) {
  const auto probe = directory / ".memcnn_train_probe";
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  bool writable = !error && std::filesystem::is_directory(directory, error);
  if (writable) {
    writable = static_cast<bool>(std::ofstream(probe) << "probe\n");
    std::filesystem::remove(probe, error);
  }
  if (!writable) {
    throw Error(
        "expected the results directory " + directory.string() +
        " to be writable, but no file can be made in it. Give another "
        "--results-dir.");
  }
}

} // namespace training
