// SPDX-License-Identifier: Apache-2.0
//
// One table of driver entry points and the few composite calls that must not be cut into several cgo calls: a CUDA context is current
// to an OS thread, and a goroutine may move to another thread between two calls.
#ifndef ZS_SHIM_H
#define ZS_SHIM_H

#include "cuda.h"

typedef struct {
  void *lib;
#define ZS_FIELD(name, args) CUresult(*name) args;
  ZS_CU_SYMBOLS(ZS_FIELD)
#undef ZS_FIELD
} zs_cu;

// A failed call is named by the index of its symbol, so that the message can say which of a composite's calls it was.
enum {
#define ZS_INDEX(name, args) ZS_##name,
  ZS_CU_SYMBOLS(ZS_INDEX)
#undef ZS_INDEX
  ZS_SYMBOL_COUNT
};

typedef struct {
  CUresult code;
  int call;
} zs_result;

#define ZS_MAX_ARGS 25
#define ZS_MAX_TENSORS 2

typedef struct {
  uint64_t ctx, function, stream;
  uint32_t grid[3];
  uint32_t block;
  uint32_t smem;
  uint32_t cluster;      // CTAs along x that share a cluster; 0 or 1: none
  uint32_t programmatic; // may start before the kernel ahead of it in the stream has ended
  uint32_t nargs;
  struct {
    uint32_t box;           // rows of a box; not 0: a tensor map of a BF16 matrix is a parameter after the others,
    uint32_t rows, columns; // in boxes of 64 columns, in the 128-byte swizzle
    uint32_t matrices;      // not 0: a third dimension, of matrices one behind the other
    uint64_t data, ld;      // ld: elements from one row to the next
  } tensors[ZS_MAX_TENSORS];
  uint64_t args[ZS_MAX_ARGS]; // one slot a parameter; narrower ones use the low bytes, a struct, which comes last, all the slots from its own on
} zs_launch_args;

// Opens the library. On failure writes what is wrong to err; *missing is set where the library is there but lacks a symbol.
int zs_cu_open(zs_cu *cu, const char *path, char *err, size_t errlen, int *missing);
const char *zs_cu_symbol(int index);
const char *zs_cu_error_name(zs_cu *cu, CUresult code);
const char *zs_cu_error_text(zs_cu *cu, CUresult code);

zs_result zs_init(zs_cu *cu, int *version, int *devices);
// The first `needed` attributes must be there; the others are 0 where the driver does not tell.
zs_result zs_device(zs_cu *cu, int ordinal, char *name, int namelen, size_t *memory, const int *attributes, int *values, int n, int needed);
zs_result zs_primary(zs_cu *cu, int ordinal, uint64_t *ctx);
zs_result zs_load(zs_cu *cu, uint64_t ctx, const void *image, uint64_t *module);
zs_result zs_unload(zs_cu *cu, uint64_t ctx, uint64_t module);
zs_result zs_function(zs_cu *cu, uint64_t ctx, uint64_t module, const char *name, uint32_t smem, uint64_t *function);
zs_result zs_function_attribute(zs_cu *cu, uint64_t ctx, uint64_t function, int attribute, int *value);
zs_result zs_occupancy(zs_cu *cu, uint64_t ctx, uint64_t function, int block, size_t smem, int *blocks);
zs_result zs_cluster_occupancy(zs_cu *cu, uint64_t ctx, uint64_t function, uint32_t block, uint32_t smem, uint32_t cluster, int *clusters);
zs_result zs_launch(zs_cu *cu, const zs_launch_args *a);
zs_result zs_stream_create(zs_cu *cu, uint64_t ctx, uint64_t *stream);
zs_result zs_stream_destroy(zs_cu *cu, uint64_t ctx, uint64_t stream);
zs_result zs_stream_synchronize(zs_cu *cu, uint64_t ctx, uint64_t stream);
zs_result zs_stream_wait(zs_cu *cu, uint64_t ctx, uint64_t stream, uint64_t event);
zs_result zs_stream_capture(zs_cu *cu, uint64_t ctx, uint64_t stream, int *status, uint64_t *id, uint64_t *graph);
// With sleep, a host thread that awaits the event leaves its processor to others.
zs_result zs_event_create(zs_cu *cu, uint64_t ctx, int sleep, uint64_t *event);
zs_result zs_event_destroy(zs_cu *cu, uint64_t ctx, uint64_t event);
zs_result zs_event_await(zs_cu *cu, uint64_t ctx, uint64_t event);
zs_result zs_event_record(zs_cu *cu, uint64_t ctx, uint64_t event, uint64_t stream);
zs_result zs_memory_info(zs_cu *cu, uint64_t ctx, size_t *free, size_t *total);
zs_result zs_alloc_filled(zs_cu *cu, uint64_t ctx, uint64_t stream, size_t bytes, uint8_t value, uint64_t *ptr);
// Host memory that kernels write to, at the same address. Zeroed. Safe while another stream is being captured.
zs_result zs_alloc_host(zs_cu *cu, uint64_t ctx, size_t bytes, uint64_t *ptr);
// Three words that a kernel leaves in host memory, followed by a fourth that is not 0: zs_mail_clear before its launch, then zs_mail_wait. *there is 0
// where the stream's work has ended without them.
void zs_mail_clear(uint64_t mail);
zs_result zs_mail_wait(zs_cu *cu, uint64_t ctx, uint64_t stream, uint64_t mail, uint32_t out[3], int *there);
zs_result zs_free(zs_cu *cu, uint64_t ctx, uint64_t ptr);
zs_result zs_read(zs_cu *cu, uint64_t ctx, uint64_t stream, void *dst, uint64_t src, size_t bytes);
zs_result zs_write(zs_cu *cu, uint64_t ctx, uint64_t stream, uint64_t dst, const void *src, size_t bytes);

// Ties *released to the life of a graph: it becomes 1 when the graph and all that was instantiated from it are gone.
zs_result zs_graph_release_flag(zs_cu *cu, uint64_t ctx, uint64_t graph, int32_t *released);
int32_t zs_flag_load(const int32_t *flag);

#endif
