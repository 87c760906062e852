// SPDX-License-Identifier: MIT

#include "train/weights/state_dict.h"

#include <memcnn/allocation_meter.h>

#include "examples/train/weights/weight_files.h"

#include <caffe2/serialize/inline_container.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace {

using namespace std::string_literals;
using namespace training;
using namespace memcnn_test;
using testing::HasSubstr;
using testing::StrEq;
using testing::ThrowsMessage;

TEST(ReadStateDict, KeepsDtypesStridesAndOffsets) {
  const auto state = read_state_dict(reference("tensors.pt"));
  const auto base = torch::arange(24).to(torch::kFloat32);
  const auto expect = [&](const char* name, const torch::Tensor& expected) {
    EXPECT_EQ(state[name].dtype(), expected.dtype()) << name;
    EXPECT_TRUE(torch::equal(state[name], expected)) << name;
  };
  expect("base", base);
  expect("slice", base.slice(0, 4, 10));
  expect("transposed", base.view({4, 6}).t());
  expect("strided", base.slice(0, 1, 24, 2));
  expect("expanded", base[3].expand({2, 5}));
  expect("empty", torch::zeros({0, 3}));
  expect("scalar", torch::tensor(2.5F));
  expect("parameter", base + 1);
  expect("float64", base.to(torch::kFloat64) / 3);
  expect("float16", base.to(torch::kFloat16));
  expect("bfloat16", base.to(torch::kBFloat16));
  expect("int64", -base.to(torch::kInt64));
  expect("int32", base.to(torch::kInt32));
  expect("int16", base.to(torch::kInt16));
  expect("int8", base.to(torch::kInt8));
  expect("uint8", base.to(torch::kUInt8));
  expect("bool", base > 4);
  EXPECT_EQ(state.size(), 17U);
  EXPECT_TRUE(state["slice"].is_alias_of(state["base"]));
}

TEST(WriteStateDict, KeepsDtypesAndValues) {
  const TemporaryFile file;
  const auto state = read_state_dict(reference("tensors.pt"));
  write_state_dict(file.path(), state);
  const auto again = read_state_dict(file.path());
  EXPECT_EQ(again.keys(), state.keys());
  for (const auto& item : again) {
    EXPECT_EQ(item.value().dtype(), state[item.key()].dtype());
    EXPECT_TRUE(torch::equal(item.value(), state[item.key()])) << item.key();
  }
}

TEST(WriteStateDict, RejectsAPlaceWhereNothingCanBeWritten) {
  EXPECT_THAT(
      [] { write_state_dict("/dev/null/weights.pt", StateDict()); },
      ThrowsMessage<support::Error>(
          HasSubstr("expected the folder /dev/null to be writable")));
}

/// Writes an archive of torch.save() with any pickle in it.
void write_pickle(const std::string& path, const std::string& pickle) {
  caffe2::serialize::PyTorchStreamWriter archive(path);
  archive.writeRecord("data.pkl", pickle.data(), pickle.size());
  archive.writeRecord("data/0", "12345678", 8);
  archive.writeEndOfFile();
}

std::string message_for_pickle(const std::string& pickle) {
  const TemporaryFile file;
  write_pickle(file.path(), pickle);
  return message([&] { read_state_dict(file.path()); });
}

std::string read_bytes(const std::string& path) {
  std::ostringstream bytes;
  bytes << std::ifstream(path, std::ios::binary).rdbuf();
  return bytes.str();
}

std::string pickle_in(const std::string& path) {
  caffe2::serialize::PyTorchStreamReader archive(path);
  std::string bytes(archive.getRecordSize("data.pkl"), '\0');
  archive.getRecord("data.pkl", bytes.data(), bytes.size());
  return bytes;
}

