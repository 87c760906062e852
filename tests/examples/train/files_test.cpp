// SPDX-License-Identifier: MIT

// memcnn_train where something else stands in the place of its files, or where
// they are deleted, moved or linked while it runs.

#include "support/train_program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <cstdint>
#include <filesystem>
#include <string>

#include <sys/stat.h>

namespace {

namespace fs = std::filesystem;
using memcnn_test::read;
using memcnn_test::Result;
using memcnn_test::write;
using testing::HasSubstr;

class FilesOfARun : public memcnn_test::TrainProgramTest {
 protected:
  void make_pipe(const fs::path& path) {
    fs::create_directories(path.parent_path());
    ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
  }

  /// Evaluates random weights and writes them to a file.
  Result save_weights(const std::string& file) {
    return short_run(
        "resnet32 synthetic --iterations 0 --fresh --results-dir here "
        "--save-weights " +
        file);
  }

  /// A run of many steps in `here`, during which the shell runs a command, and
  /// which is then asked to stop. What it says itself is in the files rows and
  /// err_of_run.
  Result during_a_run(const std::string& command) {
    return train_shell(
        "$TRAIN " +
        brief("resnet32 synthetic --iterations 100000 --checkpoint-every 0 "
              "--results-dir here") +
        " > rows 2> err_of_run & run=$!; until grep -qs loss rows; do "
        "sleep 0.05; done; " +
        command + "; kill -INT $run; wait $run");
  }

  std::string err_of_run() const {
    return read(directory_ / "err_of_run");
  }

