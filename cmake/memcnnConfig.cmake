# SPDX-License-Identifier: MIT
#
# find_package(memcnn) defines memcnn::memcnn. LibTorch is found on the way,
# unless the project has loaded one already.

# memcnn is one target. A component that a later version may have is refused
# here, not met as a missing target at the first link.
foreach(_memcnn_component IN LISTS memcnn_FIND_COMPONENTS)
  set(memcnn_${_memcnn_component}_FOUND FALSE)
  if(memcnn_FIND_REQUIRED_${_memcnn_component})
    set(memcnn_FOUND FALSE)
    set(memcnn_NOT_FOUND_MESSAGE
        "expected no COMPONENTS, since memcnn is the one target memcnn::memcnn, \
but got ${_memcnn_component}. Leave COMPONENTS out of find_package(memcnn).")
    return()
  endif()
endforeach()

include("${CMAKE_CURRENT_LIST_DIR}/MemcnnTorch.cmake")
if(TARGET torch)
  memcnn_check_loaded_torch(_memcnn_problem)
else()
  memcnn_locate_torch(_memcnn_torch_dir _memcnn_problem)
  if(_memcnn_torch_dir)
    memcnn_load_torch("${_memcnn_torch_dir}" _memcnn_problem)
  endif()
endif()
if(_memcnn_problem)
  set(memcnn_FOUND FALSE)
  set(memcnn_NOT_FOUND_MESSAGE "${_memcnn_problem}")
  return()
endif()

include("${CMAKE_CURRENT_LIST_DIR}/memcnnTargets.cmake")
