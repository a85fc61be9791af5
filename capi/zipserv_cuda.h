/* SPDX-License-Identifier: Apache-2.0
 *
 * zipserv_cuda.h - the GPU side of the library, for BF16 weights (zs_cuda_gather: FP16 too) on CUDA devices of compute capability 8.0 or newer.
 *
 * Addresses are device addresses in the primary context of the device, streams are CUstream handles (0: the legacy default stream). Calls
 * queue work on the stream and do not wait for it, unless they say so; zs_last_error() tells more when one fails. A failure of the
 * GPU, the driver or the kernel compiler is ZS_ERR_CUDA. Kernels are compiled at first use and kept on disk (see docs/gpu.md).
 */
#ifndef ZIPSERV_CUDA_H
#define ZIPSERV_CUDA_H

#include "zipserv.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Names directories, separated by ':', in which to look for NVRTC before the system's. Opens nothing. */
ZS_API int32_t zs_cuda_set_dirs(const char *dirs);

/* Writes a JSON text about driver, devices, compiler and kernel cache: at most capacity bytes with the ending zero; *length is what it
 * takes. Never fails for a missing driver or compiler: the text then says what is missing. */
ZS_API int32_t zs_cuda_describe(char *text, uint64_t capacity, uint64_t *length);

/* How products are solved, for tuning (docs/gpu.md): takes a request and writes its reply, both JSON. At most capacity bytes of the reply with the
 * ending zero are written; *length is what it takes. Asking again with more room does no harm. */
ZS_API int32_t zs_cuda_control(int32_t device, const char *request, char *text, uint64_t capacity, uint64_t *length);

/* Removes the compiled kernels on disk. */
ZS_API int32_t zs_cuda_clear_cache(void);

/* One token's result has the same bits whatever n is, at some cost in speed for large n. */
ZS_API int32_t zs_cuda_set_batch_invariant(int32_t on);

/* Zero it first: what is added to it in later versions means nothing then. */
typedef struct zs_cuda_linear_t {
    uint64_t stream;
    uint64_t blob; /* a tiled BF16 blob, 16-byte aligned */
    uint64_t m, k, n;
    uint64_t x, ldx; /* [n, k] BF16, elements from row to row */
    uint64_t bias;   /* [m] BF16 or 0 */
    uint64_t y, ldy; /* [n, m] BF16, elements from row to row */
    uint64_t scratch, scratch_bytes; /* device memory, 16-byte aligned, or 0: see zs_cuda_linear */
    uint64_t row0, rows; /* rows not 0: so many of the m rows alone, from row0 on, a multiple of 64; bias and y are of these */
    uint64_t part_rows; /* not 0: y is a matrix of n rows for each part_rows of these rows, a multiple of 64 that divides them, one behind the other */
    uint64_t gated; /* not 0: of all m rows, a multiple of 128, y is [n, m / 2]: silu(first half of the rows) * second half, rounded where separate kernels would */
} zs_cuda_linear_t;

/* y = x w^T + bias. *needs is 0 where it was queued. Else nothing was: 1 (ZS_EXPAND) where it is faster to decompress w and multiply by another library, or
 * where rows are fewer than m, or y is in parts or gated, and no kernel does that (x or a row of it not aligned to 16 bytes, in batch-invariant mode, on GPUs other than
 * Hopper, and but for gates up to 128 tokens); a larger number where that many bytes of scratch memory are needed: call again with that much. Its contents do not matter; it must not
 * be used by anything else until the product is done, and while a graph that the call was captured into replays. */
ZS_API int32_t zs_cuda_linear(int32_t device, const zs_cuda_linear_t *job, uint64_t *needs);
#define ZS_EXPAND 1

/* A product may fetch its first weights before the kernel ahead of it in the stream has ended; the first product with a blob does not.
 * Whoever writes new content to the address of a blob that was used already, by work in a stream, says so here. */
ZS_API int32_t zs_cuda_changed(int32_t device, uint64_t blob);

