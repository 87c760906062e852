// SPDX-License-Identifier: MIT
#pragma once

#include "support/printable.h"
#include "train/base/checksum.h"
#include "train/base/format_error.h"
#include "train/weights/byte_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <istream>
#include <string>
#include <string_view>
#include <unordered_map>

namespace training {

/// A zip archive as torch.save() writes it: entries in one folder, stored as
/// they are.
///
/// Believes nothing that the file says of itself. Each size is compared with
/// that of the file before memory is asked for, and all entries together are no
/// larger than the file; the checksum of an entry is that of its bytes.
///
/// Throws:   FormatError if the archive is damaged, or of another kind.
/// Source:   PKWARE 2022, "APPNOTE.TXT - .ZIP File Format Specification" 6.3.10,
///           4.3.7 to 4.3.16 and 4.5.3.
class ZipReader final {
 public:
  /// The file has to outlive the reader.
  explicit ZipReader(std::istream& file) : file_(file) {
    file_.seekg(0, std::ios::end);
    const auto end = file_.tellg();
    file_size_ = end < 0 ? 0 : static_cast<uint64_t>(end);
    const Directory place = find_directory();
    const std::string bytes = bytes_at(place.offset, place.size);
    ByteReader directory(bytes, kDirectory);
    for (uint64_t index = 0; index < place.entries; ++index) {
      read_entry(directory);
    }
  }

  bool has(const std::string& name) const {
    return entries_.count(folder_ + name) != 0;
  }

  /// Whether an entry's name ends so.
  bool has_kind(const std::string& ending) const {
    return std::any_of(
        entries_.begin(), entries_.end(), [&](const auto& entry) {
          const std::string& name = entry.first;
          return name.size() > ending.size() &&
              name.compare(
                  name.size() - ending.size(), ending.size(), ending) == 0;
        });
  }

  uint64_t size(const std::string& name) const {
    return find(name).size;
  }

  /// Writes the size(name) bytes of an entry to `bytes`.
  void read(const std::string& name, void* bytes) {
    const Entry& entry = find(name);
    read_at(data_of(entry, folder_ + name), entry.size, bytes);
    const uint32_t found =
        checksum({static_cast<const char*>(bytes), entry.size});
    if (found != entry.checksum) {
      throw FormatError(fmt::format(
          "its entry {} has checksum {} instead of {}: it is damaged",
          support::printable(name),
          checksum_text(found),
          checksum_text(entry.checksum)));
    }
  }

  std::string text(const std::string& name) {
    std::string bytes(size(name), '\0');
    read(name, bytes.data());
    return bytes;
  }

 private:
  struct Directory {
    uint64_t entries;
    uint64_t size;
    uint64_t offset;
  };

  struct Entry {
    uint32_t checksum;
    uint64_t size; // in the archive
    uint64_t offset; // of the header before its bytes
    bool is_plain; // neither compressed nor encrypted
  };

  static constexpr const char* kDirectory = "its list of entries";
  static constexpr const char* kHeader = "the header of an entry";

  /// The last record of the file says where the directory is or, before one
  /// that is too small for it, the record of 64 bits.
  Directory find_directory() {
    constexpr uint64_t kEndBytes = 22; // no comment: torch.save() writes none
    constexpr uint64_t kLocatorBytes = 20;
    constexpr uint64_t kEnd64Bytes = 56;
    const char* const other = "it is no zip archive, or is cut off";
    if (file_size_ < kEndBytes) {
      throw FormatError(other);
    }
    const uint64_t at = file_size_ - kEndBytes;
    const std::string last = bytes_at(at, kEndBytes);
    ByteReader end(last, kDirectory);
    if (end.integer(4) != 0x06054b50) {
      throw FormatError(other);
    }
    end.take(6); // numbers of disks
    const Directory small = read_directory(end, /*count=*/2, /*offset=*/4);
    if (at < kLocatorBytes) {
      return small;
    }
    const std::string before = bytes_at(at - kLocatorBytes, kLocatorBytes);
    ByteReader locator(before, kDirectory);
    if (locator.integer(4) != 0x07064b50) {
      return small;
    }
    locator.take(4);
    const std::string large = bytes_at(locator.integer(8), kEnd64Bytes);
    ByteReader end64(large, kDirectory);
    if (end64.integer(4) != 0x06064b50) {
      end64.stop_on_corruption();
    }
    end64.take(28); // its own size, versions, numbers of disks
    return read_directory(end64, /*count=*/8, /*offset=*/8);
  }

