// SPDX-License-Identifier: MIT
#pragma once

#include "train/weights/zip_reader.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace training {

/// What a file is that is no archive of torch.save(), as a clause for a message,
/// and what makes one of it.
struct OtherFormat {
  const char* clause;
  const char* cure;
};

/// The cure for most of what is wrong with a file of weights.
inline constexpr const char* kWriteAnew =
    "Write it anew with torch.save(model.state_dict(), file).";

/// Bytes that tell the formats below apart.
inline constexpr size_t kBytesOfFormat = 17;

/// By the first bytes of a file: the formats that people have weights in.
inline std::optional<OtherFormat> other_format_of(std::string_view start) {
  constexpr std::string_view kBeforeTorch16 =
      "\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"; // as it was 2016
  constexpr std::string_view kAnyPickle = "\x80";
  constexpr std::string_view kOwnCheckpoint = "memcnn-checkpoint";
  constexpr std::string_view kHeaderOfSafetensors = "{"; // after its size
  constexpr std::string_view kSizeBelow1TiB("\0\0\0", 3); // its high bytes
  const auto has = [&](std::string_view bytes, size_t place) {
    return start.size() > place && start.substr(place, bytes.size()) == bytes;
  };
  if (start.empty()) {
    return OtherFormat{"it is empty", kWriteAnew};
  }
  if (has(kBeforeTorch16, 0)) {
    return OtherFormat{
        "it is in the format before torch 1.6",
        "Write it anew with torch.save(torch.load(file), new_file)."};
  }
  // Before a pickle: the size, whose low byte comes first, may begin as one does.
  if (has(kSizeBelow1TiB, 5) && has(kHeaderOfSafetensors, 8)) {
    return OtherFormat{
        "it is in the format of safetensors",
        "Write it anew with torch.save(safetensors.torch.load_file(file), "
        "new_file)."};
  }
  if (has(kAnyPickle, 0)) {
    return OtherFormat{"it is a pickle alone", kWriteAnew};
  }
  if (has(kOwnCheckpoint, 0)) {
    return OtherFormat{
        "it is a checkpoint of memcnn_train",
        "Give the file that its run writes with --save-weights."};
  }
  return std::nullopt;
}

/// The same of zip archives, by the names of their entries.
inline std::optional<OtherFormat> other_format_of(const ZipReader& archive) {
  if (archive.has("constants.pkl")) {
    return OtherFormat{
        "it is in the format of TorchScript, which torch::save() in C++ "
        "writes, too",
        "Write it anew with torch.save(torch.jit.load(file).state_dict(), "
        "new_file)."};
  }
  if (archive.has_kind(".npy")) {
    return OtherFormat{
        "it is an archive of NumPy",
        "Write it anew with torch.save({name: torch.from_numpy(array) for "
        "name, array in numpy.load(file).items()}, new_file)."};
  }
  return std::nullopt;
}

} // namespace training