/* Decodes rows row0 .. row0 + rows - 1 of a tiled BF16 blob of m x k weights to out, whose rows start ld elements apart. row0 must be a
 * multiple of 64. */
ZS_API int32_t zs_cuda_decompress(int32_t device, uint64_t stream, uint64_t blob, uint64_t m, uint64_t k, uint64_t row0, uint64_t rows,
                                  uint64_t out, uint64_t ld);

typedef struct zs_cuda_gather_t {
    uint64_t stream;
    uint64_t blob; /* a tiled blob of m x k weights, 16-byte aligned */
    uint64_t m, k;
    uint64_t ids, n; /* n signed integers in device memory, numbers of rows */
    uint64_t out;    /* [n, k], without gaps */
    int32_t dtype;   /* of the blob: ZS_BF16 or ZS_FP16 */
    int32_t id_bytes; /* 4 or 8 */
} zs_cuda_gather_t;

/* out[i] = row ids[i] of the blob. A number that is no row is a failed assertion of the device, after which its context is lost. */
ZS_API int32_t zs_cuda_gather(int32_t device, const zs_cuda_gather_t *job);

/* Experts of a mixture-of-experts layer, all of one shape, in three calls of which none waits for the device. A *pair* is a token and one of its experts, numbered
 * token * top + slot; an expert's number that is negative, or not below `experts`, is nobody's. `tile` (8, 16, 32 or 64) pairs of an expert are multiplied at a
 * time: its weights are read once for each tile. */
typedef struct zs_cuda_route_t {
    uint64_t stream;
    uint64_t ids, pairs; /* signed integers in device memory, 4096 at most */
    uint64_t top, experts; /* 1024 experts at most */
    uint64_t tile;
    uint64_t routing; /* out: 4 + 6 * pairs words of 32 bits, for zs_cuda_grouped with the same pairs and tile */
    int32_t id_bytes; /* 4 or 8 */
} zs_cuda_route_t;
ZS_API int32_t zs_cuda_route(int32_t device, const zs_cuda_route_t *job);

typedef struct zs_cuda_grouped_t {
    uint64_t stream;
    uint64_t blobs, step; /* tiled BF16 blobs of m x k weights, `step` bytes from one to the next, 16-byte aligned; less than the 128 + 2 m k of a raw blob, so there is none */
    uint64_t m, k;
    uint64_t x; /* BF16 [tokens, k], or with by_pair [pairs, k] */
    uint64_t y; /* BF16 [pairs, m]; rows of nobody's pairs are left as they are */
    uint64_t routing, pairs, tile;
    int32_t by_pair;
    int32_t gated; /* y is [pairs, m / 2]: silu(upper half of the rows of w) * lower half; m is a multiple of 128, tile 32 at most */
} zs_cuda_grouped_t;
/* y[pair] = x[its token, or itself] w[its expert]^T. One launch, whatever was chosen. */
ZS_API int32_t zs_cuda_grouped(int32_t device, const zs_cuda_grouped_t *job);

typedef struct zs_cuda_combine_t {
    uint64_t stream;
    uint64_t y;        /* BF16 [tokens * top, m] */
    uint64_t ids;
    uint64_t weights;  /* float [tokens, top] */
    uint64_t tokens, top, experts, m; /* top is 32 at most */
    uint64_t out;      /* BF16 [tokens, m] */
    int32_t id_bytes;
} zs_cuda_combine_t;
/* out[token] = sum of weights * y over the token's pairs, in FP32, in the order of their experts' numbers. */
ZS_API int32_t zs_cuda_combine(int32_t device, const zs_cuda_combine_t *job);

/* Compiles and loads what experts of m x k weights need for any number of pairs. */
ZS_API int32_t zs_cuda_warm_grouped(int32_t device, uint64_t m, uint64_t k, int32_t gated);

