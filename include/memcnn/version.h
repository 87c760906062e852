// SPDX-License-Identifier: MIT
#pragma once

/// The version of memcnn: the only place where it is written; CMake reads it
/// from here.
#define MEMCNN_VERSION_MAJOR 0
#define MEMCNN_VERSION_MINOR 1
#define MEMCNN_VERSION_PATCH 0
