// SPDX-License-Identifier: MIT

// The program of examples/revnet as its users meet it.

#include "support/program.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <regex>
#include <string>

namespace {

using memcnn_test::write;

constexpr size_t kRecordBytes = 3073;

class RevNetProgram : public memcnn_test::ProgramTest {
 protected:
  memcnn_test::Result revnet(const std::string& arguments) {
    return shell("OMP_NUM_THREADS=1 '" REVNET "' " + arguments);
  }

  void expect_error(const std::string& arguments, const std::string& message) {
    const auto result = revnet(arguments);
    EXPECT_EQ(result.exit_code, 1);
    EXPECT_EQ(
        result.err,
        "revnet: " + message + "\nusage: revnet [NETWORK] [STEPS] [FOLDER]\n");
    EXPECT_EQ(result.out, "");
  }

  /// Files like CIFAR-10's, of a record each, whose labels are all `label`.
  void write_cifar10(char label) {
    const std::string record(kRecordBytes, label);
    for (const char number : std::string("12345")) {
      write(
          directory_ / (std::string("data_batch_") + number + ".bin"), record);
    }
    write(directory_ / "test_batch.bin", record);
  }
};

TEST_F(RevNetProgram, LearnsFromTheFilesOfCifar10) {
  write_cifar10(/*label=*/3);
  const auto result = revnet("revnet38 10 .");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_TRUE(std::regex_match(
      result.out,
      std::regex("step:10 loss:[0-9.e-]+ accuracy:1 ms:\\d+\n"
                 "test_accuracy:[01]\n"
                 "held_mib:[0-9.]+ held_mib_if_plain:[0-9.]+\n")))
      << result.out;
}

TEST_F(RevNetProgram, RejectsUnknownNetwork) {
  expect_error(
      "revnet39",
      "revnet::named(): expected a name out of resnet32 resnet110 resnet164 "
      "revnet38 revnet110 revnet164, but got \"revnet39\".");
}

TEST_F(RevNetProgram, RejectsWhatIsNoNumberOfSteps) {
  for (const std::string steps :
       {"many", "-3", "0", "1e3", "10x", "1000000001"}) {
    expect_error(
        "revnet38 " + steps,
        "expected STEPS from 1 to 1000000000, but got " + steps + ".");
  }
}

TEST_F(RevNetProgram, RejectsMissingFolder) {
  expect_error(
      "revnet38 1 nowhere",
      "expected a file nowhere/data_batch_1.bin, but there is none. Give the "
      "folder of CIFAR-10's binary version.");
}

TEST_F(RevNetProgram, RejectsTruncatedFile) {
  write_cifar10(/*label=*/3);
  std::filesystem::resize_file(directory_ / "test_batch.bin", 3072);
  expect_error(
      "revnet38 1 .",
      "expected ./test_batch.bin to hold records of 3073 bytes, but read 3072 "
      "bytes. Give the folder of CIFAR-10's binary version.");
}

TEST_F(RevNetProgram, RejectsLabelsOfAnotherDataSet) {
  write_cifar10(/*label=*/99);
  expect_error(
      "revnet38 1 .",
      "expected labels below 10 in ./data_batch_1.bin, but got 99. Give the "
      "folder of CIFAR-10's binary version.");
}

} // namespace