TEST(ReadStateDict, RunsNothing) {
  const TemporaryFile proof;
  pickle::Pickler pickler;
  pickler.global("posix", "system").mark().text("touch " + proof.path());
  EXPECT_THAT(
      message_for_pickle(pickler.tuple().call().finish()),
      HasSubstr("its pickle needs Python's posix.system, which is not run"));
  EXPECT_FALSE(std::filesystem::exists(proof.path()));
  EXPECT_THAT(
      [] { read_state_dict(reference("whole_module.pt")); },
      ThrowsMessage<support::Error>(HasSubstr(
          "whole_module.pt to be a state dict that torch.save() has written, "
          "but its pickle needs Python's torch.nn.modules.linear.Linear, which "
          "is not run. Write it anew with torch.save(model.state_dict(), "
          "file).")));
}

TEST(ReadStateDict, RejectsPicklesOfOtherThings) {
  // INST, which makes an object
  EXPECT_THAT(
      message_for_pickle("(iposix\nsystem\n."),
      HasSubstr("its pickle has the opcode 105, which a dict of tensors does "
                "not need"));
  EXPECT_THAT(
      message_for_pickle("K\x01."), // 1
      HasSubstr("but it holds no dict. "));
  EXPECT_THAT(
      message_for_pickle("}(K\x01K\x02u."), // {1: 2}
      HasSubstr("but it holds something without a name. "));
  EXPECT_THAT(
      message_for_pickle("}(\x8c\x05"
                         "epochK\x02u."), // {"epoch": 2}
      HasSubstr("but \"epoch\" in it is no tensor. "));
  EXPECT_THAT(
      message_for_pickle("}(\x8c\x03net}u."), // {"net": {}}
      HasSubstr("but \"net\" in it is a dict. "));
}

/// {"a": a tensor of the 8 bytes of data/0}
std::string one_tensor(
    const std::string& storage,
    int64_t count,
    int64_t offset,
    at::IntArrayRef sizes,
    at::IntArrayRef strides,
    const std::string& metadata = "") {
  pickle::Pickler pickler;
  pickler.ordered_dict().mark();
  pickler.text("a").global("torch._utils", "_rebuild_tensor_v2").mark();
  pickler.mark().text("storage").global("torch", storage).text("0").text("cpu");
  pickler.integer(count).tuple().stored().integer(offset);
  pickler.integers(sizes).integers(strides).boolean(false).mark().tuple();
  if (!metadata.empty()) {
    pickler.ordered_dict().mark().text(metadata).boolean(true).set_items();
  }
  return pickler.tuple().call().set_items().finish();
}

TEST(ReadStateDict, RejectsTensorsBeyondTheirStorage) {
  constexpr auto kLargest = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(
      message_for_pickle(one_tensor("FloatStorage", 2, 1, {1}, {1})),
      "no error");
  for (const auto& pickle :
       {one_tensor("FloatStorage", 3, 0, {1}, {1}),
        one_tensor("DoubleStorage", 2, 0, {1}, {1}),
        one_tensor("DoubleStorage", kLargest, 0, {1}, {1}),
        one_tensor("FloatStorage", -1, 0, {1}, {1}),
        one_tensor("FloatStorage", 2, 2, {1}, {1}),
        one_tensor("FloatStorage", 2, -1, {1}, {1}),
        one_tensor("FloatStorage", 2, 0, {3}, {1}),
        one_tensor("FloatStorage", 2, 0, {2}, {2}),
        one_tensor("FloatStorage", 2, 0, {2, 2}, {1, 1}),
        one_tensor("FloatStorage", 2, 0, {kLargest, kLargest}, {1, 1}),
        one_tensor("FloatStorage", 2, 0, {kLargest, 9}, {0, 0}),
        one_tensor("FloatStorage", 2, kLargest, {2}, {kLargest}),
        one_tensor("FloatStorage", 2, 1, {2}, {-1}),
        one_tensor("FloatStorage", 2, 0, {-1}, {1}),
        one_tensor("FloatStorage", 2, 0, {2}, {1, 1})}) {
    EXPECT_THAT(
        message_for_pickle(pickle),
        HasSubstr("but a tensor in it is larger than what is stored of it. "));
  }
}

