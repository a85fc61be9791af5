// SPDX-License-Identifier: Apache-2.0
//
// A libcuda for tests: two devices, host memory in place of device memory, and a log of what was called. It checks what a real driver
// would check (a context is current, handles are live, launches fit the device) and fails a chosen call on demand.
//   FAKECUDA_VERSION   what cuDriverGetVersion says            FAKECUDA_DEVICES  number of devices
//   FAKECUDA_CC        compute capability, major*10+minor      FAKECUDA_FAIL     "call:code[:after]": that call fails, after so many good ones
#include "../cuda.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500,
       CAPTURE_UNSUPPORTED = 900, INVALID_CLUSTER_SIZE = 912 };

static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static char log_text[1 << 20];
static size_t log_len;
static char fail_call[64];
static int fail_code, fail_after;
static __thread CUcontext stack[16];
static __thread int depth;
static __thread int capture_mode; // 0 global
static long live_allocs, live_streams, live_events, live_modules;
static uint64_t capturing_stream, capture_id;
static int contexts[8];
static struct { void *ptr; CUhostFn fn; int refs; } object;
static struct { void *ptr; CUhostFn fn; } retained[64];
static int retained_count;

static void note(const char *format, ...) {
  va_list ap;
  va_start(ap, format);
  pthread_mutex_lock(&mu);
  if (log_len + 512 < sizeof log_text) log_len += (size_t)vsnprintf(log_text + log_len, 512, format, ap);
  pthread_mutex_unlock(&mu);
  va_end(ap);
}

static int planned(const char *call) {
  const char *env = getenv("FAKECUDA_FAIL");
  int rc = 0;
  pthread_mutex_lock(&mu);
  if (fail_call[0] == 0 && env != NULL) {
    char copy[64];
    snprintf(copy, sizeof copy, "%s", env);
    char *colon = strchr(copy, ':');
    if (colon != NULL) {
      *colon = 0;
      snprintf(fail_call, sizeof fail_call, "%s", copy);
      sscanf(colon + 1, "%d:%d", &fail_code, &fail_after);
    }
  }
  if (strcmp(fail_call, call) == 0 && fail_after-- <= 0) rc = fail_code;
  pthread_mutex_unlock(&mu);
  return rc;
}

