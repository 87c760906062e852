// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>
#include <memcnn/any_invertible.h>
#include <memcnn/check.h>
#include <memcnn/checkpoint.h>
#include <memcnn/checkpoint_sequential.h>
#include <memcnn/configure.h>
#include <memcnn/coupling/adapters.h>
#include <memcnn/coupling/additive.h>
#include <memcnn/coupling/affine.h>
#include <memcnn/coupling/options.h>
#include <memcnn/coupling/unchanged.h>
#include <memcnn/exact_range.h>
#include <memcnn/flow/multi_scale.h>
#include <memcnn/given.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/plain_autograd.h>
#include <memcnn/recording.h>
#include <memcnn/sequence.h>
#include <memcnn/version.h>
#include <memcnn/wrapper.h>