/// What is said of a tensor of one value whose stride is written like this.
std::string message_for_stride(const std::string& stride) {
  std::string pickle = one_tensor("FloatStorage", 2, 0, {1}, {77});
  const std::string written = "\x8a\x08M\0\0\0\0\0\0\0"s;
  pickle.replace(pickle.find(written), written.size(), stride);
  return message_for_pickle(pickle);
}

TEST(ReadStateDict, TakesIntegersOfEveryWidth) {
  for (const std::string& stride :
       {"K\xff"s,
        "M\xff\xff"s,
        "J\xff\xff\xff\x7f"s,
        "\x8a\0"s,
        "\x8a\x01\x7f"s,
        "\x8a\x02\xff\0"s,
        "\x8a\x07\xff\xff\xff\xff\xff\xff\x7f"s,
        "\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f"s}) {
    EXPECT_EQ(message_for_stride(stride), "no error") << stride;
  }
  for (const std::string& negative :
       {"J\xff\xff\xff\xff"s,
        "J\0\0\0\x80"s,
        "\x8a\x01\x80"s,
        "\x8a\x02\xff\xff"s,
        "\x8a\x07\xff\xff\xff\xff\xff\xff\xff"s,
        "\x8a\x08\xff\xff\xff\xff\xff\xff\xff\xff"s}) {
    EXPECT_THAT(message_for_stride(negative), HasSubstr("is larger than"))
        << negative;
  }
}

TEST(ReadStateDict, NegatesWhatPythonNegatesWhenItReads) {
  const auto read_with = [](const std::string& metadata) {
    const TemporaryFile file;
    write_pickle(
        file.path(), one_tensor("CharStorage", 8, 0, {3}, {1}, metadata));
    return read_state_dict(file.path())["a"];
  };
  const auto stored = torch::tensor({'1', '2', '3'}, torch::kChar);
  EXPECT_TRUE(torch::equal(read_with(""), stored));
  EXPECT_TRUE(torch::equal(read_with("neg"), -stored));

  const TemporaryFile file;
  StateDict state;
  state.insert("a", read_with("neg"));
  write_state_dict(file.path(), state);
  EXPECT_TRUE(torch::equal(read_state_dict(file.path())["a"], -stored));
}

TEST(ReadStateDict, RejectsMetadataThatItDoesNotApply) {
  EXPECT_THAT(
      message_for_pickle(one_tensor("FloatStorage", 2, 0, {2}, {1}, "conj")),
      HasSubstr("but a tensor in it has the metadata \"conj\", which is not "
                "applied. "));
  EXPECT_THAT(
      message_for_pickle(one_tensor("BoolStorage", 8, 0, {2}, {1}, "neg")),
      HasSubstr("but its pickle describes no tensor as torch.save() does. "));
}

TEST(ReadStateDict, RejectsTwoTensorsOfOneName) {
  std::string pickle = one_tensor("FloatStorage", 2, 0, {2}, {1});
  const std::string entry =
      pickle.substr(pickle.find("X\x01"), std::string::npos);
  pickle.replace(pickle.size() - 2, 2, entry); // the dict's end, "u."
  EXPECT_THAT(
      message_for_pickle(pickle), HasSubstr("but \"a\" in it is there twice"));
}

/// Reads a file of Python with another pickle in it.
std::string message_for_changed(
    const std::string& original,
    const std::string& pickle) {
  const TemporaryFile file;
  caffe2::serialize::PyTorchStreamReader from(original);
  caffe2::serialize::PyTorchStreamWriter to(file.path());
  to.writeRecord("data.pkl", pickle.data(), pickle.size());
  for (const auto& name : from.getAllRecords()) {
    if (name.compare(0, 5, "data/") == 0) {
      const auto [bytes, size] = from.getRecord(name);
      to.writeRecord(name, bytes.get(), size);
    }
  }
  to.writeEndOfFile();
  return message([&] { read_state_dict(file.path()); });
}

