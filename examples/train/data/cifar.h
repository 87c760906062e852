// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/data/class_names.h"
#include "train/data/images.h"

#include <fmt/format.h>
#include <torch/types.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>
#include <vector>

// Where the build tree is and where its targets put data sets, as the build
// knows them.
#ifndef MEMCNN_TRAIN_DATA_DIR
#define MEMCNN_TRAIN_DATA_DIR "data"
#endif
#ifndef MEMCNN_TRAIN_BUILD_DIR
#define MEMCNN_TRAIN_BUILD_DIR "build"
#endif

namespace training {

/// How a CIFAR data set lies on disk: records of some label bytes, of which the
/// last is the class, then 3 x 32 x 32 pixel bytes.
///
/// Source:   Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny
///           Images"; https://www.cs.toronto.edu/~kriz/cifar.html.
struct CifarFiles {
  std::string name;
  std::string folder; // in the published archive
  std::vector<std::string> train;
  std::vector<std::string> test;
  int64_t records_per_train_file;
  int64_t records_per_test_file;
  int64_t label_bytes;
  int64_t num_classes;
  std::string class_names = ""; // beside the images
};

inline CifarFiles cifar10_files() {
  return {
      "cifar10",
      "cifar-10-batches-bin",
      {"data_batch_1.bin",
       "data_batch_2.bin",
       "data_batch_3.bin",
       "data_batch_4.bin",
       "data_batch_5.bin"},
      {"test_batch.bin"},
      10000,
      10000,
      1,
      10,
      "batches.meta.txt"};
}

inline CifarFiles cifar100_files() {
  return {
      "cifar100",
      "cifar-100-binary",
      {"train.bin"},
      {"test.bin"},
      50000,
      10000,
      2,
      100,
      "fine_label_names.txt"};
}

namespace detail {

inline std::string fetch_advice(const CifarFiles& files) {
  return " Fetch it with \"cmake --build " MEMCNN_TRAIN_BUILD_DIR
         " --target download_" +
      files.name + "\", or give its folder as --data-dir.";
}

inline std::vector<char> read_cifar_bytes(
    const CifarFiles& files,
    const std::filesystem::path& path,
    int64_t bytes) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    throw support::Error(fmt::format(
        "expected {} to be a file of {} bytes, but there is none.{}",
        path.string(),
        bytes,
        fetch_advice(files)));
  }
  const auto size = std::filesystem::file_size(path, error);
  if (error || size != static_cast<uintmax_t>(bytes)) {
    throw support::Error(fmt::format(
        "expected {} to have {} bytes, but it has {}: it is truncated, or "
        "another file.{}",
        path.string(),
        bytes,
        size,
        fetch_advice(files)));
  }
  std::vector<char> content(static_cast<size_t>(bytes));
  std::ifstream file(path, std::ios::binary);
  if (!file.read(content.data(), bytes)) {
    throw support::Error(fmt::format(
        "expected {} to be readable, but reading it failed.{}",
        path.string(),
        fetch_advice(files)));
  }
  return content;
}

/// Reads one file into the images from `first` on.
inline void read_cifar_file(
    const CifarFiles& files,
    const std::filesystem::path& path,
    int64_t records,
    int64_t first,
    Images& images) {
  const int64_t record_bytes = files.label_bytes + kImageBytes;
  const auto content = read_cifar_bytes(files, path, records * record_bytes);
  auto* pixels = images.pixels.data_ptr<uint8_t>() + first * kImageBytes;
  auto* labels = images.labels.data_ptr<int64_t>() + first;
  for (int64_t record = 0; record < records; ++record) {
    const char* source = content.data() + record * record_bytes;
    const int64_t label =
        static_cast<unsigned char>(source[files.label_bytes - 1]);
    if (label >= files.num_classes) {
      throw support::Error(fmt::format(
          "expected every label in {} to be below {}, but record {} has "
          "{}: the file is corrupt.{}",
          path.string(),
          files.num_classes,
          record,
          label,
          fetch_advice(files)));
    }
    labels[record] = label;
    std::memcpy(
        pixels + record * kImageBytes,
        source + files.label_bytes,
        static_cast<size_t>(kImageBytes));
  }
}

inline Images read_cifar_files(
    const CifarFiles& files,
    const std::filesystem::path& folder,
    const std::vector<std::string>& names,
    int64_t records_per_file) {
  const int64_t count = static_cast<int64_t>(names.size()) * records_per_file;
  Images images{
      torch::empty({count, 3, kImageSize, kImageSize}, torch::kUInt8),
      torch::empty({count}, torch::kInt64)};
  int64_t first = 0;
  for (const auto& name : names) {
    read_cifar_file(files, folder / name, records_per_file, first, images);
    first += records_per_file;
  }
  return images;
}

/// `directory` itself or the folder in it that the published archive unpacks
/// to.
inline std::filesystem::path cifar_folder(
    const CifarFiles& files,
    const std::string& directory) {
  const std::filesystem::path folder = directory.empty()
      ? std::filesystem::path(MEMCNN_TRAIN_DATA_DIR) / files.name
      : std::filesystem::path(directory);
  std::error_code error;
  return std::filesystem::is_directory(folder / files.folder, error)
      ? folder / files.folder
      : folder;
}

} // namespace detail

/// The files that read_cifar() reads.
inline std::vector<std::filesystem::path> cifar_paths(
    const CifarFiles& files,
    const std::string& directory) {
  const auto folder = detail::cifar_folder(files, directory);
  std::vector<std::filesystem::path> paths;
  for (const auto* names : {&files.train, &files.test}) {
    for (const auto& name : *names) {
      paths.push_back(folder / name);
    }
  }
  return paths;
}

/// Reads a data set, and checks sizes and labels on the way.
///
/// `directory` holds the files themselves or the folder that the published
/// archive unpacks to; empty means where the download target puts it.
///
/// Memory:   3072 bytes per image, 176 MiB for CIFAR-10.
/// Throws:   Error if a file is missing, truncated or corrupt.
inline DataSet read_cifar(
    const CifarFiles& files,
    const std::string& directory) {
  const auto folder = detail::cifar_folder(files, directory);
  const auto classes =
      read_class_names(folder / files.class_names, files.num_classes);
  return {
      detail::read_cifar_files(
          files, folder, files.train, files.records_per_train_file),
      detail::read_cifar_files(
          files, folder, files.test, files.records_per_test_file),
      files.num_classes,
      classes.names,
      classes.flaw};
}

} // namespace training
