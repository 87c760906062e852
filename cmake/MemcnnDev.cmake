# SPDX-License-Identifier: MIT
#
# How memcnn's own tests and examples are built; nothing here reaches consumers.

add_library(memcnn_dev INTERFACE)
target_compile_features(memcnn_dev INTERFACE cxx_std_20)
target_compile_options(memcnn_dev INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual
  $<$<BOOL:${MEMCNN_WERROR}>:-Werror>
  # GCC spends an eighth of its time on garbage, of which there is little here.
  $<$<CXX_COMPILER_ID:GNU>:--param=ggc-min-heapsize=3000000>)

# A translation unit with LibTorch takes 1 to 2 GB while it is compiled.
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
cmake_host_system_information(RESULT memory_mb QUERY TOTAL_PHYSICAL_MEMORY)
math(EXPR compiles "${memory_mb} / 2000")
if(compiles GREATER cores)
  set(compiles ${cores})
elseif(compiles LESS 1)
  set(compiles 1)
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS memcnn_compiles=${compiles})
set(CMAKE_JOB_POOL_COMPILE memcnn_compiles)

find_program(MEMCNN_CCACHE ccache)
if(MEMCNN_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # ccache sees through a precompiled header only where it may ignore its dates.
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env
    CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
    ${MEMCNN_CCACHE})
endif()
