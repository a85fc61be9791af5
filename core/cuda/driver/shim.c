// SPDX-License-Identifier: Apache-2.0
#include "shim.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

static const char *const symbol_names[] = {
#define ZS_NAME(name, args) #name,
    ZS_CU_SYMBOLS(ZS_NAME)
#undef ZS_NAME
};

const char *zs_cu_symbol(int index) { return index >= 0 && index < ZS_SYMBOL_COUNT ? symbol_names[index] : "?"; }

int zs_cu_open(zs_cu *cu, const char *path, char *err, size_t errlen, int *missing) {
  memset(cu, 0, sizeof *cu);
  *missing = 0;
  void *lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (lib == NULL) {
    const char *text = dlerror();
    snprintf(err, errlen, "%s", text ? text : "dlopen failed");
    return -1;
  }
#define ZS_RESOLVE(name, args)                            \
  *(void **)&cu->name = dlsym(lib, #name);                \
  if (cu->name == NULL) {                                 \
    snprintf(err, errlen, "%s has no %s", path, #name);   \
    *missing = 1;                                         \
    dlclose(lib);                                         \
    return -1;                                            \
  }
  ZS_CU_SYMBOLS(ZS_RESOLVE)
#undef ZS_RESOLVE
  cu->lib = lib;
  return 0;
}

const char *zs_cu_error_name(zs_cu *cu, CUresult code) {
  const char *s = NULL;
  return cu->cuGetErrorName(code, &s) == 0 && s != NULL ? s : "unknown";
}

const char *zs_cu_error_text(zs_cu *cu, CUresult code) {
  const char *s = NULL;
  return cu->cuGetErrorString(code, &s) == 0 && s != NULL ? s : "no description";
}

static const zs_result ok = {0, 0};

// Calls one entry point and leaves the function with its code and name when it fails.
#define CALL(name, ...)                                   \
  do {                                                    \
    CUresult rc_ = cu->name(__VA_ARGS__);                 \
    if (rc_ != 0) return (zs_result){rc_, ZS_##name};     \
  } while (0)

// The same inside ENTER..LEAVE, where the context has to be left first.
#define TRY(name, ...)                                    \
  do {                                                    \
    CUresult rc_ = cu->name(__VA_ARGS__);                 \
    if (rc_ != 0) {                                       \
      r_ = (zs_result){rc_, ZS_##name};                   \
      goto leave;                                         \
    }                                                     \
  } while (0)

// A thread on which torch works has the context already; pushing costs more than asking.
#define ENTER(context)                                    \
  zs_result r_ = ok;                                      \
  CUcontext want_ = (CUcontext)(uintptr_t)(context), now_ = NULL; \
  CALL(cuCtxGetCurrent, &now_);                           \
  int pushed_ = now_ != want_;                            \
  if (pushed_) CALL(cuCtxPushCurrent_v2, want_)

#define LEAVE                                             \
  leave:                                                  \
  if (pushed_) cu->cuCtxPopCurrent_v2(&now_);             \
  return r_

#define P(type, v) ((type)(uintptr_t)(v))
#define OUT(v) ((uint64_t)(uintptr_t)(v))

zs_result zs_init(zs_cu *cu, int *version, int *devices) {
  CALL(cuDriverGetVersion, version);
  CALL(cuInit, 0);
  CALL(cuDeviceGetCount, devices);
  return ok;
}

zs_result zs_device(zs_cu *cu, int ordinal, char *name, int namelen, size_t *memory, const int *attributes, int *values, int n,
                    int needed) {
  CUdevice dev;
  CALL(cuDeviceGet, &dev, ordinal);
  CALL(cuDeviceGetName, name, namelen, dev);
  CALL(cuDeviceTotalMem_v2, memory, dev);
  for (int i = 0; i < n; i++) {
    CUresult rc = cu->cuDeviceGetAttribute(&values[i], attributes[i], dev);
    if (rc != 0 && i < needed) return (zs_result){rc, ZS_cuDeviceGetAttribute};
    if (rc != 0) values[i] = 0;
  }
  return ok;
}

zs_result zs_primary(zs_cu *cu, int ordinal, uint64_t *ctx) {
  CUdevice dev;
  CUcontext c = NULL;
  CALL(cuDeviceGet, &dev, ordinal);
  CALL(cuDevicePrimaryCtxRetain, &c, dev);
  *ctx = OUT(c);
  return ok;
}

// Loading allocates, which a capture of another stream in global mode forbids although it disturbs nothing: ask for relaxed mode around it.
zs_result zs_load(zs_cu *cu, uint64_t ctx, const void *image, uint64_t *module) {
  CUmodule m = NULL;
  int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  ENTER(ctx);
  TRY(cuThreadExchangeStreamCaptureMode, &mode);
  CUresult rc = cu->cuModuleLoadData(&m, image);
  cu->cuThreadExchangeStreamCaptureMode(&mode);
  if (rc != 0) r_ = (zs_result){rc, ZS_cuModuleLoadData};
  *module = OUT(m);
  LEAVE;
}

zs_result zs_unload(zs_cu *cu, uint64_t ctx, uint64_t module) {
  ENTER(ctx);
  TRY(cuModuleUnload, P(CUmodule, module));
  LEAVE;
}

enum { FUNC_MAX_DYNAMIC_SMEM = 8, DEFAULT_DYNAMIC_SMEM = 48 * 1024 };

zs_result zs_function(zs_cu *cu, uint64_t ctx, uint64_t module, const char *name, uint32_t smem, uint64_t *function) {
  CUfunction f = NULL;
  int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  ENTER(ctx);
  TRY(cuThreadExchangeStreamCaptureMode, &mode); // with lazy loading this is where the code arrives on the device
  CUresult rc = cu->cuModuleGetFunction(&f, P(CUmodule, module), name);
  if (rc != 0) {
    r_ = (zs_result){rc, ZS_cuModuleGetFunction};
  } else if (smem > DEFAULT_DYNAMIC_SMEM) {
    rc = cu->cuFuncSetAttribute(f, FUNC_MAX_DYNAMIC_SMEM, (int)smem);
    if (rc != 0) r_ = (zs_result){rc, ZS_cuFuncSetAttribute};
  }
  cu->cuThreadExchangeStreamCaptureMode(&mode);
  *function = OUT(f);
  LEAVE;
}

zs_result zs_function_attribute(zs_cu *cu, uint64_t ctx, uint64_t function, int attribute, int *value) {
  ENTER(ctx);
  TRY(cuFuncGetAttribute, value, attribute, P(CUfunction, function));
  LEAVE;
}

zs_result zs_occupancy(zs_cu *cu, uint64_t ctx, uint64_t function, int block, size_t smem, int *blocks) {
  ENTER(ctx);
  TRY(cuOccupancyMaxActiveBlocksPerMultiprocessor, blocks, P(CUfunction, function), block, smem);
  LEAVE;
}

static CUlaunchAttribute cluster_attribute(uint32_t blocks) {
  CUlaunchAttribute a;
  memset(&a, 0, sizeof a);
  a.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  a.value.cluster.x = blocks;
  a.value.cluster.y = a.value.cluster.z = 1;
  return a;
}

zs_result zs_cluster_occupancy(zs_cu *cu, uint64_t ctx, uint64_t function, uint32_t block, uint32_t smem, uint32_t cluster, int *clusters) {
  CUlaunchAttribute attr = cluster_attribute(cluster);
  CUlaunchConfig config = {
      .gridDimX = cluster, .gridDimY = 1, .gridDimZ = 1, .blockDimX = block, .blockDimY = 1, .blockDimZ = 1,
      .sharedMemBytes = smem, .attrs = &attr, .numAttrs = 1,
  };
  ENTER(ctx);
  TRY(cuOccupancyMaxActiveClusters, clusters, P(CUfunction, function), &config);
  LEAVE;
}

zs_result zs_launch(zs_cu *cu, const zs_launch_args *a) {
  void *params[ZS_MAX_ARGS + ZS_MAX_TENSORS];
  CUtensorMap maps[ZS_MAX_TENSORS];
  for (uint32_t i = 0; i < a->nargs; i++) params[i] = (void *)&a->args[i];
  CUlaunchAttribute attrs[2];
  unsigned n = 0;
  if (a->programmatic) {
    memset(&attrs[n], 0, sizeof attrs[n]);
    attrs[n].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attrs[n++].value.programmatic_stream_serialization = 1;
  }
  if (a->cluster > 1) attrs[n++] = cluster_attribute(a->cluster);
  CUlaunchConfig config = {
      .gridDimX = a->grid[0], .gridDimY = a->grid[1], .gridDimZ = a->grid[2],
      .blockDimX = a->block, .blockDimY = 1, .blockDimZ = 1,
      .sharedMemBytes = a->smem, .hStream = P(CUstream, a->stream), .attrs = attrs, .numAttrs = n,
  };
  ENTER(a->ctx);
  for (uint32_t i = 0; i < ZS_MAX_TENSORS && a->tensors[i].box; i++) {
    const uint32_t rows = a->tensors[i].rows, matrices = a->tensors[i].matrices;
    const uint64_t ld = 2 * a->tensors[i].ld, dims[3] = {a->tensors[i].columns, rows, matrices}, strides[2] = {ld, rows * ld};
    const uint32_t box[3] = {64, a->tensors[i].box, 1}, steps[3] = {1, 1, 1};
    TRY(cuTensorMapEncodeTiled, &maps[i], CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, matrices ? 3 : 2, P(void *, a->tensors[i].data), dims, strides, box, steps,
         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    params[a->nargs + i] = &maps[i];
  }
  TRY(cuLaunchKernelEx, &config, P(CUfunction, a->function), params, NULL);
  LEAVE;
}

zs_result zs_stream_create(zs_cu *cu, uint64_t ctx, uint64_t *stream) {
  CUstream s = NULL;
  ENTER(ctx);
  TRY(cuStreamCreateWithPriority, &s, CU_STREAM_NON_BLOCKING, 0);
  *stream = OUT(s);
  LEAVE;
}

zs_result zs_stream_destroy(zs_cu *cu, uint64_t ctx, uint64_t stream) {
  ENTER(ctx);
  TRY(cuStreamDestroy_v2, P(CUstream, stream));
  LEAVE;
}

zs_result zs_stream_synchronize(zs_cu *cu, uint64_t ctx, uint64_t stream) {
  ENTER(ctx);
  TRY(cuStreamSynchronize, P(CUstream, stream));
  LEAVE;
}

zs_result zs_stream_wait(zs_cu *cu, uint64_t ctx, uint64_t stream, uint64_t event) {
  ENTER(ctx);
  TRY(cuStreamWaitEvent, P(CUstream, stream), P(CUevent, event), 0);
  LEAVE;
}

zs_result zs_stream_capture(zs_cu *cu, uint64_t ctx, uint64_t stream, int *status, uint64_t *id, uint64_t *graph) {
  CUgraph g = NULL;
  ENTER(ctx);
  TRY(cuStreamGetCaptureInfo_v2, P(CUstream, stream), status, id, &g, NULL, NULL);
  *graph = OUT(g);
  LEAVE;
}

zs_result zs_event_create(zs_cu *cu, uint64_t ctx, int sleep, uint64_t *event) {
  CUevent e = NULL;
  ENTER(ctx);
  TRY(cuEventCreate, &e, CU_EVENT_DISABLE_TIMING | (sleep ? CU_EVENT_BLOCKING_SYNC : 0));
  *event = OUT(e);
  LEAVE;
}

zs_result zs_event_destroy(zs_cu *cu, uint64_t ctx, uint64_t event) {
  ENTER(ctx);
  TRY(cuEventDestroy_v2, P(CUevent, event));
  LEAVE;
}

zs_result zs_event_await(zs_cu *cu, uint64_t ctx, uint64_t event) {
  ENTER(ctx);
  TRY(cuEventSynchronize, P(CUevent, event));
  LEAVE;
}

zs_result zs_event_record(zs_cu *cu, uint64_t ctx, uint64_t event, uint64_t stream) {
  ENTER(ctx);
  TRY(cuEventRecord, P(CUevent, event), P(CUstream, stream));
  LEAVE;
}

zs_result zs_memory_info(zs_cu *cu, uint64_t ctx, size_t *free_bytes, size_t *total) {
  ENTER(ctx);
  TRY(cuMemGetInfo_v2, free_bytes, total);
  LEAVE;
}

// Safe while another stream is being captured: the stream is the engine's own and never part of a capture. The fill is done on return.
zs_result zs_alloc_filled(zs_cu *cu, uint64_t ctx, uint64_t stream, size_t bytes, uint8_t value, uint64_t *ptr) {
  CUdeviceptr p = 0;
  int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  ENTER(ctx);
  TRY(cuThreadExchangeStreamCaptureMode, &mode);
  int call = ZS_cuMemAlloc_v2;
  CUresult rc = cu->cuMemAlloc_v2(&p, bytes);
  if (rc == 0) {
    call = ZS_cuMemsetD8Async;
    rc = cu->cuMemsetD8Async(p, value, bytes, P(CUstream, stream));
    if (rc == 0) {
      call = ZS_cuStreamSynchronize;
      rc = cu->cuStreamSynchronize(P(CUstream, stream));
    }
    if (rc != 0) {
      cu->cuMemFree_v2(p);
      p = 0;
    }
  }
  cu->cuThreadExchangeStreamCaptureMode(&mode);
  if (rc != 0) r_ = (zs_result){rc, call};
  *ptr = p;
  LEAVE;
}

zs_result zs_free(zs_cu *cu, uint64_t ctx, uint64_t ptr) {
  ENTER(ctx);
  TRY(cuMemFree_v2, ptr);
  LEAVE;
}

zs_result zs_read(zs_cu *cu, uint64_t ctx, uint64_t stream, void *dst, uint64_t src, size_t bytes) {
  ENTER(ctx);
  TRY(cuMemcpyDtoHAsync_v2, dst, src, bytes, P(CUstream, stream));
  TRY(cuStreamSynchronize, P(CUstream, stream));
  LEAVE;
}

zs_result zs_alloc_host(zs_cu *cu, uint64_t ctx, size_t bytes, uint64_t *ptr) {
  void *p = NULL;
  int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  ENTER(ctx);
  TRY(cuThreadExchangeStreamCaptureMode, &mode);
  CUresult rc = cu->cuMemHostAlloc(&p, bytes, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
  cu->cuThreadExchangeStreamCaptureMode(&mode);
  if (rc != 0) r_ = (zs_result){rc, ZS_cuMemHostAlloc};
  else memset(p, 0, bytes);
  *ptr = OUT(p);
  LEAVE;
}

void zs_mail_clear(uint64_t mail) { __atomic_store_n(P(uint32_t *, mail) + 3, 0, __ATOMIC_RELEASE); }

static int mail_read(uint64_t mail, uint32_t out[3]) {
  const uint32_t *words = P(const uint32_t *, mail);
  if (__atomic_load_n(words + 3, __ATOMIC_ACQUIRE) == 0) return 0;
  memcpy(out, words, 12);
  return 1;
}

// Reading a word in host memory is some microseconds faster than any wait of the driver's. The driver is asked now and then, for work that
// failed; after some milliseconds the stream has a lot to do, and the wait is the driver's.
zs_result zs_mail_wait(zs_cu *cu, uint64_t ctx, uint64_t stream, uint64_t mail, uint32_t out[3], int *there) {
  ENTER(ctx);
  CUresult rc = CUDA_ERROR_NOT_READY;
  for (int turn = 0; turn < 1000 && rc == CUDA_ERROR_NOT_READY; turn++) {
    for (int i = 0; i < 2000; i++)
      if ((*there = mail_read(mail, out)) != 0) goto leave;
    rc = cu->cuStreamQuery(P(CUstream, stream));
  }
  if (rc == CUDA_ERROR_NOT_READY) {
    TRY(cuStreamSynchronize, P(CUstream, stream));
  } else if (rc != 0) {
    r_ = (zs_result){rc, ZS_cuStreamQuery};
  }
  *there = mail_read(mail, out);
  LEAVE;
}

// From pageable memory the driver has taken its copy when this returns, so the caller may reuse src.
zs_result zs_write(zs_cu *cu, uint64_t ctx, uint64_t stream, uint64_t dst, const void *src, size_t bytes) {
  ENTER(ctx);
  TRY(cuMemcpyHtoDAsync_v2, dst, src, bytes, P(CUstream, stream));
  LEAVE;
}

static void raise_flag(void *flag) { __atomic_store_n((int32_t *)flag, 1, __ATOMIC_RELEASE); }

int32_t zs_flag_load(const int32_t *flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }

zs_result zs_graph_release_flag(zs_cu *cu, uint64_t ctx, uint64_t graph, int32_t *released) {
  CUuserObject object = NULL;
  ENTER(ctx);
  TRY(cuUserObjectCreate, &object, released, raise_flag, 1, CU_USER_OBJECT_NO_DESTRUCTOR_SYNC);
  CUresult rc = cu->cuGraphRetainUserObject(P(CUgraph, graph), object, 1, CU_GRAPH_USER_OBJECT_MOVE);
  if (rc != 0) {
    cu->cuUserObjectRelease(object, 1);
    r_ = (zs_result){rc, ZS_cuGraphRetainUserObject};
  }
  LEAVE;
}
