// SPDX-License-Identifier: MIT

#include "train/step/network.h"
#include "train/weights/python_weights.h"

#include <caffe2/serialize/inline_container.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <unistd.h>

namespace {

using namespace training;
using testing::HasSubstr;
using testing::StartsWith;
using testing::StrEq;
using testing::ThrowsMessage;

std::string reference(const std::string& name) {
  return std::string(MEMCNN_TEST_DATA_DIR) + "/weights/" + name;
}

/// A name for a file that goes when the test ends.
class TemporaryFile final {
 public:
  TemporaryFile()
      : path_(
            std::filesystem::temp_directory_path() /
            ("memcnn_weights_" + std::to_string(::getpid()) + ".pt")) {}
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
  }

  std::string path() const {
    return path_.string();
  }

 private:
  std::filesystem::path path_;
};

std::string message(const std::function<void()>& action) {
  try {
    action();
  } catch (const support::Error& error) {
    return error.what();
  }
  return "no error";
}

/// The networks of tests/reference/generate_weights.py.
torch::nn::AnyModule network(
    const std::string& name,
    const std::string& engine = "sequence") {
  if (name == "small_revnet") {
    return torch::nn::AnyModule(revnet::RevNet(
        revnet::RevNetOptions().stem(4).widths({4, 6, 8}).blocks({2, 1, 2})));
  }
  if (name == "small_resnet") {
    return torch::nn::AnyModule(resnet::ResNet(resnet::ResNetOptions()
                                                   .stem(4)
                                                   .widths({2, 3, 4})
                                                   .blocks({1, 2, 1})
                                                   .bottleneck(true)));
  }
  Config config;
  config.model = name;
  config.engine = engine;
  return make_network(config, /*num_classes=*/10);
}

torch::Tensor wave(at::IntArrayRef sizes, double phase) {
  const int64_t count = c10::multiply_integers(sizes);
  const auto sines =
      torch::sin(torch::arange(count).to(torch::kFloat64) + phase);
  return torch::sin(1e4 * sines).view(sizes);
}

bool ends_with(const std::string& text, const std::string& ending) {
  return text.size() >= ending.size() &&
      text.compare(text.size() - ending.size(), ending.size(), ending) == 0;
}

/// fill() of generate_weights.py.
torch::Tensor values_of(const std::string& name, const torch::Tensor& tensor) {
  int64_t phase = 0;
  for (size_t index = 0; index < name.size(); ++index) {
    phase += static_cast<int64_t>(index + 1) * name[index];
  }
  if (ends_with(name, "num_batches_tracked")) {
    return torch::tensor(phase % 1000);
  }
  auto values = wave(tensor.sizes(), static_cast<double>(phase));
  if (tensor.dim() == 4) {
    const auto fan_in = static_cast<double>(tensor[0].numel());
    return values * std::sqrt(2.0 / fan_in);
  }
  return ends_with(name, "running_var") || ends_with(name, "weight")
      ? 0.7 + 0.2 * values
      : 0.1 * values;
}

void fill(const StateDict& state) {
  const torch::NoGradGuard no_grad;
  for (const auto& item : state) {
    torch::Tensor target = item.value();
    target.copy_(values_of(item.key(), target));
  }
}

// --- the same logits as in Python -------------------------------------------

double relative_error(const torch::Tensor& found, const torch::Tensor& wanted) {
  return ((found - wanted).abs().max() / wanted.abs().max()).item<double>();
}

/// Compares with what Python's network of that name makes of the same input, in
/// float64.
void expect_python_logits(
    torch::nn::AnyModule& net,
    const std::string& name,
    torch::ScalarType dtype,
    double tolerance) {
  static const StateDict logits = read_state_dict(reference("logits.pt"));
  const auto input = wave({4, 3, 32, 32}, 0.5).to(dtype);
  const torch::NoGradGuard no_grad;
  for (const char* mode : {"train", "eval"}) {
    net.ptr()->train(mode == std::string("train"));
    const double error = relative_error(
        net.forward(input).to(torch::kFloat64), logits[name + "." + mode]);
    EXPECT_LT(error, tolerance) << name << ", " << mode << ", " << dtype;
  }
}

constexpr double kFloat32 = 5e-5; // of the largest logit; 4e-6 on one processor

class Weights : public testing::TestWithParam<const char*> {};

TEST_P(Weights, GiveTheLogitsOfPython) {
  for (const auto& [dtype, tolerance] :
       {std::pair{torch::kFloat64, 1e-12},
        std::pair{torch::kFloat32, kFloat32}}) {
    auto net = network(GetParam());
    net.ptr()->to(dtype);
    fill(python_state(*net.ptr()));
    expect_python_logits(net, GetParam(), dtype, tolerance);
  }
}

