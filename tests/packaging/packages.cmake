# SPDX-License-Identifier: MIT
#
# cmake -D source=<repository> -D work=<folder> -D decoy=<a LibTorch not to load>
#       -D version=<version> -D generator=<name> -P packages.cmake
#
# Makes the tarball and the Debian package, from a build tree that finds no
# LibTorch, and unpacks them into <work>/tarball and <work>/deb.

cmake_policy(VERSION 3.25)

# Runs a command in <work>; its output is `output`.
function(run)
  execute_process(COMMAND ${ARGN} WORKING_DIRECTORY ${work}
    OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${ARGN} failed:\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

# Sets <result> to the paths of the files of <folder>.
function(list_files folder result)
  file(GLOB_RECURSE files RELATIVE ${folder} ${folder}/*)
  list(SORT files)
  set(${result} "${files}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE ${work})
file(MAKE_DIRECTORY ${work})

# --- Neither LibTorch nor a CUDA compiler is looked for ----------------------

run(${CMAKE_COMMAND} -S ${source} -B build -G ${generator}
  -D CMAKE_PREFIX_PATH=${decoy}
  -D MEMCNN_BUILD_TESTS=OFF -D MEMCNN_BUILD_EXAMPLES=OFF)
file(STRINGS ${work}/build/CMakeCache.txt found
  REGEX "^(Torch_|TORCH_|CUDA|CMAKE_CUDA|Python3?_)")
if(found)
  message(FATAL_ERROR "headers alone have made CMake look for:\n${found}")
endif()

# --- Both packages, with the same files -----------------------------------------

run(${CMAKE_CPACK_COMMAND} --config build/CPackConfig.cmake -G TGZ)
run(${CMAKE_CPACK_COMMAND} --config build/CPackConfig.cmake -G DEB)

file(ARCHIVE_EXTRACT INPUT ${work}/memcnn-${version}.tar.gz DESTINATION ${work})
file(RENAME ${work}/memcnn-${version} ${work}/tarball)

# A Debian package is an archive of two archives, and a line of its version.
file(ARCHIVE_EXTRACT INPUT ${work}/libmemcnn-dev_${version}_all.deb
  DESTINATION ${work}/deb)
file(ARCHIVE_EXTRACT INPUT ${work}/deb/control.tar.gz DESTINATION ${work}/deb)
file(ARCHIVE_EXTRACT INPUT ${work}/deb/data.tar.gz DESTINATION ${work}/deb)

list_files(${work}/tarball in_tarball)
list_files(${work}/deb/usr in_deb)
if(NOT in_tarball STREQUAL in_deb)
  message(FATAL_ERROR "the packages differ:\n${in_tarball}\n${in_deb}")
endif()
foreach(file include/memcnn/memcnn.h share/cmake/memcnn/memcnnConfig.cmake
        share/doc/memcnn/README.md share/doc/memcnn/LICENSE)
  if(NOT file IN_LIST in_tarball)
    message(FATAL_ERROR "the packages lack ${file}")
  endif()
endforeach()

file(READ ${work}/deb/control control)
foreach(field "Package: libmemcnn-dev" "Version: ${version}" "Architecture: all"
        "Section: libdevel" "Description: Deep invertible networks")
  string(FIND "${control}" "${field}" position)
  if(position EQUAL -1)
    message(FATAL_ERROR "expected \"${field}\" in\n${control}")
  endif()
endforeach()