/* A compression: the caller allocates zs_cuda_compress_scratch bytes of device memory. zs_cuda_compress_plan reads some of the weights, waits and
 * tells in nbytes what to allocate for the blob (16-byte aligned): nearly always enough, and about 1 % more than it takes at most; 0: nothing yet.
 * zs_cuda_compress_write reads all weights and writes the blob, if it is not 0 and `room` bytes are enough, waits, and sets mode, checksum, escape_bytes
 * and nbytes, which is now exact. If mode is ZS_TILED and nbytes <= room, the first nbytes bytes are the blob, in the order of the stream, and the rest
 * of the room, if that is at most a 64th of it, is set to 0 in whole 16-byte pieces; else the room holds anything. Then allocate nbytes; a tiled blob
 * takes both calls again; of a raw one zs_cuda_compress_raw writes the header, and the caller copies the matrix behind it.
 * The bytes are those that zs_plan_encode writes. */
typedef struct zs_cuda_compress_t {
    uint64_t stream;
    uint64_t src, ld; /* [m, k] BF16, elements from row to row */
    uint64_t m, k;
    uint64_t shape[ZS_MAX_DIMS];
    int32_t ndim;
    int32_t mode;          /* set by zs_cuda_compress_write, as are the next three */
    uint32_t checksum;
    uint64_t escape_bytes;
    uint64_t nbytes;       /* of the blob; a guess of zs_cuda_compress_plan */
    uint64_t scratch;      /* device memory, 16-byte aligned, untouched until the work of zs_cuda_compress_write is done; zs_cuda_compress_plan clears it, or the caller */
} zs_cuda_compress_t;
ZS_API int32_t zs_cuda_compress_scratch(int32_t device, uint64_t m, uint64_t k, uint64_t *bytes);
ZS_API int32_t zs_cuda_compress_plan(int32_t device, zs_cuda_compress_t *job);
ZS_API int32_t zs_cuda_compress_write(int32_t device, zs_cuda_compress_t *job, uint64_t blob, uint64_t room);
ZS_API int32_t zs_cuda_compress_raw(int32_t device, const zs_cuda_compress_t *job, uint64_t blob);

/* Compiles and loads what products with an m x k weight of up to `tokens` tokens need; gated: those of zs_cuda_linear_gated, too. Waits for the compiler, not for the
 * device. */
ZS_API int32_t zs_cuda_warm(int32_t device, uint64_t m, uint64_t k, uint64_t tokens, int32_t gated);

/* Side stream i of the device, which the library owns, and: later work of `after` waits for the present work of `before`. */
ZS_API int32_t zs_cuda_side_stream(int32_t device, int32_t i, uint64_t *stream);
ZS_API int32_t zs_cuda_follow(int32_t device, uint64_t after, uint64_t before);

/* Loading files: `lanes` threads (1 to 16) read pieces of the parts into page-locked buffers of the library's own and queue their copies on
 * a side stream. Work that is in the stream `after` at the start comes first. One load at a time on a device: another waits. The
 * files must stay open and the memory allocated until zs_cuda_load_finish, which must be called.
 *
 * zs_cuda_load_wait returns when all copies of a part are queued: work that comes into the stream `after` from then on sees the part. *failed is -1, or
 * the number of a part that could not be read. zs_cuda_load_finish waits for all copies, and fails where a part could not be read;
 * with stop, nothing new is read. */
typedef struct zs_cuda_load_part_t {
    uint64_t file; /* descriptor */
    uint64_t offset, bytes;
    uint64_t to;
} zs_cuda_load_part_t;
ZS_API int32_t zs_cuda_load_start(int32_t device, uint64_t after, const zs_cuda_load_part_t *parts, uint64_t count, int32_t lanes,
                                  uint64_t *load);
ZS_API int32_t zs_cuda_load_wait(uint64_t load, uint64_t part, uint64_t after, int64_t *failed);
ZS_API int32_t zs_cuda_load_finish(uint64_t load, int32_t stop);

/* Checks of a blob in host memory what decoding it on a GPU relies on: header, tile headers and the places of the lists. zs_check
 * checks all. */
ZS_API int32_t zs_check_lists(const void *blob, uint64_t len);

#ifdef __cplusplus
}
#endif
#endif