TEST_P(Weights, AreAllNamed) {
  const auto net = network(GetParam());
  const auto state = python_state(*net.ptr());
  EXPECT_EQ(
      state.size(),
      net.ptr()->parameters().size() + net.ptr()->buffers().size());
}

INSTANTIATE_TEST_SUITE_P(
    OfEveryModel,
    Weights,
    testing::Values(
        "resnet32",
        "resnet110",
        "resnet164",
        "revnet38",
        "revnet110",
        "revnet164",
        "small_revnet",
        "small_resnet"),
    [](const auto& tested) { return std::string(tested.param); });

TEST(PythonWeights, AreReadAsTorchSaveWritesThem) {
  for (const std::string name : {"small_revnet", "small_resnet"}) {
    auto net = network(name);
    load_python_weights(reference(name + ".pt"), name, *net.ptr());
    for (const auto& item : python_state(*net.ptr())) {
      // The formula is not computed by the same code on both sides.
      EXPECT_TRUE(torch::allclose(
          item.value().to(torch::kFloat64),
          values_of(item.key(), item.value()).to(torch::kFloat64),
          1e-6))
          << item.key();
    }
    expect_python_logits(net, name, torch::kFloat32, kFloat32);
  }
}

TEST(PythonWeights, AreReadFromACheckpointOfDataParallel) {
  auto net = network("small_revnet");
  const auto state = python_state(*net.ptr());
  state["bn1.num_batches_tracked"].fill_(7);
  load_python_weights(reference("checkpoint.pt"), "a net", *net.ptr());
  for (const auto& item : read_state_dict(reference("small_revnet.pt"))) {
    if (ends_with(item.key(), "num_batches_tracked")) {
      EXPECT_EQ(state[item.key()].item<int64_t>(), 0); // not in the checkpoint
    } else {
      EXPECT_TRUE(torch::equal(state[item.key()], item.value())) << item.key();
    }
  }
}

TEST(PythonWeights, AreTheSameUnderEveryEngine) {
  const auto sequence = python_state(*network("revnet38").ptr());
  for (const char* engine : {"wrapper", "plain"}) {
    const auto state = python_state(*network("revnet38", engine).ptr());
    EXPECT_EQ(state.keys(), sequence.keys());
    for (const auto& item : state) {
      EXPECT_TRUE(torch::equal(item.value(), sequence[item.key()]));
    }
  }
}

TEST(PythonWeights, ComeBackFromTheFileTheyAreSavedIn) {
  for (const std::string name : {"small_revnet", "small_resnet", "revnet38"}) {
    const TemporaryFile file;
    const auto net = network(name);
    const auto state = python_state(*net.ptr());
    fill(state);
    save_python_weights(file.path(), *net.ptr());
    EXPECT_FALSE(std::filesystem::exists(file.path() + ".partial"));

    const auto written = read_state_dict(file.path());
    EXPECT_EQ(written.keys(), state.keys());
    const auto other = network(name);
    load_python_weights(file.path(), name, *other.ptr());
    for (const auto& item : python_state(*other.ptr())) {
      EXPECT_TRUE(torch::equal(item.value(), state[item.key()])) << item.key();
      EXPECT_EQ(item.value().dtype(), written[item.key()].dtype());
    }
  }
}

TEST(PythonWeights, HaveTheNamesThatPythonGivesThem) {
  for (const std::string name : {"small_revnet", "small_resnet"}) {
    auto found = python_state(*network(name).ptr()).keys();
    auto expected = read_state_dict(reference(name + ".pt")).keys();
    std::sort(found.begin(), found.end());
    std::sort(expected.begin(), expected.end());
    EXPECT_EQ(found, expected);
  }
}

// --- weights that do not fit ------------------------------------------------

/// What loading says after `change` has been made to a fitting state dict.
std::string message_after(const std::function<void(StateDict&)>& change) {
  const TemporaryFile file;
  auto state = read_state_dict(reference("small_revnet.pt"));
  change(state);
  write_state_dict(file.path(), state);
  const auto net = network("small_revnet");
  const auto before = python_state(*net.ptr());
  StateDict copies;
  for (const auto& item : before) {
    copies.insert(item.key(), item.value().clone());
  }
  std::string text = message(
      [&] { load_python_weights(file.path(), "revnet38", *net.ptr()); });
  for (const auto& item : before) {
    EXPECT_TRUE(torch::equal(item.value(), copies[item.key()]));
  }
  const auto at = text.find(file.path());
  return at == std::string::npos ? text
                                 : text.replace(at, file.path().size(), "FILE");
}