#define START(call)                        \
  do {                                     \
    int rc_ = planned(#call);              \
    if (rc_ != 0) return rc_;              \
  } while (0)
#define START_CTX(call)                    \
  START(call);                             \
  if (depth == 0 || stack[depth - 1] == NULL) return INVALID_CONTEXT

// What a test asks of the fake.
EXPORT const char *fake_log(void) { return log_text; }
EXPORT void fake_reset(void) { pthread_mutex_lock(&mu); log_len = 0; log_text[0] = 0; fail_call[0] = 0; fail_code = fail_after = 0; pthread_mutex_unlock(&mu); }
EXPORT void fake_fail(const char *call, int code, int after) {
  pthread_mutex_lock(&mu);
  snprintf(fail_call, sizeof fail_call, "%s", call);
  fail_code = code;
  fail_after = after;
  pthread_mutex_unlock(&mu);
}
EXPORT long fake_live(int what) { return what == 0 ? live_allocs : what == 1 ? live_streams : what == 2 ? live_events : live_modules; }
EXPORT void fake_capture(uint64_t stream, uint64_t id) { capturing_stream = stream; capture_id = id; }
EXPORT void fake_destroy_graphs(void) {
  for (int i = 0; i < retained_count; i++) retained[i].fn(retained[i].ptr);
  retained_count = 0;
}

static int env_int(const char *name, int otherwise) {
  const char *v = getenv(name);
  return v != NULL && *v != 0 ? atoi(v) : otherwise;
}

static int device_count(void) { return env_int("FAKECUDA_DEVICES", 2); }

EXPORT CUresult cuInit(unsigned flags) { START(cuInit); return flags == 0 ? OK : INVALID_VALUE; }
EXPORT CUresult cuDriverGetVersion(int *v) { START(cuDriverGetVersion); *v = env_int("FAKECUDA_VERSION", 13000); return OK; }

EXPORT CUresult cuGetErrorName(CUresult code, const char **s) {
  switch (code) {
  case INVALID_VALUE: *s = "CUDA_ERROR_INVALID_VALUE"; return OK;
  case OUT_OF_MEMORY: *s = "CUDA_ERROR_OUT_OF_MEMORY"; return OK;
  case INVALID_DEVICE: *s = "CUDA_ERROR_INVALID_DEVICE"; return OK;
  case INVALID_IMAGE: *s = "CUDA_ERROR_INVALID_IMAGE"; return OK;
  case INVALID_CONTEXT: *s = "CUDA_ERROR_INVALID_CONTEXT"; return OK;
  case NOT_FOUND: *s = "CUDA_ERROR_NOT_FOUND"; return OK;
  case INVALID_CLUSTER_SIZE: *s = "CUDA_ERROR_INVALID_CLUSTER_SIZE"; return OK;
  case CAPTURE_UNSUPPORTED: *s = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; return OK;
  }
  return INVALID_VALUE;
}
EXPORT CUresult cuGetErrorString(CUresult code, const char **s) {
  if (code == OUT_OF_MEMORY) { *s = "out of memory"; return OK; }
  if (code == INVALID_IMAGE) { *s = "device kernel image is invalid"; return OK; }
  if (code == INVALID_VALUE) { *s = "invalid argument"; return OK; }
  return INVALID_VALUE;
}

EXPORT CUresult cuDeviceGetCount(int *n) { START(cuDeviceGetCount); *n = device_count(); return OK; }
EXPORT CUresult cuDeviceGet(CUdevice *d, int ordinal) {
  START(cuDeviceGet);
  if (ordinal < 0 || ordinal >= device_count()) return INVALID_DEVICE;
  *d = ordinal;
  return OK;
}
EXPORT CUresult cuDeviceGetName(char *s, int n, CUdevice d) { START(cuDeviceGetName); snprintf(s, (size_t)n, "Fake GPU %d", d); return OK; }
EXPORT CUresult cuDeviceTotalMem_v2(size_t *n, CUdevice d) { START(cuDeviceTotalMem_v2); *n = (size_t)(d + 1) << 30; return OK; }
EXPORT CUresult cuDeviceGetAttribute(int *v, int attribute, CUdevice d) {
  START(cuDeviceGetAttribute);
  int cc = env_int("FAKECUDA_CC", 90);
  switch (attribute) {
  case 75: *v = cc / 10; return OK;
  case 76: *v = cc % 10; return OK;
  case 16: *v = 132 - 32 * d; return OK;
  case 97: *v = 232448; return OK;
  case 81: *v = 233472; return OK;
  case 38: *v = 60 << 20; return OK;
  case 13: *v = 1980000; return OK;
  case 36: *v = 3201000; return OK;
  case 37: *v = 6144; return OK;
  }
  return INVALID_VALUE;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) {
  START(cuDevicePrimaryCtxRetain);
  contexts[d]++;
  *c = &contexts[d];
  note("retain %d\n", d);
  return OK;
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) { *flags = 0; *active = contexts[d] > 0; return OK; }
EXPORT CUresult cuCtxGetCurrent(CUcontext *c) { START(cuCtxGetCurrent); *c = depth > 0 ? stack[depth - 1] : NULL; return OK; }
EXPORT CUresult cuCtxPushCurrent_v2(CUcontext c) {
  START(cuCtxPushCurrent_v2);
  if (depth == 16) return INVALID_CONTEXT;
  stack[depth++] = c;
  return OK;
}
EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *c) {
  if (depth == 0) return INVALID_CONTEXT;
  *c = stack[--depth];
  return OK;
}
static int current(void) { return (int)((int *)stack[depth - 1] - contexts); }
EXPORT int fake_context_depth(void) { return depth; }

struct module { int device; char magic[4]; };
struct function { int device; int smem; char name[96]; };

