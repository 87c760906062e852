# SPDX-License-Identifier: MIT
#
# cmake -D build=<tree> -D target=<name> -D expected=<text> -P first_error.cmake
#
# Builds a target that must not compile; its first error must hold the text.

execute_process(
  COMMAND ${CMAKE_COMMAND} --build ${build} --target ${target}
  OUTPUT_VARIABLE output
  ERROR_VARIABLE output
  RESULT_VARIABLE failed)
if(NOT failed)
  message(FATAL_ERROR "${target} compiles")
endif()
string(REGEX MATCH "error: [^\n]*" first "${output}")
string(FIND "${first}" "${expected}" found)
if(found EQUAL -1)
  message(FATAL_ERROR "the first error of ${target} is \"${first}\", not "
    "\"${expected}\"\n${output}")
endif()
message(STATUS "${first}")
