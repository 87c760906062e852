// SPDX-License-Identifier: MIT

#include "train/weights/zip_reader.h"

#include <caffe2/serialize/inline_container.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace {

using namespace std::string_literals;
using namespace training;
using testing::HasSubstr;
using testing::StartsWith;

/// Little-endian; zeros after the eight bytes that a value has.
std::string number(uint64_t value, int bytes) {
  std::string text;
  for (int index = 0; index < bytes; ++index) {
    text += static_cast<char>(value & 0xff);
    value >>= 8;
  }
  return text;
}

/// An entry of an archive as a test would have it.
struct Entry {
  std::string name;
  std::string bytes;
  uint64_t method = 0;
  uint64_t flags = 0;
  uint64_t size = bytes.size();
  uint64_t packed = bytes.size();
  uint32_t sum = checksum(bytes);
  uint64_t offset = 0; // 0: where it is
  std::string name_in_header = name;
  std::string extra = {};
};

std::string end_of(size_t entries, size_t size, size_t offset) {
  return "PK\5\6" + number(0, 4) + number(entries, 2) + number(entries, 2) +
      number(size, 4) + number(offset, 4) + number(0, 2);
}

/// The entries one after the other, and then the list of them.
std::string archive(const std::vector<Entry>& entries) {
  std::string file;
  std::string directory;
  for (const Entry& entry : entries) {
    const uint64_t offset = entry.offset != 0 ? entry.offset : file.size();
    file += "PK\3\4" + number(0, 22) + number(entry.name_in_header.size(), 2) +
        number(3, 2) + entry.name_in_header + "pad" + entry.bytes;
    directory += "PK\1\2" + number(0, 4) + number(entry.flags, 2) +
        number(entry.method, 2) + number(0, 4) + number(entry.sum, 4) +
        number(entry.packed, 4) + number(entry.size, 4) +
        number(entry.name.size(), 2) + number(entry.extra.size(), 2) +
        number(4, 2) + number(0, 8) + number(offset, 4) + entry.name +
        entry.extra + "note";
  }
  const size_t size = directory.size();
  return file + directory + end_of(entries.size(), size, file.size());
}

/// What is wrong with an archive, or with that entry of it.
std::string flaw_of(const std::string& bytes, const std::string& name = "a") {
  std::istringstream file(bytes);
  try {
    ZipReader(file).text(name);
  } catch (const FormatError& flaw) {
    return flaw.what();
  }
  return "nothing";
}

std::string flaw_of(const Entry& entry) {
  return flaw_of(archive({entry}));
}

Entry plain() {
  return {"folder/a", "bytes"};
}

TEST(ZipReader, ReadsTheEntriesOfAFolder) {
  std::istringstream file(
      archive({plain(), {"folder/b/c", ""}, {"elsewhere/d", "d"}}));
  ZipReader zip(file);
  EXPECT_EQ(zip.text("a"), "bytes");
  EXPECT_EQ(zip.size("a"), 5U);
  EXPECT_EQ(zip.text("b/c"), "");
  EXPECT_TRUE(zip.has("b/c"));
  EXPECT_FALSE(zip.has("d"));
  EXPECT_FALSE(zip.has("folder/a"));
}

TEST(ZipReader, ReadsWhatLibTorchWrites) {
  std::string bytes;
  caffe2::serialize::PyTorchStreamWriter writer(
      [&](const void* piece, size_t count) {
        bytes.append(static_cast<const char*>(piece), count);
        return count;
      });
  writer.writeRecord("a", "bytes", 5);
  writer.writeRecord("data/0", "more", 4);
  writer.writeEndOfFile();
  std::istringstream file(bytes);
  ZipReader zip(file);
  EXPECT_EQ(zip.text("a"), "bytes");
  EXPECT_EQ(zip.text("data/0"), "more");
}

TEST(ZipReader, TakesNumbersOf64Bits) {
  Entry entry = plain();
  entry.size = entry.packed = 0xffffffff;
  entry.extra = number(7, 2) + number(1, 2) + "x" + number(1, 2) +
      number(16, 2) + number(5, 8) + number(5, 8);
  EXPECT_EQ(flaw_of(entry), "nothing");
  entry.extra.resize(entry.extra.size() - 1);
  EXPECT_EQ(flaw_of(entry), "its list of entries is corrupt");
}

