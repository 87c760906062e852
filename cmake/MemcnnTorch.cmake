# SPDX-License-Identifier: MIT
#
# Finds and loads LibTorch, for the build of memcnn and, installed beside
# memcnnConfig.cmake, for those who link it. Nothing here downloads anything.
#
# Two steps, because loading a CUDA LibTorch without a CUDA Toolkit ends in an
# error of LibTorch's own that does not say what to do: memcnn_locate_torch()
# only looks, memcnn_load_torch() checks what LibTorch needs and then loads it.
# Neither stops the configuration; both hand back a message that says what is
# wrong and what to do about it.

set(MEMCNN_TORCH_MINIMUM_VERSION 2.6)

# Sets <result> to the folder of the first TorchConfig.cmake of a usable version
# and appends a line to <rejections> for each older one met before it. Further
# arguments go to find_package().
function(_memcnn_search_torch result rejections)
  # No LibTorch has this version, so find_package() loads none and lists all.
  # On the way it clears Torch_DIR, which may be the user's.
  set(torch_dir "${Torch_DIR}")
  find_package(Torch 9999 CONFIG QUIET ${ARGN})
  if(EXISTS "${torch_dir}/TorchConfig.cmake")
    set(Torch_DIR "${torch_dir}" CACHE PATH "Folder of TorchConfig.cmake" FORCE)
  endif()

  set(lines "${${rejections}}")
  foreach(config version IN ZIP_LISTS
          Torch_CONSIDERED_CONFIGS Torch_CONSIDERED_VERSIONS)
    cmake_path(GET config PARENT_PATH dir)
    if(version VERSION_GREATER_EQUAL MEMCNN_TORCH_MINIMUM_VERSION)
      set(${result} "${dir}" PARENT_SCOPE)
      break()
    endif()
    message(STATUS "memcnn: skipping LibTorch ${version} in ${dir}")
    string(APPEND lines "  LibTorch ${version} in ${dir} is too old.\n")
  endforeach()
  set(${rejections} "${lines}" PARENT_SCOPE)
endfunction()

# Sets <result> to the folder of the TorchConfig.cmake to use: one that
# find_package() sees (Torch_DIR, CMAKE_PREFIX_PATH, ...), else the one inside
# the torch package of the Python interpreter on the PATH. Without one, <result>
# is empty and <problem> says what to do.
function(memcnn_locate_torch result problem)
  set(${result} "" PARENT_SCOPE)
  set(${problem} "" PARENT_SCOPE)
  set(found "")
  set(rejected "")

  _memcnn_search_torch(found rejected)
  if(Torch_DIR AND NOT found STREQUAL Torch_DIR)
    set(${problem}
        "memcnn needs LibTorch ${MEMCNN_TORCH_MINIMUM_VERSION} or later, but \
Torch_DIR points at an older one:\n${rejected}\
Point Torch_DIR at a newer LibTorch, or leave it unset to have one searched."
        PARENT_SCOPE)
    return()
  endif()

  if(NOT found)
    execute_process(
      COMMAND python3 -c "import torch; print(torch.utils.cmake_prefix_path)"
      OUTPUT_VARIABLE prefix
      OUTPUT_STRIP_TRAILING_WHITESPACE
      ERROR_QUIET)
    if(prefix)
      _memcnn_search_torch(found rejected PATHS "${prefix}" NO_DEFAULT_PATH)
    endif()
  endif()

  if(found)
    set(${result} "${found}" PARENT_SCOPE)
  else()
    set(${problem}
        "memcnn needs LibTorch ${MEMCNN_TORCH_MINIMUM_VERSION} or later, but \
none was found.\n${rejected}\
Do one of these:\n\
  * python3 -m pip install torch, and configure with that python3 first on the \
PATH;\n\
  * unpack a LibTorch archive from https://pytorch.org and configure with \
-DCMAKE_PREFIX_PATH=/path/to/libtorch."
        PARENT_SCOPE)
  endif()
endfunction()

# Sets <result> to the nvcc of the CUDA Toolkit, or to empty.
function(_memcnn_find_nvcc result)
  if(CMAKE_CUDA_COMPILER)
    set(nvcc "${CMAKE_CUDA_COMPILER}")
  elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(nvcc "$ENV{CUDACXX}")
  else()
    find_program(nvcc nvcc NO_CACHE
      HINTS "${CUDAToolkit_ROOT}" ENV CUDAToolkit_ROOT
            "${CUDA_TOOLKIT_ROOT_DIR}" ENV CUDA_PATH ENV CUDA_HOME
      PATHS /usr/local/cuda /opt/cuda
      PATH_SUFFIXES bin)
    if(NOT nvcc)
      set(nvcc "")
    endif()
  endif()
  set(${result} "${nvcc}" PARENT_SCOPE)
endfunction()

