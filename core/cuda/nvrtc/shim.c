// SPDX-License-Identifier: Apache-2.0
#include "shim.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

int zs_nvrtc_open(zs_nvrtc *n, const char *path, const char *builtins, char *err, size_t errlen) {
  memset(n, 0, sizeof *n);
  // NVRTC opens its builtins by bare name, which succeeds only when they are loaded already or on the loader's path.
  void *first = builtins != NULL ? dlopen(builtins, RTLD_NOW | RTLD_GLOBAL) : NULL;
  void *lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (lib == NULL) {
    const char *text = dlerror();
    snprintf(err, errlen, "%s", text ? text : "dlopen failed");
    if (first != NULL) dlclose(first);
    return -1;
  }
#define ZS_RESOLVE(symbol, result, args)                       \
  *(void **)&n->symbol = dlsym(lib, #symbol);                  \
  if (n->symbol == NULL) {                                     \
    snprintf(err, errlen, "%s has no %s", path, #symbol);      \
    dlclose(lib);                                              \
    return -1;                                                 \
  }
  ZS_NVRTC_SYMBOLS(ZS_RESOLVE)
#undef ZS_RESOLVE
  n->lib = lib;
  return 0;
}

const char *zs_nvrtc_error(zs_nvrtc *n, nvrtcResult code) {
  const char *s = n->nvrtcGetErrorString(code);
  return s != NULL ? s : "unknown";
}

int zs_nvrtc_version(zs_nvrtc *n, int *major, int *minor) { return n->nvrtcVersion(major, minor); }

int zs_nvrtc_archs(zs_nvrtc *n, int *count, int *archs) {
  int rc = n->nvrtcGetNumSupportedArchs(count);
  return rc != 0 || archs == NULL ? rc : n->nvrtcGetSupportedArchs(archs);
}

int zs_nvrtc_create(zs_nvrtc *n, nvrtcProgram *p, const char *source, const char *name, int headers, const char *const *texts,
                    const char *const *names) {
  return n->nvrtcCreateProgram(p, source, name, headers, texts, names);
}

int zs_nvrtc_compile(zs_nvrtc *n, nvrtcProgram p, int options, const char *const *option) { return n->nvrtcCompileProgram(p, options, option); }
int zs_nvrtc_log_size(zs_nvrtc *n, nvrtcProgram p, size_t *size) { return n->nvrtcGetProgramLogSize(p, size); }
int zs_nvrtc_log(zs_nvrtc *n, nvrtcProgram p, char *dst) { return n->nvrtcGetProgramLog(p, dst); }

int zs_nvrtc_image_size(zs_nvrtc *n, nvrtcProgram p, int ptx, size_t *size) {
  return ptx ? n->nvrtcGetPTXSize(p, size) : n->nvrtcGetCUBINSize(p, size);
}

int zs_nvrtc_image(zs_nvrtc *n, nvrtcProgram p, int ptx, char *dst) { return ptx ? n->nvrtcGetPTX(p, dst) : n->nvrtcGetCUBIN(p, dst); }
void zs_nvrtc_destroy(zs_nvrtc *n, nvrtcProgram p) { n->nvrtcDestroyProgram(&p); }
