# SPDX-License-Identifier: MIT
#
# find_package(memcnn) defines memcnn::memcnn. LibTorch is found on the way,
# unless the project has loaded one already.

if(NOT TARGET torch)
  include("${CMAKE_CURRENT_LIST_DIR}/MemcnnTorch.cmake")
  memcnn_locate_torch(_memcnn_torch_dir _memcnn_problem)
  if(_memcnn_torch_dir)
    memcnn_load_torch("${_memcnn_torch_dir}" _memcnn_problem)
  endif()
  if(_memcnn_problem)
    set(memcnn_FOUND FALSE)
    set(memcnn_NOT_FOUND_MESSAGE "${_memcnn_problem}")
    return()
  endif()
endif()

include("${CMAKE_CURRENT_LIST_DIR}/memcnnTargets.cmake")