void rename(StateDict& state, const std::string& from, const std::string& to) {
  StateDict renamed;
  for (const auto& item : state) {
    renamed.insert(item.key() == from ? to : item.key(), item.value());
  }
  state = renamed;
}

TEST(PythonWeights, RejectMissingEntries) {
  EXPECT_EQ(
      message_after([](StateDict& state) { state.erase("fc.bias"); }),
      "expected FILE to have all weights of revnet38, but it lacks "
      "\"fc.bias\". Give the file of a revnet38.");
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state.erase("fc.bias");
        state.erase("layer3.0.basicblock_sub.conv1.weight");
      }),
      "expected FILE to have all weights of revnet38, but it lacks "
      "\"layer3.0.basicblock_sub.conv1.weight\" and 1 more. Give the file of a "
      "revnet38.");
  EXPECT_THAT(
      message_after([](StateDict& state) { state.clear(); }),
      StartsWith("expected FILE to have all weights of revnet38, but it lacks "
                 "\"conv1.weight\" and"));
}

TEST(PythonWeights, RejectUnexpectedEntries) {
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state.insert("layer4.0.conv1.weight", torch::zeros({1}));
      }),
      "expected FILE to have the weights of revnet38 alone, but it has "
      "\"layer4.0.conv1.weight\", too. Give the file of a revnet38.");
  EXPECT_EQ(
      message_after(
          [](StateDict& state) { rename(state, "fc.bias", "head.bias"); }),
      "expected FILE to have all weights of revnet38, but it lacks "
      "\"fc.bias\", "
      "and has \"head.bias\". Give the file of a revnet38.");
}

TEST(PythonWeights, RejectOtherShapesAndKinds) {
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state["fc.weight"] = torch::zeros({100, 8});
      }),
      "expected \"fc.weight\" in FILE to have sizes [10, 8] and dtype float, "
      "but "
      "got sizes [100, 8] and dtype float. Give the file of a revnet38 for as "
      "many classes.");
  // one value, which would fit each of ten
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state["fc.bias"] = state["fc.bias"].narrow(0, 0, 1);
      }),
      "expected \"fc.bias\" in FILE to have sizes [10] and dtype float, but "
      "got "
      "sizes [1] and dtype float. Give the file of a revnet38 for as many "
      "classes.");
  EXPECT_EQ(
      message_after([](StateDict& state) {
        state["fc.bias"] = state["fc.bias"].to(torch::kInt64);
      }),
      "expected \"fc.bias\" in FILE to have sizes [10] and dtype float, but "
      "got "
      "sizes [10] and dtype long int. Give the file of a revnet38 for as many "
      "classes.");
}

TEST(PythonWeights, AreRoundedToTheDtypeOfTheNetwork) {
  const TemporaryFile file;
  const auto original = read_state_dict(reference("small_revnet.pt"));
  for (const auto dtype :
       {torch::kFloat64, torch::kFloat16, torch::kBFloat16}) {
    StateDict state;
    for (const auto& item : original) {
      const auto& tensor = item.value();
      state.insert(
          item.key(), tensor.is_floating_point() ? tensor.to(dtype) : tensor);
    }
    write_state_dict(file.path(), state);
    const auto net = network("small_revnet");
    load_python_weights(file.path(), "a net", *net.ptr());
    for (const auto& item : python_state(*net.ptr())) {
      const auto& wanted = original[item.key()];
      EXPECT_EQ(item.value().dtype(), wanted.dtype());
      EXPECT_TRUE(
          torch::equal(item.value(), state[item.key()].to(wanted.dtype())));
    }
  }
}

// --- files of torch.save() --------------------------------------------------

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
      [] { write_state_dict("/nowhere/weights.pt", StateDict()); },
      ThrowsMessage<support::Error>(
          HasSubstr("expected /nowhere/weights.pt to be writable, but writing "
                    "it failed")));
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
  const auto text = message_for_pickle(
      "\x80\x02"
      "cposix\nsystem\nX" +
      std::string("\x06\0\0\0", 4) + "touch " + "\x85R.");
  EXPECT_THAT(
      text, HasSubstr("it needs Python's posix.system, which is not run"));
  EXPECT_THAT(
      [] { read_state_dict(reference("whole_module.pt")); },
      ThrowsMessage<support::Error>(HasSubstr(
          "whole_module.pt to hold a dict of tensors, but it needs Python's "
          "torch.nn.modules.linear.Linear, which is not run. Write it with "
          "torch.save(model.state_dict(), file).")));
}

