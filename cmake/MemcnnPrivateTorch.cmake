# SPDX-License-Identifier: MIT
#
# For the presets of this repository only: where the machine has no LibTorch,
# install one into a Python virtual environment inside the build tree. All
# presets share it, so it lies beside their folders.

set(MEMCNN_PRIVATE_TORCH_REQUIREMENT torch==2.11.0)
# LibTorch's own CMake files ask for a CUDA Toolkit; these are the parts of it
# that they look at, in the version that this torch is built with.
set(MEMCNN_PRIVATE_TOOLKIT_REQUIREMENT
    "cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]==13.0.2")

# Runs pip in <venv>, with its output shown, once: a stamp file that holds the
# requirement is written after success.
function(_memcnn_pip_install venv requirement stamp)
  if(EXISTS "${stamp}")
    file(READ "${stamp}" installed)
    if(installed STREQUAL requirement)
      return()
    endif()
  endif()
  execute_process(
    COMMAND "${venv}/bin/python3" -m pip install --progress-bar off
            "${requirement}"
    RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR
      "Could not install ${requirement} into ${venv} (see pip's messages \
above). Configure again to try once more, or install LibTorch yourself and \
configure with -DCMAKE_PREFIX_PATH=/path/to/libtorch.")
  endif()
  file(WRITE "${stamp}" "${requirement}")
endfunction()

# Sets <result> to the CUDA Toolkit in <venv>, installing it if need be.
function(_memcnn_install_private_toolkit venv result)
  message(STATUS "memcnn: no CUDA Toolkit found on this machine; using the \
parts that LibTorch's CMake files ask for in ${venv}")
  _memcnn_pip_install(
    "${venv}" "${MEMCNN_PRIVATE_TOOLKIT_REQUIREMENT}" "${venv}/toolkit.stamp")
  file(GLOB toolkit "${venv}/lib/python3*/site-packages/nvidia/cu13")
  # The packages lack two names under which nvcc and the linker look for them.
  file(CREATE_LINK lib "${toolkit}/lib64" SYMBOLIC)
  file(CREATE_LINK libcudart.so.13 "${toolkit}/lib/libcudart.so" SYMBOLIC)
  set(${result} "${toolkit}" PARENT_SCOPE)
endfunction()

# Sets <result> to the folder of TorchConfig.cmake in the private virtual
# environment <venv>, which is installed first unless it is complete, and
# CUDAToolkit_ROOT to the toolkit beside it, if the machine has none.
function(memcnn_install_private_torch venv result)
  # Two presets may be configured at the same time.
  file(LOCK "${venv}.lock" GUARD FUNCTION)

  if(NOT EXISTS "${venv}/torch.stamp")
    message(STATUS
      "memcnn: no LibTorch found on this machine; installing \
${MEMCNN_PRIVATE_TORCH_REQUIREMENT} into ${venv}. This is done once, takes \
about two minutes and 5 GB.")
    # What an interrupted run left behind is not to be trusted.
    file(REMOVE_RECURSE "${venv}")
    execute_process(
      COMMAND python3 -m venv "${venv}"
      RESULT_VARIABLE status)
    if(NOT status EQUAL 0)
      message(FATAL_ERROR
        "Could not create a Python virtual environment in ${venv}. Install \
Python with its venv module (Debian and Ubuntu: apt-get install python3-venv), \
or install LibTorch yourself and configure with \
-DCMAKE_PREFIX_PATH=/path/to/libtorch.")
    endif()
  endif()
  _memcnn_pip_install(
    "${venv}" ${MEMCNN_PRIVATE_TORCH_REQUIREMENT} "${venv}/torch.stamp")

  file(GLOB torch_dir "${venv}/lib/python3*/site-packages/torch/share/cmake/Torch")
  set(${result} "${torch_dir}" PARENT_SCOPE)

  _memcnn_find_nvcc(nvcc)
  if(NOT nvcc)
    _memcnn_install_private_toolkit("${venv}" toolkit)
    # Cached, as Torch_DIR is: the next configuration starts from the two.
    set(CUDAToolkit_ROOT "${toolkit}" CACHE PATH "The CUDA Toolkit" FORCE)
  endif()
endfunction()
