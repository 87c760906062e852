# SPDX-License-Identifier: MIT
#
# What `cpack -G TGZ` and `cpack -G DEB` make of the installed files: neither
# holds anything that depends on a machine.

set(CPACK_GENERATOR TGZ DEB)
set(CPACK_VERBATIM_VARIABLES ON)
set(CPACK_PACKAGE_FILE_NAME ${PROJECT_NAME}-${PROJECT_VERSION})
set(CPACK_PACKAGE_CONTACT "The memcnn authors")
set(CPACK_PACKAGE_VENDOR "The memcnn authors")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "${PROJECT_DESCRIPTION}")
set(CPACK_PACKAGE_DESCRIPTION
"Couplings that make any module invertible, a wrapper and a sequence that run
them without their activations, and checkpointing, as C++ headers. A project
finds them by find_package(memcnn), and needs LibTorch ${MEMCNN_TORCH_MINIMUM_VERSION} or later beside
them, from pytorch.org or from pip.")

set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT) # <name>_<version>_<architecture>.deb
set(CPACK_DEBIAN_PACKAGE_NAME libmemcnn-dev)
set(CPACK_DEBIAN_PACKAGE_ARCHITECTURE all)
set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_PACKAGE_RECOMMENDS "cmake (>= 3.25), g++")
# No dependency on LibTorch: Debian's own libtorch-dev is too old.

include(CPack)