  /// Refused in words, and never waited for.
  void expect_refused(
      const std::string& arguments,
      const std::string& file,
      const std::string& what,
      const std::string& flag = "--results-dir") {
    expect_error(
        train_shell("timeout 60 $TRAIN " + brief(arguments)),
        "expected " + file + " to be a file or nothing yet, but it is " + what +
            ". Move it away, or give another " + flag + ".");
  }
};

TEST_F(FilesOfARun, AreNotPutWhereSomethingElseIs) {
  const std::string run = "resnet32 synthetic --iterations 1 --results-dir ";
  for (const std::string name :
       {"run.json",
        "log.jsonl",
        "results.json",
        "checkpoint.memcnn",
        "checkpoint.previous.memcnn"}) {
    const std::string pipe = "pipe_" + name;
    make_pipe(directory_ / pipe / name);
    expect_refused(run + pipe, pipe + "/" + name, "a pipe");
    expect_refused(run + pipe + " --fresh", pipe + "/" + name, "a pipe");
    EXPECT_TRUE(fs::is_fifo(directory_ / pipe / name));

    const std::string folder = "folder_" + name;
    fs::create_directories(directory_ / folder / name);
    expect_refused(run + folder, folder + "/" + name, "a directory");
    expect_refused(
        run + folder + " --fresh", folder + "/" + name, "a directory");
    EXPECT_TRUE(fs::is_directory(directory_ / folder / name));
  }
}

TEST_F(FilesOfARun, AreNotPutOverThoseOfAnotherProgram) {
  for (const std::string name : {"log.jsonl", "results.json", "run.json"}) {
    const auto file = directory_ / "mine" / name;
    fs::create_directories(directory_ / "mine");
    write(file, "{\"mine\": 1}\n");
    const std::string run =
        "resnet32 synthetic --iterations 1 --results-dir mine";
    expect_error(
        short_run(run),
        "expected mine/" + name +
            " to be nothing yet, or of a run of this program, but it begins "
            "otherwise. Move it away, give another --results-dir, or --fresh "
            "to overwrite it.");
    EXPECT_EQ(read(file), "{\"mine\": 1}\n");
    EXPECT_FALSE(fs::exists(directory_ / "mine" / "lock"));
    EXPECT_EQ(short_run(run + " --fresh").exit_code, 0);
    fs::remove_all(directory_ / "mine");
  }
}

TEST_F(FilesOfARun, AreNoneWhereTheRunIsRefused) {
  const std::string run =
      "resnet32 synthetic --iterations 1 --load-weights gone.pt "
      "--results-dir ";
  EXPECT_EQ(short_run(run + "a/new/folder").exit_code, 1);
  EXPECT_FALSE(fs::exists(directory_ / "a"));
  fs::create_directories(directory_ / "old");
  EXPECT_EQ(short_run(run + "old").exit_code, 1);
  EXPECT_TRUE(fs::is_empty(directory_ / "old"));
}

TEST_F(FilesOfARun, AreNotWhatTheProgramPrintsInto) {
  fs::create_directories(directory_ / "here");
  const auto result =
      train_shell("$TRAIN " + six_steps() + " > here/log.jsonl");
  EXPECT_EQ(
      result.err,
      "memcnn_train: expected here/log.jsonl to be a file or nothing yet, but "
      "it is what this program prints into. Move it away, or give another "
      "--results-dir.\n");
  EXPECT_EQ(result.exit_code, 1);
}

TEST_F(FilesOfARun, DoNotWaitForAPipeBesideACheckpoint) {
  make_pipe(here("checkpoint.memcnn.memcnn-partial"));
  const auto result = train_shell("timeout 60 $TRAIN " + six_steps());
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_EQ(
      result.err,
      "memcnn_train: expected here/checkpoint.memcnn.memcnn-partial to be a file or "
      "nothing yet, but it is a pipe. Move it away, or give another "
      "--results-dir.\n");
}

TEST_F(FilesOfARun, AreWrittenToNoFileBehindALinkBesideThem) {
  fs::create_directories(directory_ / "here");
  write(directory_ / "mine", "a text of mine");
  fs::create_symlink("../mine", here("run.json.memcnn-partial"));
  fs::create_symlink("../mine", here("checkpoint.memcnn.memcnn-partial"));
  EXPECT_EQ(train(six_steps()).exit_code, 0);
  EXPECT_EQ(read(directory_ / "mine"), "a text of mine");
}

TEST_F(FilesOfARun, KeepBothCheckpointsWhereTheDiskIsFull) {
  ASSERT_EQ(train(six_steps()).exit_code, 0);
  fs::rename(here("checkpoint.previous.memcnn"), here("checkpoint.memcnn"));
  write(here("checkpoint.previous.memcnn"), "the one before the last");
  const auto last = read(here("checkpoint.memcnn"));
  // No file may grow over 1000 blocks of 512 bytes.
  const auto full =
      train_shell("(ulimit -f 1000; exec $TRAIN " + six_steps() + ")");
  EXPECT_EQ(full.exit_code, 1);
  EXPECT_THAT(full.err, HasSubstr("File too large"));
  EXPECT_EQ(read(here("checkpoint.memcnn")), last);
  EXPECT_EQ(
      read(here("checkpoint.previous.memcnn")), "the one before the last");
}

TEST_F(FilesOfARun, KeepAPreviousCheckpointWhoseSuccessorIsGone) {
  ASSERT_EQ(train(six_steps()).exit_code, 0);
  fs::remove(here("checkpoint.memcnn"));
  const auto previous = read(here("checkpoint.previous.memcnn"));
  expect_error(
      train(six_steps()),
      "expected the checkpoint here/checkpoint.memcnn to be there, since "
      "here/checkpoint.previous.memcnn is, but there is none. Give "
      "--from-previous to go on from the one that is there, or --fresh to start "
      "anew.");
  EXPECT_EQ(read(here("checkpoint.previous.memcnn")), previous);
  EXPECT_EQ(train(six_steps() + " --from-previous").exit_code, 0);
}

TEST_F(FilesOfARun, AreNotReadWhereTheyAreFarTooLarge) {
  constexpr uintmax_t kTebibyte = uintmax_t{1} << 40; // more than any memory
  fs::create_directories(directory_ / "here");
  const auto expect_refused_behind = [&](const std::string& start,
                                         const std::string& flaw) {
    write(here("checkpoint.memcnn"), start);
    fs::resize_file(here("checkpoint.memcnn"), start.size() + kTebibyte);
    expect_error(
        train_shell("timeout 60 $TRAIN " + six_steps()),
        "expected here/checkpoint.memcnn to be a checkpoint of this program, "
        "but " +
            flaw + ". Give --fresh to overwrite it, or another --results-dir.");
  };
  expect_refused_behind("", "it is something else or damaged");
  expect_refused_behind(
      "memcnn-checkpoint 3 5 8f2890a2\n",
      "it has 1099511627776 bytes instead of 5: it is damaged");
}

TEST_F(FilesOfARun, StayLockedWhereTheLockFileIsDeleted) {
  const auto result =
      during_a_run("rm here/lock; $TRAIN " + six_steps() + " --fresh; echo $?");
  EXPECT_EQ(result.out, "1\n");
  EXPECT_EQ(
      result.err,
      "memcnn_train: expected the results directory here to be free, but "
      "another run is using it. Wait for its end, or give another "
      "--results-dir.\n");
  EXPECT_EQ(result.exit_code, 128 + SIGINT) << err_of_run();
}

TEST_F(FilesOfARun, GetIntoNoFolderMadeInThePlaceOfTheirs) {
  // No row comes in between: the checkpoint is all that the first run writes.
  const auto result = train_shell(
      "$TRAIN resnet32 synthetic --iterations 100000 --checkpoint-every 0 "
      "--log-every 100000 --batch-size 4 --threads 1 --no-cuda --results-dir "
      "here 2> err_of_run & run=$!; until [ -e here/log.jsonl ]; do sleep "
      "0.05; done; rm -r here; $TRAIN " +
      six_steps() +
      " > rows; cp here/checkpoint.memcnn second; kill -INT $run; wait $run");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_EQ(
      err_of_run(),
      "memcnn_train: expected the folder here to be there until all is "
      "written, but it was deleted. Give the same command again to start "
      "anew.\n");
  EXPECT_EQ(read(here("checkpoint.memcnn")), read(directory_ / "second"));
  EXPECT_FALSE(fs::exists(here("checkpoint.previous.memcnn.memcnn-partial")));
}

TEST_F(FilesOfARun, StopItWhereTheLogIsDeleted) {
  const auto result = during_a_run("rm here/log.jsonl; sleep 1");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_EQ(
      err_of_run(),
      "memcnn_train: expected the log here/log.jsonl to be there until all is "
      "written, but it was deleted. Give the same command again to go on from "
      "the last checkpoint.\n");
}

TEST_F(FilesOfARun, MoveWithTheirFolder) {
  const auto result = during_a_run("mv here there");
  EXPECT_EQ(result.exit_code, 128 + SIGINT) << err_of_run();
  EXPECT_TRUE(fs::exists(directory_ / "there" / "checkpoint.memcnn"));
  EXPECT_FALSE(fs::exists(directory_ / "here"));
}

TEST_F(FilesOfARun, LeadThroughLinksToTheirWeights) {
  fs::create_symlink("kept/weights.pt", directory_ / "second");
  fs::create_symlink(directory_ / "second", directory_ / "first");
  for (int time = 0; time < 2; ++time) { // once there is none behind them yet
    const auto result = save_weights("first");
    ASSERT_EQ(result.exit_code, 0) << result.err;
    EXPECT_TRUE(fs::is_symlink(directory_ / "first"));
    EXPECT_TRUE(fs::is_symlink(directory_ / "second"));
    EXPECT_GT(fs::file_size(directory_ / "kept" / "weights.pt"), 1000U);
  }
}

TEST_F(FilesOfARun, LeaveAFileOfTheUsersBesideTheirWeights) {
  write(directory_ / "weights.pt.partial", "of a download");
  ASSERT_EQ(save_weights("weights.pt").exit_code, 0);
  EXPECT_EQ(read(directory_ / "weights.pt.partial"), "of a download");
  EXPECT_FALSE(fs::exists(directory_ / "weights.pt.memcnn-partial"));
}

TEST_F(FilesOfARun, KeepTheirPermissions) {
  write(directory_ / "weights.pt", "old");
  fs::permissions(directory_ / "weights.pt", fs::perms::owner_read);
  ASSERT_EQ(save_weights("weights.pt").exit_code, 0);
  EXPECT_NE(read(directory_ / "weights.pt"), "old");
  EXPECT_EQ(
      fs::status(directory_ / "weights.pt").permissions(),
      fs::perms::owner_read);
}

TEST_F(FilesOfARun, ReplaceNothingButAFileByWeights) {
  make_pipe(directory_ / "pipe");
  fs::create_symlink("pipe", directory_ / "link_to_pipe");
  fs::create_symlink("/dev/null", directory_ / "null");
  fs::create_symlink("loop", directory_ / "loop");
  // As /dev/stdout is one, which as root could be replaced.
  fs::create_symlink("/proc/self/fd/1", directory_ / "stdout");
  const std::string run =
      "resnet32 synthetic --iterations 0 --results-dir here --save-weights ";
  const auto expect_kept = [&](const std::string& file,
                               const std::string& what) {
    expect_refused(run + file, file, what, "--save-weights");
  };
  expect_kept("pipe", "a pipe");
  expect_kept("link_to_pipe", "a pipe");
  expect_kept("null", "a device");
  expect_kept("new/", "a directory");
  expect_kept("loop", "a link to itself");
  expect_kept("stdout", "what this program prints into"); // a file of the test
  const auto piped = train_shell("$TRAIN " + brief(run + "stdout") + " | cat");
  EXPECT_THAT(
      piped.err,
      HasSubstr("expected stdout to be a file or nothing "
                "yet, but it is a pipe."));
  EXPECT_TRUE(fs::is_fifo(directory_ / "pipe"));
  for (const char* link : {"link_to_pipe", "null", "loop", "stdout"}) {
    EXPECT_TRUE(fs::is_symlink(directory_ / link)) << link;
  }
}

TEST_F(FilesOfARun, AreNotReplacedByItsWeights) {
  fs::create_directories(directory_ / "here");
  fs::create_directories(directory_ / "data");
  write(directory_ / "data" / "test.bin", "images");
  fs::create_hard_link(directory_ / "data" / "test.bin", directory_ / "images");
  fs::create_symlink("here/log.jsonl", directory_ / "link_to_log");
  for (const std::string file :
       {"here/lock",
        "here/run.json",
        "here/results.json",
        "here/log.jsonl",
        "here/checkpoint.memcnn",
        "here/checkpoint.memcnn.memcnn-partial",
        "here/../here/checkpoint.previous.memcnn",
        "there/../here/checkpoint.previous.memcnn.memcnn-partial",
        "link_to_log",
        "data/train.bin",
        "data/test.bin",
        "images"}) {
    expect_error(
        short_run(
            "resnet32 cifar100 --data-dir data --results-dir here "
            "--save-weights " +
            file),
        "expected --save-weights to be a file that the run has no other use "
        "for, but got " +
            file + ". Give another --save-weights.");
  }
  EXPECT_TRUE(fs::is_empty(directory_ / "here"));
  EXPECT_EQ(read(directory_ / "data" / "test.bin"), "images");
  EXPECT_EQ(save_weights("here/weights.pt").exit_code, 0);
}

TEST_F(FilesOfARun, TakeNoWeightsFromAPipe) {
  make_pipe(directory_ / "pipe");
  expect_error(
      train_shell(
          "timeout 60 $TRAIN " +
          brief("resnet32 synthetic --iterations 0 --results-dir here "
                "--load-weights pipe")),
      "expected pipe to be a file of weights, but reading it failed: it is a "
      "pipe. Give one that torch.save(model.state_dict(), file) has written.");
}

} // namespace