TEST(ReadStateDict, RejectsDamagedPickles) {
  const std::string original = reference("tensors.pt");
  const std::string whole = pickle_in(original);
  EXPECT_EQ(message_for_changed(original, whole), "no error");
  // Cut anywhere: an error, and no crash.
  for (size_t length = 0; length < whole.size(); ++length) {
    const auto text = message_for_changed(original, whole.substr(0, length));
    EXPECT_THAT(text, HasSubstr("its pickle is corrupt")) << length;
  }
  // With any byte changed: no crash, and no other kind of exception.
  for (size_t index = 0; index < whole.size(); ++index) {
    std::string changed = whole;
    changed[index] = static_cast<char>(changed[index] ^ (1 << index % 8));
    message_for_changed(original, changed);
  }
  for (const std::string pickle :
       {".",
        "R.",
        "t.",
        "u.",
        "a.",
        "b.",
        "Q.",
        "))R.",
        "h\x01.",
        "(a.",
        "\x93.",
        "]K\x01u.",
        "}(K\x01u.",
        "}(a.",
        "\x8a\x09.",
        "\x8b\xff\xff\xff\xff.",
        "B\xff\xff\xff\xff.",
        "(\x90.",
        "\x91.",
        "X\xff\xff\xff\xff",
        "c\n",
        "K\x01K\x01s."}) {
    EXPECT_THAT(message_for_pickle(pickle), HasSubstr("its pickle is corrupt"))
        << pickle;
  }
}

/// What is said of a file with these bytes, as "but ...".
std::string flaw_of(const std::string& bytes) {
  const TemporaryFile file;
  std::ofstream(file.path(), std::ios::binary) << bytes;
  const auto text = message([&] { read_state_dict(file.path()); });
  return text.substr(text.find("but "));
}

TEST(ReadStateDict, RejectsDamagedFiles) {
  const std::string whole = read_bytes(reference("tensors.pt"));
  for (const size_t length : {size_t{1}, size_t{100}, whole.size() - 1}) {
    EXPECT_EQ(
        flaw_of(whole.substr(0, length)),
        "but it is no zip archive, or is cut off. Write it anew with "
        "torch.save(model.state_dict(), file).");
  }
}

TEST(ReadStateDict, RejectsWhatIsNoFile) {
  const auto said_of = [](const std::string& path) {
    return message([&] { read_state_dict(path); });
  };
  EXPECT_EQ(
      said_of("/nowhere/weights.pt"),
      "expected /nowhere/weights.pt to be a file of weights, but reading it "
      "failed: No such file or directory. Give one that "
      "torch.save(model.state_dict(), file) has written.");
  EXPECT_THAT(
      said_of(MEMCNN_TEST_DATA_DIR),
      HasSubstr("but reading it failed: it is a directory. "));
  EXPECT_THAT(
      said_of("/dev/null"), HasSubstr("reading it failed: it is a device. "));
}

TEST(ReadStateDict, RejectsOtherFormatsInWords) {
  const std::string anew =
      ". Write it anew with torch.save(model.state_dict(), file).";
  EXPECT_EQ(flaw_of(""), "but it is empty" + anew);
  EXPECT_EQ(flaw_of("\x80\x04\x95"), "but it is a pickle alone" + anew);
  EXPECT_EQ(
      flaw_of(read_bytes(reference("before_1_6.pt"))),
      "but it is in the format before torch 1.6. Write it anew with "
      "torch.save(torch.load(file), new_file).");
  EXPECT_EQ(
      flaw_of("\x40\0\0\0\0\0\0\0{\"weight\":{"s),
      "but it is in the format of safetensors. Write it anew with "
      "torch.save(safetensors.torch.load_file(file), new_file).");
  EXPECT_THAT( // whose size begins as a pickle does
      flaw_of("\x80\0\0\0\0\0\0\0{\"weight\":{"s),
      HasSubstr("but it is in the format of safetensors. "));
  EXPECT_EQ(
      flaw_of("memcnn-checkpoint 3 4815678 fbf43d0e\nPK"),
      "but it is a checkpoint of memcnn_train. Give the file that its run "
      "writes with --save-weights.");

  // It compresses what is longer than 200 bytes.
  std::ostringstream saved;
  torch::save(
      torch::nn::Sequential(
          torch::nn::Linear(1, 1),
          torch::nn::BatchNorm1d(1),
          torch::nn::Linear(1, 1)),
      saved);
  EXPECT_EQ(
      flaw_of(saved.str()),
      "but it is in the format of TorchScript, which torch::save() in C++ "
      "writes, too. Write it anew with "
      "torch.save(torch.jit.load(file).state_dict(), new_file).");
}