/// An archive whose last record is overruled by one of 64 bits.
std::string archive64(uint64_t entries, uint64_t size, uint64_t offset) {
  const std::string small = archive({plain()});
  const size_t body = small.size() - 22;
  return small.substr(0, body) + "PK\6\6" + number(44, 8) + number(0, 20) +
      number(entries, 8) + number(size, 8) + number(offset, 8) + "PK\6\7" +
      number(0, 4) + number(body, 8) + number(1, 4) +
      end_of(0xffff, 0xffffffff, 0xffffffff);
}

TEST(ZipReader, TakesALastRecordOf64Bits) {
  constexpr auto kLargest = std::numeric_limits<uint64_t>::max();
  const size_t offset = 30 + 8 + 3 + 5;
  const size_t size = 46 + 8 + 4;
  EXPECT_EQ(flaw_of(archive64(1, size, offset)), "nothing");
  EXPECT_THAT(
      flaw_of(archive64(1, kLargest, offset)), HasSubstr("larger than it is"));
  EXPECT_THAT(
      flaw_of(archive64(1, size, kLargest)), HasSubstr("larger than it is"));
  EXPECT_EQ(
      flaw_of(archive64(kLargest, size, offset)),
      "its list of entries is corrupt");
}

TEST(ZipReader, RejectsEntriesThatAreDamaged) {
  Entry entry = plain();
  entry.sum ^= 0x100;
  EXPECT_EQ(
      flaw_of(entry),
      fmt::format(
          "its entry a has checksum {:08x} instead of {:08x}: it is damaged",
          entry.sum ^ 0x100,
          entry.sum));
  entry = plain();
  entry.name_in_header = "folder/b";
  EXPECT_EQ(flaw_of(entry), "the header of an entry is corrupt");
  entry.name_in_header = "folder/aa";
  EXPECT_EQ(flaw_of(entry), "the header of an entry is corrupt");
  entry = plain();
  entry.offset = 1;
  EXPECT_EQ(flaw_of(entry), "the header of an entry is corrupt");
}

TEST(ZipReader, RejectsSizesBeyondTheFile) {
  for (const uint64_t size : {1000U, 0x7fffffffU, 0xffffffffU}) {
    Entry entry = plain();
    entry.size = entry.packed = size;
    EXPECT_EQ(flaw_of(entry), "it says that it is larger than it is") << size;
  }
  Entry entry = plain();
  entry.offset = 0x7fffffff;
  EXPECT_EQ(flaw_of(entry), "it says that it is larger than it is");
  entry.offset = 0;
  entry.size = entry.packed = 110; // within the file, but not after its header
  EXPECT_EQ(flaw_of(entry), "it says that it is larger than it is");
}

TEST(ZipReader, RejectsEntriesThatShareBytes) {
  const Entry first{"a", std::string(1000, 'a')};
  Entry again{"b", ""};
  again.size = again.packed = 1000;
  again.offset = 1;
  EXPECT_EQ(flaw_of(archive({first, {"b", ""}})), "nothing");
  const std::string both = "its entries overlap, or two have one name";
  EXPECT_EQ(flaw_of(archive({first, again})), both);
  EXPECT_EQ(flaw_of(archive({plain(), plain()})), both);
}

TEST(ZipReader, RejectsWhatTorchSaveDoesNotWrite) {
  Entry entry = plain();
  entry.method = 8;
  EXPECT_EQ(
      flaw_of(entry),
      "its entry a is compressed or encrypted, which torch.save() does not do");
  // Nobody asks for it.
  EXPECT_EQ(
      flaw_of(archive({plain(), {"folder/b", "", /*method=*/8}})), "nothing");
  entry = plain();
  entry.flags = 1;
  EXPECT_THAT(flaw_of(entry), HasSubstr("compressed or encrypted"));
  entry = plain();
  entry.packed = 4;
  EXPECT_THAT(flaw_of(entry), HasSubstr("compressed or encrypted"));
  entry.name = "\x1b[2J";
  EXPECT_THAT(
      flaw_of(archive({entry}), entry.name),
      StartsWith("its entry \\x1b[2J is"));
}

TEST(ZipReader, RejectsOtherFilesAndPartsOfOne) {
  const std::string whole = archive({plain()});
  for (const std::string& bytes :
       {""s,
        "PK\5\6"s,
        std::string(1000, 'a'),
        whole + "a",
        whole.substr(0, whole.size() - 1)}) {
    EXPECT_EQ(flaw_of(bytes), "it is no zip archive, or is cut off");
  }
  EXPECT_EQ(flaw_of(archive({{"b", ""}})), "it has no entry a");
  EXPECT_EQ(flaw_of(archive({})), "it has no entry a");
}

} // namespace
