# SPDX-License-Identifier: MIT
#
# cmake -D build=<tree> -D target=<name> -D expected=<text> -P first_error.cmake
#
# Builds a target that must not compile. Its first error must hold the text, and
# be among the first ten lines that the compiler prints.

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

# The lines that a compiler prints follow those of the build tool, the last of
# which holds the command.
string(REGEX REPLACE "[][;]" " " lines "${output}")
string(REPLACE "\n" ";" lines "${lines}")
set(number 0)
foreach(line IN LISTS lines)
  math(EXPR number "${number} + 1")
  if(line MATCHES "-fsyntax-only")
    set(number 0)
  elseif(line MATCHES "error: ")
    break()
  endif()
endforeach()
if(number GREATER 10)
  message(FATAL_ERROR
    "the first error of ${target} is line ${number} of the compiler's\n${output}")
endif()
message(STATUS "line ${number}: ${first}")