TEST(ReadStateDict, RejectsArchivesOfNumPyInWords) {
  std::ostringstream saved;
  {
    caffe2::serialize::PyTorchStreamWriter archive(
        [&](const void* bytes, size_t count) {
          saved.write(static_cast<const char*>(bytes), std::streamsize(count));
          return count;
        });
    archive.writeRecord("head.weight.npy", "\x93NUMPY", 6);
    archive.writeEndOfFile();
  }
  EXPECT_EQ(
      flaw_of(saved.str()),
      "but it is an archive of NumPy. Write it anew with torch.save({name: "
      "torch.from_numpy(array) for name, array in numpy.load(file).items()}, "
      "new_file).");
}

TEST(ReadStateDict, TakesTheStateDictOutOfACheckpoint) {
  for (const std::string key : {"model", "state_dict", "model_state_dict"}) {
    pickle::Pickler checkpoint;
    checkpoint.ordered_dict();
    checkpoint.mark().text("epoch").integer(-3).text(key);
    checkpoint.ordered_dict();
    EXPECT_EQ(message_for_pickle(checkpoint.set_items().finish()), "no error");
  }
}

TEST(ReadStateDict, TakesAnyPlainDataBesideTheStateDict) {
  const std::string checkpoint =
      "}(\x8c\x05model}" // "model": {}
      "N)" // None: ()
      "K\x01K\x02\x86]q\x00(\x88\x89G@\x04\x00\x00\x00\x00\x00\x00h\x00Ne"
      // (1, 2): [True, False, 2.5, the list itself, None]
      "J\xff\xff\xff\xff]K\x01\x61" // -1: [1]
      "u."s;
  EXPECT_EQ(message_for_pickle(checkpoint), "no error");
}

TEST(ReadStateDict, TakesPythonsOtherPlainDataBesideTheStateDict) {
  for (const std::string& value :
       {"ctorch\nfloat32\n"s,
        "ctorch\nSize\nK\x01K\x02\x86\x85R"s,
        "ctorch\ndevice\n\x8c\x03"
        "cpu\x85R"s,
        "c__builtin__\nset\n]\x85R"s,
        "cbuiltins\nfrozenset\n](K\x01K\x02\x65\x85R"s,
        "\x8f(K\x01K\x02\x90"s, // a set of protocol 4
        "(K\x01K\x02\x91"s, // a frozenset
        "c_codecs\nencode\n\x8c\x03"
        "abc\x8c\x06latin1\x86R"s,
        "c__builtin__\nbytearray\n)R"s,
        "B\x03\0\0\0abc"s, // bytes of protocol 3
        "C\x03"
        "abc"s,
        "\x8e\x03\0\0\0\0\0\0\0abc"s,
        "\x96\x03\0\0\0\0\0\0\0abc"s,
        "c__builtin__\ncomplex\nG@\x04\0\0\0\0\0\0h\x01\x86R"s,
        "\x8a\x09\0\0\0\0\0\0\0\0\x01"s, // 2 to the power of 64
        "\x8b\x09\0\0\0\0\0\0\0\0\0\0\0\x01"s}) {
    EXPECT_EQ(
        message_for_pickle(
            "}(K\x01q\x01K\x02\x8c\x05model}\x8c\x01x" + value + "u."),
        "no error")
        << value;
  }
}

