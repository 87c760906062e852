# SPDX-License-Identifier: MIT
#
# cmake -D source=<folder> -D prefix=<memcnn> -D generator=<name>
#       -D options=<-Dname=value;...> -P copied_revnet.cmake
#
# Copies examples/revnet alone to a place outside of the repository, builds it
# there against an installed memcnn, and lets it train: it must learn.

if(NOT DEFINED ENV{TMPDIR})
  set(ENV{TMPDIR} /tmp)
endif()
string(RANDOM name)
set(project $ENV{TMPDIR}/memcnn_copied_revnet_${name})

# Runs a command; its output is `output`. The project goes if it fails.
function(run)
  execute_process(COMMAND ${ARGN}
    OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE failed)
  if(failed)
    file(REMOVE_RECURSE ${project})
    message(FATAL_ERROR "${ARGN} failed:\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

file(COPY ${source}/ DESTINATION ${project})
run(${CMAKE_COMMAND} -S ${project} -B ${project}/build -G ${generator}
  -DCMAKE_PREFIX_PATH=${prefix} ${options})
run(${CMAKE_COMMAND} --build ${project}/build)
run(${project}/build/revnet revnet38 60)
file(REMOVE_RECURSE ${project})

message("${output}")
string(REGEX MATCHALL "loss:[0-9.e-]+" losses "${output}")
list(TRANSFORM losses REPLACE "loss:" "")
list(GET losses 0 first)
list(GET losses -1 last)
string(REGEX MATCH "test_accuracy:([0-9.]+)" found "${output}")
if(NOT last LESS first OR NOT CMAKE_MATCH_1 GREATER 0.5) # by chance: 0.1
  message(FATAL_ERROR "the copied revnet has not learned")
endif()
