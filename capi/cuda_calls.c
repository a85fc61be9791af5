// SPDX-License-Identifier: Apache-2.0
// The C functions of zipserv_cuda.h: they refuse in a forked child and check for NULL, then enter the Go code of cuda.go.
#include "zipserv_cuda.h"

#include <string.h>

#include "_cgo_export.h"
#include "internal.h"

#define REFUSE_IN_CHILD() do { if (zs_forked()) return ZS_ERR_FORKED; } while (0)

static int32_t null_argument(const char *text) {
    zs_set_error(text, strlen(text));
    return ZS_ERR_ARGUMENT;
}
#define REQUIRE(pointer) do { if ((pointer) == NULL) return null_argument(#pointer " is NULL"); } while (0)

int32_t zs_cuda_set_dirs(const char *dirs) {
    REFUSE_IN_CHILD();
    REQUIRE(dirs);
    return zsgo_cuda_set_dirs((char *)dirs);
}

int32_t zs_cuda_describe(char *text, uint64_t capacity, uint64_t *length) {
    REFUSE_IN_CHILD();
    REQUIRE(length);
    if (capacity > 0) REQUIRE(text);
    return zsgo_cuda_describe(text, capacity, length);
}

int32_t zs_cuda_control(int32_t device, const char *request, char *text, uint64_t capacity, uint64_t *length) {
    REFUSE_IN_CHILD();
    REQUIRE(request);
    REQUIRE(length);
    if (capacity > 0) REQUIRE(text);
    return zsgo_cuda_control(device, (char *)request, text, capacity, length);
}

int32_t zs_cuda_clear_cache(void) {
    REFUSE_IN_CHILD();
    return zsgo_cuda_clear_cache();
}

int32_t zs_cuda_set_batch_invariant(int32_t on) {
    REFUSE_IN_CHILD();
    return zsgo_cuda_set_batch_invariant(on);
}

int32_t zs_cuda_linear(int32_t device, const zs_cuda_linear_t *job, uint64_t *needs) {
    REFUSE_IN_CHILD();
    REQUIRE(job);
    REQUIRE(needs);
    return zsgo_cuda_linear(device, (zs_cuda_linear_t *)job, needs);
}

int32_t zs_cuda_changed(int32_t device, uint64_t blob) {
    REFUSE_IN_CHILD();
    return zsgo_cuda_changed(device, blob);
}

int32_t zs_cuda_decompress(int32_t device, uint64_t stream, uint64_t blob, uint64_t m, uint64_t k, uint64_t row0, uint64_t rows,
                           uint64_t out, uint64_t ld) {
    REFUSE_IN_CHILD();
    return zsgo_cuda_decompress(device, stream, blob, m, k, row0, rows, out, ld);
}

int32_t zs_cuda_gather(int32_t device, const zs_cuda_gather_t *job) {
    REFUSE_IN_CHILD();
    REQUIRE(job);
    return zsgo_cuda_gather(device, (zs_cuda_gather_t *)job);
}

int32_t zs_cuda_route(int32_t device, const zs_cuda_route_t *job) {
    REFUSE_IN_CHILD();
    REQUIRE(job);
    return zsgo_cuda_route(device, (zs_cuda_route_t *)job);
}

int32_t zs_cuda_grouped(int32_t device, const zs_cuda_grouped_t *job) {
    REFUSE_IN_CHILD();
    REQUIRE(job);
    return zsgo_cuda_grouped(device, (zs_cuda_grouped_t *)job);
}

int32_t zs_cuda_combine(int32_t device, const zs_cuda_combine_t *job) {
    REFUSE_IN_CHILD();
    REQUIRE(job);
    return zsgo_cuda_combine(device, (zs_cuda_combine_t *)job);
}

int32_t zs_cuda_warm_grouped(int32_t device, uint64_t m, uint64_t k, int32_t gated) {
    REFUSE_IN_CHILD();
    return zsgo_cuda_warm_grouped(device, m, k, gated);
}

int32_t zs_cuda_compress_scratch(int32_t device, uint64_t m, uint64_t k, uint64_t *bytes) {
    REFUSE_IN_CHILD();
    REQUIRE(bytes);
    return zsgo_cuda_compress_scratch(device, m, k, bytes);
}

int32_t zs_cuda_compress_plan(int32_t device, zs_cuda_compress_t *job) {
    REFUSE_IN_CHILD();
    REQUIRE(job);
    return zsgo_cuda_compress_plan(device, job);
}

int32_t zs_cuda_compress_write(int32_t device, zs_cuda_compress_t *job, uint64_t blob, uint64_t room) {
    REFUSE_IN_CHILD();
    REQUIRE(job);
    return zsgo_cuda_compress_write(device, job, blob, room);
}

int32_t zs_cuda_compress_raw(int32_t device, const zs_cuda_compress_t *job, uint64_t blob) {
    REFUSE_IN_CHILD();
    REQUIRE(job);
    return zsgo_cuda_compress_raw(device, (zs_cuda_compress_t *)job, blob);
}

int32_t zs_cuda_warm(int32_t device, uint64_t m, uint64_t k, uint64_t tokens, int32_t gated) {
    REFUSE_IN_CHILD();
    return zsgo_cuda_warm(device, m, k, tokens, gated);
}

int32_t zs_cuda_load_start(int32_t device, uint64_t after, const zs_cuda_load_part_t *parts, uint64_t count, int32_t lanes,
                           uint64_t *load) {
    REFUSE_IN_CHILD();
    if (count > 0) REQUIRE(parts);
    REQUIRE(load);
    return zsgo_cuda_load_start(device, after, (zs_cuda_load_part_t *)parts, count, lanes, load);
}

int32_t zs_cuda_load_wait(uint64_t load, uint64_t part, uint64_t after, int64_t *failed) {
    REFUSE_IN_CHILD();
    REQUIRE(failed);
    return zsgo_cuda_load_wait(load, part, after, failed);
}

int32_t zs_cuda_load_finish(uint64_t load, int32_t stop) {
    REFUSE_IN_CHILD();
    return zsgo_cuda_load_finish(load, stop);
}

int32_t zs_check_lists(const void *blob, uint64_t len) {
    REFUSE_IN_CHILD();
    return zsgo_check_lists((void *)blob, len);
}

int32_t zs_cuda_side_stream(int32_t device, int32_t i, uint64_t *stream) {
    REFUSE_IN_CHILD();
    REQUIRE(stream);
    if (i < 0) return null_argument("a side stream's number must be 0 or more");
    return zsgo_cuda_side_stream(device, i, stream);
}

int32_t zs_cuda_follow(int32_t device, uint64_t after, uint64_t before) {
    REFUSE_IN_CHILD();
    return zsgo_cuda_follow(device, after, before);
}
