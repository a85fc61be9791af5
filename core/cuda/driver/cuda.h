// SPDX-License-Identifier: Apache-2.0
//
// The part of the CUDA driver API that the engine uses, declared here so that nothing of CUDA is needed to build. Field order and
// enum values are the driver's ABI; the library itself is opened at run time.
#ifndef ZS_CUDA_H
#define ZS_CUDA_H

#include <stddef.h>
#include <stdint.h>

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef void *CUcontext, *CUmodule, *CUfunction, *CUstream, *CUevent, *CUgraph, *CUuserObject;
typedef void (*CUhostFn)(void *);

typedef struct {
  int id;
  char pad[4];
  union {
    char reserved[64];
    int programmatic_stream_serialization;
    struct {
      unsigned x, y, z;
    } cluster;
  } value;
} CUlaunchAttribute;

typedef struct {
  _Alignas(64) uint64_t opaque[16];
} CUtensorMap;

typedef struct {
  unsigned gridDimX, gridDimY, gridDimZ;
  unsigned blockDimX, blockDimY, blockDimZ;
  unsigned sharedMemBytes;
  CUstream hStream;
  CUlaunchAttribute *attrs;
  unsigned numAttrs;
} CUlaunchConfig;

enum {
  CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4,
  CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
  CU_STREAM_CAPTURE_MODE_RELAXED = 2,
  CU_STREAM_NON_BLOCKING = 1,
  CU_EVENT_BLOCKING_SYNC = 1,
  CU_EVENT_DISABLE_TIMING = 2,
  CU_MEMHOSTALLOC_PORTABLE = 1,
  CU_MEMHOSTALLOC_DEVICEMAP = 2,
  CUDA_ERROR_NOT_READY = 600,
  CU_USER_OBJECT_NO_DESTRUCTOR_SYNC = 1,
  CU_GRAPH_USER_OBJECT_MOVE = 1,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
  CU_TENSOR_MAP_INTERLEAVE_NONE = 0,
  CU_TENSOR_MAP_SWIZZLE_128B = 3,
  CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2,
  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0,
};

// Every entry point: X(exported symbol, C parameters). Order is of no meaning.
#define ZS_CU_SYMBOLS(X)                                                                                     \
  X(cuInit, (unsigned))                                                                                      \
  X(cuDriverGetVersion, (int *))                                                                             \
  X(cuGetErrorName, (CUresult, const char **))                                                               \
  X(cuGetErrorString, (CUresult, const char **))                                                             \
  X(cuDeviceGetCount, (int *))                                                                               \
  X(cuDeviceGet, (CUdevice *, int))                                                                          \
  X(cuDeviceGetName, (char *, int, CUdevice))                                                                \
  X(cuDeviceGetAttribute, (int *, int, CUdevice))                                                            \
  X(cuDeviceTotalMem_v2, (size_t *, CUdevice))                                                               \
  X(cuDevicePrimaryCtxRetain, (CUcontext *, CUdevice))                                                       \
  X(cuDevicePrimaryCtxGetState, (CUdevice, unsigned *, int *))                                               \
  X(cuCtxGetCurrent, (CUcontext *))                                                                          \
  X(cuCtxPushCurrent_v2, (CUcontext))                                                                        \
  X(cuCtxPopCurrent_v2, (CUcontext *))                                                                       \
  X(cuModuleLoadData, (CUmodule *, const void *))                                                            \
  X(cuModuleUnload, (CUmodule))                                                                              \
  X(cuModuleGetFunction, (CUfunction *, CUmodule, const char *))                                             \
  X(cuFuncSetAttribute, (CUfunction, int, int))                                                              \
  X(cuFuncGetAttribute, (int *, int, CUfunction))                                                            \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor, (int *, CUfunction, int, size_t))                           \
  X(cuOccupancyMaxActiveClusters, (int *, CUfunction, const CUlaunchConfig *))                               \
  X(cuLaunchKernelEx, (const CUlaunchConfig *, CUfunction, void **, void **))                                \
  X(cuTensorMapEncodeTiled, (CUtensorMap *, int, uint32_t, void *, const uint64_t *, const uint64_t *, const uint32_t *, const uint32_t *, int, int, int, int)) \
  X(cuStreamCreateWithPriority, (CUstream *, unsigned, int))                                                 \
  X(cuStreamDestroy_v2, (CUstream))                                                                          \
  X(cuStreamSynchronize, (CUstream))                                                                         \
  X(cuStreamQuery, (CUstream))                                                                               \
  X(cuStreamWaitEvent, (CUstream, CUevent, unsigned))                                                        \
  X(cuStreamGetCaptureInfo_v2, (CUstream, int *, uint64_t *, CUgraph *, const void ***, size_t *))           \
  X(cuThreadExchangeStreamCaptureMode, (int *))                                                              \
  X(cuEventCreate, (CUevent *, unsigned))                                                                    \
  X(cuEventDestroy_v2, (CUevent))                                                                            \
  X(cuEventRecord, (CUevent, CUstream))                                                                      \
  X(cuEventSynchronize, (CUevent))                                                                           \
  X(cuMemGetInfo_v2, (size_t *, size_t *))                                                                   \
  X(cuMemAlloc_v2, (CUdeviceptr *, size_t))                                                                  \
  X(cuMemFree_v2, (CUdeviceptr))                                                                             \
  X(cuMemHostAlloc, (void **, size_t, unsigned))                                                             \
  X(cuMemsetD8Async, (CUdeviceptr, unsigned char, size_t, CUstream))                                         \
  X(cuMemcpyDtoHAsync_v2, (void *, CUdeviceptr, size_t, CUstream))                                           \
  X(cuMemcpyHtoDAsync_v2, (CUdeviceptr, const void *, size_t, CUstream))                                     \
  X(cuUserObjectCreate, (CUuserObject *, void *, CUhostFn, unsigned, unsigned))                              \
  X(cuUserObjectRelease, (CUuserObject, unsigned))                                                           \
  X(cuGraphRetainUserObject, (CUgraph, CUuserObject, unsigned, unsigned))

#endif
