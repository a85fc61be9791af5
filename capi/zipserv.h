/* SPDX-License-Identifier: Apache-2.0
 *
 * zipserv.h - lossless compression of 16-bit floating-point weights (the format is docs/format.md).
 *
 * The library is the file _zipserv.abi3.so of the Python package: one file that is both the Python extension and a plain
 * C library. `python -m zipserv.paths` prints where both this header and the library lie. A C program needs no Python:
 *
 *     cc prog.c -I"$(python -m zipserv.paths --include)" "$(python -m zipserv.paths --library)" -Wl,-rpath,DIR
 *
 * Rules that hold for every function:
 *  - It returns ZS_OK or one of the error codes below; zs_last_error() then tells more.
 *  - It may be called from many threads at once.
 *  - Long work uses all cores (environment variable GOMAXPROCS sets fewer) and can be stopped: see zs_set_poll.
 *  - It keeps no pointer that it was given beyond its return, with the one exception that zs_plan_new names.
 *  - In a child of fork() it fails with ZS_ERR_FORKED and does nothing: the library's run time has threads, and threads do not
 *    survive a fork. Start such processes by spawn (posix_spawn, fork + exec).
 *  - Matrices are row-major and contiguous, little-endian, at any alignment.
 */
#ifndef ZIPSERV_H
#define ZIPSERV_H

#include <stdint.h>

#define ZIPSERV_VERSION "0.1.0" /* the one place that says it; the Python package reads it here */

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define ZS_API __attribute__((visibility("default")))
#else
#define ZS_API
#endif

/* Error codes. */
enum {
    ZS_OK = 0,
    ZS_ERR_ARGUMENT = 1,  /* an argument is wrong: a null pointer, a shape, a length, a row range */
    ZS_ERR_FORMAT = 2,    /* the blob is not valid: truncated, damaged, or not of this format */
    ZS_ERR_CANCELLED = 3, /* the poll function asked to stop */
    ZS_ERR_FORKED = 4,    /* called in a child of fork() */
    ZS_ERR_INTERNAL = 5,  /* a fault in the library itself */
    ZS_ERR_CUDA = 6       /* the GPU, its driver or the kernel compiler failed or is not there */
};

/* Types of weights: the codes that the format's header uses. */
enum { ZS_BF16 = 1, ZS_FP16 = 2 };

/* Modes of a blob. */
enum { ZS_RAW = 0, ZS_TILED = 1 };

/* Most dimensions a tensor can have. */
#define ZS_MAX_DIMS 8

/* What a blob says of itself. */
typedef struct zs_info_t {
    uint64_t m, k;                /* rows and columns of the stored matrix */
    uint64_t shape[ZS_MAX_DIMS];  /* shape of the tensor; entries from ndim on are 0 */
    uint64_t nbytes;              /* bytes of the blob */
    uint64_t tiles;               /* 64 x 64 block tiles (0 when raw) */
    uint64_t dense_tiles;         /* tiles in dense mode */
    uint64_t escapes;             /* listed weights outside their tile's window */
    uint64_t literals;            /* escapes that need a literal exponent byte */
    uint32_t checksum;            /* of the original weights */
    int32_t dtype;                /* ZS_BF16 or ZS_FP16 */
    int32_t mode;                 /* ZS_RAW or ZS_TILED */
    int32_t ndim;
} zs_info_t;

/* The library's version, such as ZIPSERV_VERSION. Never fails. */
ZS_API const char *zs_version(void);

/* The message of this thread's latest failed call, in UTF-8; "" if there was none. It stays valid until the thread's
 * next failing call. Never fails. */
ZS_API const char *zs_last_error(void);

/* Sets this thread's poll function, or removes it (NULL). While a long call of this thread works, it calls poll(user) on this
 * same thread about every 20 ms; a result other than 0 stops the work, and the call returns ZS_ERR_CANCELLED. Its output
 * bytes are then undefined. Never fails. */