TEST(ReadStateDict, RejectsPicklesOfOtherThings) {
  // INST, which makes an object
  EXPECT_THAT(
      message_for_pickle("(iposix\nsystem\n."),
      HasSubstr("its pickle has the opcode 105, which that does not need"));
  EXPECT_THAT(
      message_for_pickle("K\x01."), // 1
      HasSubstr("to hold a dict of tensors, but it holds something else"));
  EXPECT_THAT(
      message_for_pickle("}(K\x01K\x02u."), // {1: 2}
      HasSubstr("to be a named tensor, but one has no name"));
  EXPECT_THAT(
      message_for_pickle("}(\x8c\x05"
                         "epochK\x02u."), // {"epoch": 2}
      HasSubstr("to be a named tensor, but \"epoch\" is none"));
}

/// {"a": a tensor of the 8 bytes of data/0}
std::string one_tensor(
    const std::string& storage,
    int64_t count,
    int64_t offset,
    at::IntArrayRef sizes,
    at::IntArrayRef strides) {
  pickle::Pickler pickler;
  pickler.global("collections", "OrderedDict").mark().tuple().call().mark();
  pickler.text("a").global("torch._utils", "_rebuild_tensor_v2").mark();
  pickler.mark().text("storage").global("torch", storage).text("0").text("cpu");
  pickler.integer(count).tuple().stored().integer(offset);
  pickler.integers(sizes).integers(strides).boolean(false).mark().tuple();
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
    EXPECT_THAT(message_for_pickle(pickle), HasSubstr("it cannot be read"));
  }
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
        "X\xff\xff\xff\xff",
        "c\n",
        "K\x01K\x01s."}) {
    EXPECT_THAT(message_for_pickle(pickle), HasSubstr("its pickle is corrupt"))
        << pickle;
  }
}

TEST(ReadStateDict, RejectsDamagedFiles) {
  const std::string whole = read_bytes(reference("tensors.pt"));
  const TemporaryFile file;
  for (const size_t length : {size_t{0}, size_t{100}, whole.size() - 1}) {
    std::ofstream(file.path(), std::ios::binary) << whole.substr(0, length);
    EXPECT_THAT(
        [&] { read_state_dict(file.path()); },
        ThrowsMessage<support::Error>(StrEq(
            "expected " + file.path() +
            " to be a whole file of torch.save(), but it cannot be read: it is "
            "truncated, corrupt, or something else. Write it anew with "
            "torch.save(model.state_dict(), file).")));
  }
}

TEST(ReadStateDict, RejectsMissingFilesAndFoldersAndOldFormats) {
  EXPECT_THAT(
      [] { read_state_dict("/nowhere/weights.pt"); },
      ThrowsMessage<support::Error>(
          StrEq("expected /nowhere/weights.pt to be a file of weights, but "
                "there is no such file.")));
  EXPECT_THAT(
      [] { read_state_dict(MEMCNN_TEST_DATA_DIR); },
      ThrowsMessage<support::Error>(HasSubstr("but there is no such file")));
  EXPECT_THAT(
      [] { read_state_dict(reference("before_1_6.pt")); },
      ThrowsMessage<support::Error>(
          HasSubstr("before_1_6.pt to be in the format of torch 1.6 or later, "
                    "but it is in the one before. Load it with torch.load() in "
                    "Python and write it anew")));
}

TEST(ReadStateDict, TakesTheStateDictOutOfACheckpoint) {
  for (const std::string key : {"model", "state_dict"}) {
    pickle::Pickler checkpoint;
    checkpoint.global("collections", "OrderedDict").mark().tuple().call();
    checkpoint.mark().text("epoch").integer(-3).text(key);
    checkpoint.global("collections", "OrderedDict").mark().tuple().call();
    EXPECT_EQ(message_for_pickle(checkpoint.set_items().finish()), "no error");
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
      ThrowsMessage<support::Error>(HasSubstr(
          "to be of a little-endian machine, but it is of a big-endian one")));
}

TEST(ReadStateDict, TakesPartOfItselfForWhatItIs) {
  // A dict that holds itself, and tuples in tuples in tuples.
  EXPECT_THAT(
      message_for_pickle("}q\x01\x8c\x01"
                         "ah\x01s."),
      HasSubstr("\"a\" is none"));
  EXPECT_THAT(
      message_for_pickle(")" + std::string(1000000, '\x85') + "."),
      HasSubstr("holds something else"));
}

} // namespace