  /// With so many bytes for the number of entries, and for size and offset.
  static Directory
  read_directory(ByteReader& end, unsigned count, unsigned offset) {
    Directory place{};
    place.entries = end.integer(count);
    place.size = end.integer(offset);
    place.offset = end.integer(offset);
    return place;
  }

  void read_entry(ByteReader& directory) {
    if (directory.integer(4) != 0x02014b50) {
      directory.stop_on_corruption();
    }
    directory.take(4); // versions
    const uint64_t flags = directory.integer(2);
    const uint64_t method = directory.integer(2);
    directory.take(4); // time and date
    Entry entry{};
    entry.checksum = static_cast<uint32_t>(directory.integer(4));
    entry.size = directory.integer(4);
    uint64_t unpacked = directory.integer(4);
    const uint64_t name_bytes = directory.integer(2);
    const uint64_t extra_bytes = directory.integer(2);
    const uint64_t comment_bytes = directory.integer(2);
    directory.take(8); // number of the disk, attributes
    entry.offset = directory.integer(4);
    const std::string name(directory.take(name_bytes));
    ByteReader extra(directory.take(extra_bytes), kDirectory);
    read_large({&unpacked, &entry.size, &entry.offset}, extra);
    directory.take(comment_bytes);

    const bool is_encrypted = (flags & 1) != 0;
    entry.is_plain = method == 0 && unpacked == entry.size && !is_encrypted;
    add(name, entry);
  }

  /// A number that is too large for 32 bits stands in an extra field.
  static void read_large(
      std::initializer_list<uint64_t*> numbers,
      ByteReader& extra) {
    while (!extra.at_end()) {
      const uint64_t kind = extra.integer(2);
      ByteReader field(extra.take(extra.integer(2)), kDirectory);
      for (uint64_t* const number : numbers) {
        if (kind == 1 && *number == 0xffffffff) {
          *number = field.integer(8);
        }
      }
    }
  }

  void add(const std::string& name, const Entry& entry) {
    if (entries_.empty()) {
      folder_ = name.substr(0, name.find('/') + 1);
    }
    check_within(entry.offset, entry.size);
    total_ += entry.size;
    if (total_ > file_size_ || !entries_.emplace(name, entry).second) {
      throw FormatError("its entries overlap, or two have one name");
    }
  }

  const Entry& find(const std::string& name) const {
    const auto found = entries_.find(folder_ + name);
    if (found == entries_.end()) {
      throw FormatError(
          fmt::format("it has no entry {}", support::printable(name)));
    }
    if (!found->second.is_plain) {
      throw FormatError(fmt::format(
          "its entry {} is compressed or encrypted, which torch.save() does "
          "not do",
          support::printable(name)));
    }
    return found->second;
  }

  /// Where the bytes of an entry begin: after a header that has its name, too.
  uint64_t data_of(const Entry& entry, const std::string& name) {
    constexpr uint64_t kHeaderBytes = 30;
    const std::string bytes =
        bytes_at(entry.offset, kHeaderBytes + name.size());
    ByteReader header(bytes, kHeader);
    if (header.integer(4) != 0x04034b50) {
      header.stop_on_corruption();
    }
    header.take(22); // what the directory says
    const uint64_t name_bytes = header.integer(2);
    const uint64_t extra_bytes = header.integer(2);
    if (name_bytes != name.size() || header.take(name.size()) != name) {
      header.stop_on_corruption();
    }
    return entry.offset + bytes.size() + extra_bytes;
  }

  void check_within(uint64_t offset, uint64_t count) const {
    if (offset > file_size_ || count > file_size_ - offset) {
      throw FormatError("it says that it is larger than it is");
    }
  }

  void read_at(uint64_t offset, uint64_t count, void* bytes) {
    check_within(offset, count);
    file_.seekg(static_cast<std::streamoff>(offset));
    file_.read(static_cast<char*>(bytes), static_cast<std::streamsize>(count));
    if (!file_) {
      throw FormatError("it cannot be read to its end");
    }
  }

  std::string bytes_at(uint64_t offset, uint64_t count) {
    check_within(offset, count);
    std::string bytes(count, '\0');
    read_at(offset, count, bytes.data());
    return bytes;
  }

  std::istream& file_;
  uint64_t file_size_ = 0;
  uint64_t total_ = 0; // bytes of all entries
  std::string folder_; // of the first entry, and so of all
  std::unordered_map<std::string, Entry> entries_; // by folder and name
};

} // namespace training