typedef int32_t (*zs_poll_fn)(void *user);
ZS_API void zs_set_poll(zs_poll_fn poll, void *user);

/* Compression, first pass: reads the m x k matrix at src, chooses the windows and computes the blob's size.
 * shape[0 .. ndim) is the shape of the tensor that the matrix stores; its product must be m*k. ndim 0 means the shape (m, k).
 * On success *size is the number of bytes that zs_plan_encode will write, and *handle names the plan; release it with
 * zs_plan_free. The plan keeps src: its bytes must stay, unchanged, until then. */
ZS_API int32_t zs_plan_new(const void *src, int32_t dtype, uint64_t m, uint64_t k, const uint64_t *shape, int32_t ndim,
                           uint64_t *size, uint64_t *handle);

/* Compression, second pass: writes the blob to dst. len must be the size that zs_plan_new gave. */
ZS_API int32_t zs_plan_encode(uint64_t handle, void *dst, uint64_t len);

/* Releases a plan. A handle that is not (or no longer) known is ZS_ERR_ARGUMENT; 0 is accepted and ignored. */
ZS_API int32_t zs_plan_free(uint64_t handle);

/* Reads what a blob says of itself: its header, tile headers and escape lists. Use zs_check for a blob that is not trusted. */
ZS_API int32_t zs_info(const void *blob, uint64_t len, zs_info_t *info);

/* The same from the first 128 bytes of a blob alone (len >= 128): tiles' counters are 0. Serves where the rest lies elsewhere. */
ZS_API int32_t zs_header(const void *header, uint64_t len, zs_info_t *info);

/* Checks a blob of exactly len bytes. full = 0: the whole structure, so that any decoder can read it without leaving it.
 * full = 1: also decodes it and compares the checksum, so that the weights are known to be the original ones. */
ZS_API int32_t zs_check(const void *blob, uint64_t len, int32_t full);

/* Decodes the whole blob: dst_len must be 2*m*k bytes. */
ZS_API int32_t zs_decode(const void *blob, uint64_t len, void *dst, uint64_t dst_len);

/* Decodes the rows row0 .. row1-1. Row r starts at dst + 2*stride*(r - row0); stride (in weights) is at least k, and dst_len at least
 * 2*(stride*(row1 - row0 - 1) + k) bytes. Bytes between rows are not touched. */
ZS_API int32_t zs_decode_rows(const void *blob, uint64_t len, uint64_t row0, uint64_t row1, void *dst, uint64_t dst_len,
                              uint64_t stride);

/* y = x W^T + bias for BF16, with the rows row0 .. row1-1 (row0 a multiple of 64) of a compressed W of m x k weights, decoded tile by tile: no memory
 * for the decompressed weight is used. x has `rows` rows of k elements, y as many of row1 - row0; they are x_stride and y_stride elements apart. bias
 * has row1 - row0 elements or is NULL. Sums are FP32; a row's result has the same bits whatever other rows there are and for any number of threads:
 * at most `threads` work on it, all cores where that is below 1. */
ZS_API int32_t zs_linear(const void *blob, uint64_t len, uint64_t m, uint64_t k, uint64_t row0, uint64_t row1, const void *x, uint64_t x_stride,
                         uint64_t rows, const void *bias, void *y, uint64_t y_stride, int32_t threads);

/* Up to so many rows zs_linear is faster on this processor than zs_decode_rows and a product by a good BF16 library; 0 where it never is. */
ZS_API uint64_t zs_linear_few(void);

/* Counts the exponents of n weights into counts[256] (FP16 uses the first 32). */
ZS_API int32_t zs_histogram(const void *src, uint64_t n, int32_t dtype, uint64_t counts[256]);

/* The checksum of an m x k matrix of 16-bit weights, as docs/format.md section 7 defines it. */
ZS_API int32_t zs_checksum(const void *src, uint64_t m, uint64_t k, uint32_t *checksum);

#ifdef __cplusplus
}
#endif
#endif