TEST(ReadStateDict, RejectsBigEndianFiles) {
  const TemporaryFile file;
  {
    caffe2::serialize::PyTorchStreamWriter archive(file.path());
    archive.writeRecord("data.pkl", "}.", 2);
    archive.writeRecord("byteorder", "big", 3);
    archive.writeEndOfFile();
  }
  EXPECT_THAT(
      [&] { read_state_dict(file.path()); },
      ThrowsMessage<support::Error>(
          HasSubstr("but it is of a big-endian machine. ")));
}

TEST(ReadStateDict, TakesPartOfItselfForWhatItIs) {
  // A dict that holds itself, and tuples in tuples in tuples.
  EXPECT_THAT(
      message_for_pickle("}q\x01\x8c\x01"
                         "ah\x01s."),
      HasSubstr("\"a\" in it is a dict"));
  EXPECT_THAT(
      message_for_pickle(")" + std::string(1000000, '\x85') + "."),
      HasSubstr("holds no dict"));
}

// --- files that ask for more than they have ----------------------------------

TEST(ReadStateDict, LoadsNothingElseForAFlippedBit) {
  StateDict state;
  state.insert("weight", torch::arange(6).view({2, 3}));
  state.insert("bias", torch::tensor({0.5, -2.0}));
  const std::string whole = archive_of(state);
  int refused = 0;
  for (size_t bit = 0; bit < 8 * whole.size(); ++bit) {
    std::string changed = whole;
    changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ (1 << bit % 8));
    std::istringstream file(changed);
    try {
      const StateDict found = read_tensors(file);
      ASSERT_EQ(found.keys(), state.keys()) << bit;
      for (const auto& item : found) {
        ASSERT_EQ(item.value().dtype(), state[item.key()].dtype()) << bit;
        ASSERT_TRUE(torch::equal(item.value(), state[item.key()])) << bit;
      }
    } catch (const FormatError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 8 * 300); // the pickle has more bits
}

/// Peak of the tensors that reading takes, in bytes.
int64_t peak_of_reading(const std::string& bytes) {
  memcnn::AllocationMeter meter(torch::kCPU);
  std::istringstream file(bytes);
  EXPECT_THROW(read_tensors(file), FormatError);
  return meter.peak_bytes();
}

TEST(ReadStateDict, TakesNoMemoryThatTheFileCannotFill) {
  StateDict state;
  state.insert("weight", torch::zeros({16}));
  std::string bytes = archive_of(state);
  // In the list of entries at the end: 64 bytes, packed and as they are.
  const std::string sizes = "@\0\0\0@\0\0\0"s;
  const auto place = bytes.rfind(sizes);
  ASSERT_NE(place, std::string::npos);
  bytes.replace(place, sizes.size(), "@\0\0\x7f@\0\0\x7f"s);
  EXPECT_LT(peak_of_reading(bytes), int64_t{1} << 20);
}

TEST(ReadStateDict, RejectsTensorsOfMoreDimsThanThereCanBe) {
  const auto of_dims = [](size_t count) {
    const std::vector<int64_t> ones(count, 1);
    return message_for_pickle(one_tensor("FloatStorage", 2, 0, ones, ones));
  };
  EXPECT_EQ(of_dims(64), "no error");
  EXPECT_THAT(
      of_dims(65),
      HasSubstr("but its pickle describes no tensor as torch.save() does. "));
}

TEST(ReadStateDict, RejectsPicklesOfTooManyValues) {
  EXPECT_THAT(
      message_for_pickle(std::string((4 << 20) + 1, ')')),
      HasSubstr("but its pickle has 4194305 bytes, where a dict of tensors "
                "has at most 4194304. "));
}

TEST(ReadStateDict, ShowsNamesWithoutTheirEscapes) {
  EXPECT_THAT(
      message_for_pickle("}(\x8c\x05"
                         "a\x1b[2JK\x02u."),
      HasSubstr("but \"a\\x1b[2J\" in it is no tensor"));
  EXPECT_THAT(
      message_for_pickle("cposix\n\x1b[2J\n."),
      HasSubstr("needs Python's posix.\\x1b[2J, which"));
}

} // namespace