EXPORT CUresult cuModuleLoadData(CUmodule *m, const void *image) {
  START_CTX(cuModuleLoadData);
  const unsigned char *p = image;
  int elf = memcmp(p, "\177ELF", 4) == 0;
  if (!elf && strstr((const char *)p, ".version") == NULL) return INVALID_IMAGE;
  if (capturing_stream != 0 && capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CAPTURE_UNSUPPORTED;
  struct module *mod = calloc(1, sizeof *mod);
  mod->device = current();
  memcpy(mod->magic, "MOD", 4);
  *m = mod;
  __atomic_add_fetch(&live_modules, 1, __ATOMIC_RELAXED);
  note("load %d %s\n", mod->device, elf ? "cubin" : "ptx");
  return OK;
}
EXPORT CUresult cuModuleUnload(CUmodule m) { START_CTX(cuModuleUnload); free(m); __atomic_sub_fetch(&live_modules, 1, __ATOMIC_RELAXED); return OK; }
EXPORT CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  START_CTX(cuModuleGetFunction);
  struct module *mod = m;
  if (memcmp(mod->magic, "MOD", 4) != 0 || mod->device != current()) return INVALID_CONTEXT;
  if (strncmp(name, "missing", 7) == 0) return NOT_FOUND;
  struct function *fn = calloc(1, sizeof *fn);
  fn->device = mod->device;
  fn->smem = 48 * 1024;
  snprintf(fn->name, sizeof fn->name, "%s", name);
  *f = fn;
  return OK;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction f, int attribute, int value) {
  START_CTX(cuFuncSetAttribute);
  if (attribute != 8 || value > 232448) return INVALID_VALUE;
  ((struct function *)f)->smem = value;
  return OK;
}
EXPORT CUresult cuFuncGetAttribute(int *v, int attribute, CUfunction f) { START_CTX(cuFuncGetAttribute); *v = attribute == 4 ? 64 : 0; (void)f; return OK; }
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int block, size_t smem) {
  START_CTX(cuOccupancyMaxActiveBlocksPerMultiprocessor);
  (void)f; (void)block;
  *n = smem == 0 ? 8 : (int)(233472 / (smem + 1024));
  return OK;
}

// The cluster that a launch asks for; 0: one that the device does not have. More than 8 blocks need an attribute of the function.
static unsigned cluster_of(const CUlaunchConfig *c) {
  unsigned x = 1;
  for (unsigned i = 0; i < c->numAttrs; i++) {
    const CUlaunchAttribute *a = &c->attrs[i];
    if (a->id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
    x = a->value.cluster.x;
    if (a->value.cluster.y != 1 || a->value.cluster.z != 1 || x > 8) return 0;
  }
  return x == 0 || c->gridDimX % x != 0 || (x > 1 && env_int("FAKECUDA_CC", 90) < 90) ? 0 : x;
}
// A cluster stays in one of the GPCs, which have 18 SMs each, the last one what is left.
EXPORT CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
  START_CTX(cuOccupancyMaxActiveClusters);
  struct function *fn = f;
  unsigned size = cluster_of(c);
  if (size == 0) return INVALID_CLUSTER_SIZE;
  if (fn->device != current() || (int)c->sharedMemBytes > fn->smem) return INVALID_VALUE;
  int per_sm = c->sharedMemBytes == 0 ? 8 : (int)(233472 / (c->sharedMemBytes + 1024));
  *n = 0;
  for (int sms = 132 - 32 * fn->device; sms > 0; sms -= 18) *n += (sms < 18 ? sms : 18) * per_sm / (int)size;
  return OK;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
  START_CTX(cuLaunchKernelEx);
  struct function *fn = f;
  if (extra != NULL || fn->device != current()) return INVALID_CONTEXT;
  if (c->gridDimX == 0 || c->gridDimY == 0 || c->gridDimZ == 0 || c->gridDimY > 65535 || c->gridDimZ > 65535) return INVALID_VALUE;
  if (c->blockDimX == 0 || c->blockDimX > 1024 || (int)c->sharedMemBytes > fn->smem) return INVALID_VALUE;
  unsigned cluster = cluster_of(c);
  if (cluster == 0) return INVALID_CLUSTER_SIZE;
  char together[32] = "";
  if (cluster > 1) snprintf(together, sizeof together, " cluster %u", cluster);
  int pdl = 0;
  for (unsigned i = 0; i < c->numAttrs; i++)
    if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) pdl = c->attrs[i].value.programmatic_stream_serialization;
  // A driver knows how many parameters a kernel has; this one knows it of some, and logs four of the others.
  static const struct { const char *name; size_t count; } known[] = {{"zs_moe_route", 7}, {"zs_moe_combine", 8}, {"zs_zipgemm_grouped", 10}, {"zs_zipgemm_relay", 15}, {"zs_zipgemm_pair", 13}, {"zs_compress", 25}};
  size_t count = 4;
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (strcmp(fn->name, known[i].name) == 0) count = known[i].count;
  char args[512] = "";
  size_t n = 0;
  for (size_t i = 0; i < count && fn->name[0] != 0; i++) // the first parameters are enough to see that they arrive
    n += (size_t)snprintf(args + n, sizeof args - n, " %llx", (unsigned long long)*(uint64_t *)params[i]);
  note("launch %d %s grid %u,%u,%u block %u smem %u stream %llx pdl %d%s args%s\n", fn->device, fn->name, c->gridDimX, c->gridDimY, c->gridDimZ,
       c->blockDimX, c->sharedMemBytes, (unsigned long long)(uintptr_t)c->hStream, pdl, together, args);
  // The kernels that the host waits for: their results are in the scratch memory already, the mail is what is left to do. A test that lets "mail" or
  // cuStreamQuery fail gets none.
  if (strcmp(fn->name, "zs_compress_sample") == 0 || strcmp(fn->name, "zs_compress") == 0) {
    uint32_t *results = (uint32_t *)*(uintptr_t *)params[4], *mail = (uint32_t *)*(uintptr_t *)params[5];
    if (strcmp(fail_call, "mail") != 0 && strcmp(fail_call, "cuStreamQuery") != 0) {
      mail[0] = results[0], mail[1] = results[1];
      __atomic_store_n(mail + 3, 1, __ATOMIC_RELEASE);
    }
  }
  return OK;
}

EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap *map, int type, uint32_t rank, void *data, const uint64_t *dims, const uint64_t *strides, const uint32_t *box,
                                       const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
  START(cuTensorMapEncodeTiled);
  (void)interleave; (void)promotion; (void)fill;
  if ((uintptr_t)map % 64 != 0 || (uintptr_t)data % 16 != 0 || type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || rank < 2 || rank > 3) return INVALID_VALUE;
  if (dims[0] == 0 || dims[1] == 0 || strides[0] % 16 != 0 || strides[0] == 0 || strides[0] >> 40 != 0) return INVALID_VALUE;
  if (box[0] == 0 || box[0] > 256 || box[1] == 0 || box[1] > 256 || (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * 2 > 128)) return INVALID_VALUE;
  if (steps[0] != 1 || steps[1] != 1) return INVALID_VALUE;
  if (rank == 3 && (dims[2] == 0 || strides[1] != dims[1] * strides[0] || strides[1] >> 40 != 0 || box[2] != 1 || steps[2] != 1)) return INVALID_VALUE;
  memset(map, 0, sizeof *map);
  if (rank == 3 && dims[2] > 1) note("%llu of ", (unsigned long long)dims[2]);
  note("tensor %llux%llu ld %llu box %ux%u\n", (unsigned long long)dims[1], (unsigned long long)dims[0], (unsigned long long)strides[0] / 2, box[1], box[0]);
  return OK;
}

EXPORT CUresult cuStreamCreateWithPriority(CUstream *s, unsigned flags, int priority) {
  START_CTX(cuStreamCreateWithPriority);
  (void)flags; (void)priority;
  *s = malloc(16);
  __atomic_add_fetch(&live_streams, 1, __ATOMIC_RELAXED);
  return OK;
}
EXPORT CUresult cuStreamDestroy_v2(CUstream s) { START_CTX(cuStreamDestroy_v2); free(s); __atomic_sub_fetch(&live_streams, 1, __ATOMIC_RELAXED); return OK; }
EXPORT CUresult cuStreamSynchronize(CUstream s) {
  START_CTX(cuStreamSynchronize);
  if (capturing_stream != 0 && (uint64_t)(uintptr_t)s == capturing_stream) return CAPTURE_UNSUPPORTED;
  note("synchronize\n");
  return OK;
}
EXPORT CUresult cuStreamQuery(CUstream s) {
  START_CTX(cuStreamQuery);
  if (capturing_stream != 0 && (uint64_t)(uintptr_t)s == capturing_stream) return CAPTURE_UNSUPPORTED;
  return OK;
}
EXPORT CUresult cuStreamWaitEvent(CUstream s, CUevent e, unsigned flags) { START_CTX(cuStreamWaitEvent); (void)s; (void)e; note("wait\n"); return flags == 0 ? OK : INVALID_VALUE; }
EXPORT CUresult cuStreamGetCaptureInfo_v2(CUstream s, int *status, uint64_t *id, CUgraph *g, const void ***deps, size_t *n) {
  START_CTX(cuStreamGetCaptureInfo_v2);
  (void)deps; (void)n;
  *status = capturing_stream != 0 && (uint64_t)(uintptr_t)s == capturing_stream;
  if (*status) { *id = capture_id; *g = (CUgraph)(uintptr_t)(0x6000 + capture_id); }
  return OK;
}
EXPORT CUresult cuThreadExchangeStreamCaptureMode(int *mode) { START(cuThreadExchangeStreamCaptureMode); int old = capture_mode; capture_mode = *mode; *mode = old; return OK; }

