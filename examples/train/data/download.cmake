# SPDX-License-Identifier: MIT
#
# cmake -D data_set=cifar10 -D directory=<folder> -P download.cmake
#
# Fetches a CIFAR data set (Krizhevsky 2009) from its home page and unpacks it
# into <folder>. Does nothing where all files are there and right, and leaves
# nothing where one is not.

cmake_minimum_required(VERSION 3.25)

set(home https://www.cs.toronto.edu/~kriz)
if(data_set STREQUAL cifar10)
  set(archive cifar-10-binary.tar.gz)
  set(archive_md5 c32a1d4ab5d03f1284b67883e8d87530)
  set(folder cifar-10-batches-bin)
  set(files
    data_batch_1.bin 5dd7e06a14cb22eb9f671a540d1b7c25
    data_batch_2.bin 5ea93a67294ea407fff1d09f752e9692
    data_batch_3.bin 942cd6a4bcdd0dd3c604fbe906cb4421
    data_batch_4.bin ae636b3ba5c66a11e91e8cb52e771fcb
    data_batch_5.bin 53f37980c15c3d472c316c40844f3f0d
    test_batch.bin   803d5f7f4d78ea53de84dbe85f74fb6d)
elseif(data_set STREQUAL cifar100)
  set(archive cifar-100-binary.tar.gz)
  set(archive_md5 03b5dce01913d631647c71ecec9e9cb8)
  set(folder cifar-100-binary)
  set(files
    train.bin 6172c7755cfe09b2fe270c85cebc1b15
    test.bin  4499cfba6c016c1be1438163640a0898)
else()
  message(FATAL_ERROR
    "expected data_set to be cifar10 or cifar100, but got \"${data_set}\".")
endif()
if(NOT directory)
  message(FATAL_ERROR "expected -D directory=<folder>, but got none.")
endif()
# Where the archive is already at hand, home can be another place.
if(DEFINED mirror)
  set(home ${mirror})
endif()

# Sets ${wrong} to the first file that is missing or not the published one.
function(check_files where wrong)
  set(${wrong} "" PARENT_SCOPE)
  while(files)
    list(POP_FRONT files name md5)
    set(found "")
    if(EXISTS ${where}/${name})
      file(MD5 ${where}/${name} found)
    endif()
    if(NOT found STREQUAL md5)
      set(${wrong} ${name} PARENT_SCOPE)
      return()
    endif()
  endwhile()
endfunction()

check_files(${directory}/${folder} wrong)
if(NOT wrong)
  message(STATUS "${data_set} is in ${directory}")
  return()
endif()

set(work ${directory}/unfinished)
file(REMOVE_RECURSE ${work})
function(give_up reason)
  file(REMOVE_RECURSE ${work})
  message(FATAL_ERROR
    "${reason}. Fetch ${home}/${archive} by other means, unpack it, and give \
the folder to memcnn_train as --data-dir.")
endfunction()

message(STATUS "downloading ${home}/${archive}")
file(DOWNLOAD ${home}/${archive} ${work}/${archive}
  SHOW_PROGRESS INACTIVITY_TIMEOUT 60 STATUS status)
list(POP_FRONT status code reason)
if(NOT code EQUAL 0)
  give_up("expected ${home}/${archive} to be reachable, but got: ${reason}")
endif()
file(MD5 ${work}/${archive} found)
if(NOT found STREQUAL archive_md5)
  give_up("expected ${archive} to have md5 ${archive_md5}, but got ${found}")
endif()

message(STATUS "unpacking ${archive}")
file(ARCHIVE_EXTRACT INPUT ${work}/${archive} DESTINATION ${work})
check_files(${work}/${folder} wrong)
if(wrong)
  give_up("expected ${wrong} in ${archive} to be the published file, but it \
is missing or has another md5")
endif()
file(REMOVE_RECURSE ${directory}/${folder})
file(RENAME ${work}/${folder} ${directory}/${folder})
file(REMOVE_RECURSE ${work})
message(STATUS "${data_set} is in ${directory}")
