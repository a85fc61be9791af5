// SPDX-License-Identifier: Apache-2.0
//
// The part of NVRTC's API that is used, with its ABI declared here: the library is opened at run time.
#ifndef ZS_NVRTC_H
#define ZS_NVRTC_H

#include <stddef.h>

typedef int nvrtcResult;
typedef void *nvrtcProgram;

#define ZS_NVRTC_SYMBOLS(X)                                                                                              \
  X(nvrtcVersion, nvrtcResult, (int *, int *))                                                                           \
  X(nvrtcGetErrorString, const char *, (nvrtcResult))                                                                    \
  X(nvrtcGetNumSupportedArchs, nvrtcResult, (int *))                                                                     \
  X(nvrtcGetSupportedArchs, nvrtcResult, (int *))                                                                        \
  X(nvrtcCreateProgram, nvrtcResult, (nvrtcProgram *, const char *, const char *, int, const char *const *, const char *const *)) \
  X(nvrtcDestroyProgram, nvrtcResult, (nvrtcProgram *))                                                                  \
  X(nvrtcCompileProgram, nvrtcResult, (nvrtcProgram, int, const char *const *))                                          \
  X(nvrtcGetProgramLogSize, nvrtcResult, (nvrtcProgram, size_t *))                                                       \
  X(nvrtcGetProgramLog, nvrtcResult, (nvrtcProgram, char *))                                                             \
  X(nvrtcGetCUBINSize, nvrtcResult, (nvrtcProgram, size_t *))                                                            \
  X(nvrtcGetCUBIN, nvrtcResult, (nvrtcProgram, char *))                                                                  \
  X(nvrtcGetPTXSize, nvrtcResult, (nvrtcProgram, size_t *))                                                              \
  X(nvrtcGetPTX, nvrtcResult, (nvrtcProgram, char *))

typedef struct {
  void *lib;
#define ZS_FIELD(name, result, args) result(*name) args;
  ZS_NVRTC_SYMBOLS(ZS_FIELD)
#undef ZS_FIELD
} zs_nvrtc;

// builtins may be NULL. On failure err says why.
int zs_nvrtc_open(zs_nvrtc *n, const char *path, const char *builtins, char *err, size_t errlen);
const char *zs_nvrtc_error(zs_nvrtc *n, nvrtcResult code);
int zs_nvrtc_version(zs_nvrtc *n, int *major, int *minor);
int zs_nvrtc_archs(zs_nvrtc *n, int *count, int *archs);
int zs_nvrtc_create(zs_nvrtc *n, nvrtcProgram *p, const char *source, const char *name, int headers, const char *const *texts,
                    const char *const *names);
int zs_nvrtc_compile(zs_nvrtc *n, nvrtcProgram p, int options, const char *const *option);
int zs_nvrtc_log_size(zs_nvrtc *n, nvrtcProgram p, size_t *size);
int zs_nvrtc_log(zs_nvrtc *n, nvrtcProgram p, char *dst);
int zs_nvrtc_image_size(zs_nvrtc *n, nvrtcProgram p, int ptx, size_t *size);
int zs_nvrtc_image(zs_nvrtc *n, nvrtcProgram p, int ptx, char *dst);
void zs_nvrtc_destroy(zs_nvrtc *n, nvrtcProgram p);

#endif