EXPORT CUresult cuEventCreate(CUevent *e, unsigned flags) { START_CTX(cuEventCreate); (void)flags; *e = malloc(16); __atomic_add_fetch(&live_events, 1, __ATOMIC_RELAXED); return OK; }
EXPORT CUresult cuEventDestroy_v2(CUevent e) { START_CTX(cuEventDestroy_v2); free(e); __atomic_sub_fetch(&live_events, 1, __ATOMIC_RELAXED); return OK; }
EXPORT CUresult cuEventSynchronize(CUevent e) { START_CTX(cuEventSynchronize); (void)e; return OK; }
EXPORT CUresult cuEventRecord(CUevent e, CUstream s) { START_CTX(cuEventRecord); (void)e; (void)s; note("record\n"); return OK; }

EXPORT CUresult cuMemGetInfo_v2(size_t *f, size_t *t) { START_CTX(cuMemGetInfo_v2); *t = 1 << 30; *f = 1 << 29; return OK; }
EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t n) {
  START_CTX(cuMemAlloc_v2);
  if (n > (1u << 30)) return OUT_OF_MEMORY;
  if (capturing_stream != 0 && capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CAPTURE_UNSUPPORTED;
  *p = (CUdeviceptr)(uintptr_t)malloc(n);
  memset((void *)(uintptr_t)*p, 0xCD, n); // fresh device memory is not zero
  __atomic_add_fetch(&live_allocs, 1, __ATOMIC_RELAXED);
  note("alloc %zu\n", n);
  return OK;
}
EXPORT CUresult cuMemHostAlloc(void **p, size_t n, unsigned flags) {
  START_CTX(cuMemHostAlloc);
  if (flags != (CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP)) return INVALID_VALUE;
  if (capturing_stream != 0 && capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CAPTURE_UNSUPPORTED;
  *p = malloc(n);
  memset(*p, 0xCD, n);
  return OK;
}
EXPORT CUresult cuMemFree_v2(CUdeviceptr p) { START_CTX(cuMemFree_v2); free((void *)(uintptr_t)p); __atomic_sub_fetch(&live_allocs, 1, __ATOMIC_RELAXED); return OK; }
EXPORT CUresult cuMemsetD8Async(CUdeviceptr p, unsigned char v, size_t n, CUstream s) { START_CTX(cuMemsetD8Async); (void)s; memset((void *)(uintptr_t)p, v, n); return OK; }
EXPORT CUresult cuMemcpyDtoHAsync_v2(void *dst, CUdeviceptr src, size_t n, CUstream s) { START_CTX(cuMemcpyDtoHAsync_v2); (void)s; memcpy(dst, (void *)(uintptr_t)src, n); return OK; }
EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr dst, const void *src, size_t n, CUstream s) { START_CTX(cuMemcpyHtoDAsync_v2); (void)s; memcpy((void *)(uintptr_t)dst, src, n); return OK; }

EXPORT CUresult cuUserObjectCreate(CUuserObject *o, void *ptr, CUhostFn fn, unsigned refs, unsigned flags) {
  START_CTX(cuUserObjectCreate);
  if (flags != CU_USER_OBJECT_NO_DESTRUCTOR_SYNC) return INVALID_VALUE;
  object.ptr = ptr; object.fn = fn; object.refs = (int)refs;
  *o = &object;
  return OK;
}
EXPORT CUresult cuUserObjectRelease(CUuserObject o, unsigned n) { START(cuUserObjectRelease); (void)o; (void)n; object.fn(object.ptr); return OK; }
EXPORT CUresult cuGraphRetainUserObject(CUgraph g, CUuserObject o, unsigned n, unsigned flags) {
  START_CTX(cuGraphRetainUserObject);
  (void)o;
  if (g == NULL || n != 1 || flags != CU_GRAPH_USER_OBJECT_MOVE || retained_count == 64) return INVALID_VALUE;
  retained[retained_count].ptr = object.ptr;
  retained[retained_count++].fn = object.fn;
  return OK;
}