# Sets <result> to the CUDA version that the LibTorch around <dir> was built
# with, such as 13.0, or to empty if it does not say.
function(_memcnn_torch_cuda_version dir result)
  set(${result} "" PARENT_SCOPE)
  foreach(file version.py build-version) # in a Python package; in an archive
    if(EXISTS "${dir}/../../../${file}")
      file(READ "${dir}/../../../${file}" text)
      if(text MATCHES "cuda[^\n]*= '([0-9.]+)'")
        set(${result} "${CMAKE_MATCH_1}" PARENT_SCOPE)
      elseif(text MATCHES "\\+cu([0-9]+)([0-9])")
        set(${result} "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}" PARENT_SCOPE)
      endif()
    endif()
  endforeach()
endfunction()

# For the LibTorch that is loaded, by memcnn or by the project before it: sets
# <problem> if it is too old, and makes it tell which C++ its headers need.
function(memcnn_check_loaded_torch problem)
  set(${problem} "" PARENT_SCOPE)
  # A project may have the target from elsewhere, with no version to check.
  if(Torch_VERSION AND Torch_VERSION VERSION_LESS MEMCNN_TORCH_MINIMUM_VERSION)
    set(${problem}
        "memcnn needs LibTorch ${MEMCNN_TORCH_MINIMUM_VERSION} or later, but \
this project has loaded LibTorch ${Torch_VERSION}. Point Torch_DIR at a newer \
one."
        PARENT_SCOPE)
  elseif(Torch_VERSION VERSION_GREATER_EQUAL 2.14)
    # Its headers need C++20, and its own target does not say so.
    target_compile_features(torch INTERFACE cxx_std_20)
  endif()
endfunction()

# Makes the linker find the CUDA libraries of a Python package, which come in
# packages of their own, before those of the toolkit: LibTorch 2.15 needs a newer
# NCCL than some toolkits have beside them. At run time that is so without help.
function(_memcnn_prefer_cuda_of_wheel dir)
  if(CMAKE_SYSTEM_NAME STREQUAL Linux)
    file(GLOB folders "${dir}/../../../../nvidia/*/lib")
    foreach(folder IN LISTS folders)
      cmake_path(NORMAL_PATH folder)
      target_link_options(torch INTERFACE "LINKER:-rpath-link,${folder}")
    endforeach()
  endif()
endfunction()

# Loads the LibTorch of <dir>, which defines the target `torch`; where that
# cannot work, <problem> says what to do instead. A macro, since enabling a
# language and find_package() need the caller's scope.
macro(memcnn_load_torch dir problem)
  set(${problem} "")
  set(_memcnn_nvcc "")
  file(GLOB _memcnn_torch_cuda
    "${dir}/../../../lib/libtorch_cuda.so" # a Python package, an archive
    "${dir}/../../libtorch_cuda.so") # a Linux distribution's package
  if(_memcnn_torch_cuda)
    _memcnn_find_nvcc(_memcnn_nvcc)
    if(NOT _memcnn_nvcc)
      _memcnn_torch_cuda_version("${dir}" _memcnn_cuda_version)
      set(${problem}
          "The LibTorch in ${dir} is built for CUDA ${_memcnn_cuda_version}, \
but no CUDA Toolkit was found (no nvcc).\n\
Do one of these two:\n\
  * install the CUDA Toolkit ${_memcnn_cuda_version} and, if it is not in \
/usr/local/cuda, set the environment variable CUDACXX to its nvcc or configure \
with -DCUDAToolkit_ROOT=/path/to/cuda;\n\
  * use a CPU build of LibTorch, from https://pytorch.org: as the torch of \
python3, or unpacked and configured with -DCMAKE_PREFIX_PATH=/path/to/libtorch.")
    endif()
  endif()

  if(_memcnn_nvcc)
    # LibTorch looks for the toolkit in three ways that see different places;
    # make all of them see the one with this nvcc.
    if(NOT CMAKE_CUDA_COMPILER)
      set(CMAKE_CUDA_COMPILER "${_memcnn_nvcc}")
    endif()
    cmake_path(GET _memcnn_nvcc PARENT_PATH _memcnn_cuda_root)
    cmake_path(GET _memcnn_cuda_root PARENT_PATH _memcnn_cuda_root)
    if(NOT CUDA_TOOLKIT_ROOT_DIR
       AND EXISTS "${_memcnn_cuda_root}/include/cuda_runtime.h")
      set(CUDA_TOOLKIT_ROOT_DIR "${_memcnn_cuda_root}")
    endif()
  endif()

  if(NOT ${problem})
    find_package(Torch ${MEMCNN_TORCH_MINIMUM_VERSION} REQUIRED CONFIG
      PATHS "${dir}" NO_DEFAULT_PATH)
    memcnn_check_loaded_torch(${problem})
    _memcnn_prefer_cuda_of_wheel("${dir}")
  endif()
endmacro()
