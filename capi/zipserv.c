// SPDX-License-Identifier: Apache-2.0
// The C functions of zipserv.h. They stand before the Go code, because they must be able to refuse: in a forked child no Go code may run.
#include "internal.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "_cgo_export.h"

// The child's only thread writes this before any other code of the child runs, so a plain variable will do.
static int forked;

static void note_fork(void) { forked = 1; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, note_fork); }

// A thread's message and poll function live in one allocation behind a pthread key: a thread-local variable would
// take static TLS space, which a library loaded at run time cannot count on, and would not be freed.
typedef struct {
    zs_poll_t poll;
    char message[1024];
} thread_state;

static pthread_key_t state_key;
static pthread_once_t state_once = PTHREAD_ONCE_INIT;
static void make_key(void) { pthread_key_create(&state_key, free); }

static thread_state *state(int create) {
    pthread_once(&state_once, make_key);
    thread_state *s = pthread_getspecific(state_key);
    if (s == NULL && create && (s = calloc(1, sizeof *s)) != NULL) pthread_setspecific(state_key, s);
    return s;
}

void zs_set_error(const char *text, uint64_t len) {
    thread_state *s = state(1);
    if (s == NULL) return;
    if (len >= sizeof s->message) {
        len = sizeof s->message - 1;
        while (len > 0 && ((unsigned char)text[len] & 0xC0) == 0x80) len--;  // no half UTF-8 character
    }
    memcpy(s->message, text, len);
    s->message[len] = 0;
}

static int32_t fail(int32_t code, const char *text) {
    zs_set_error(text, strlen(text));
    return code;
}

int32_t zs_forked(void) {
    if (!forked) return 0;
    fail(0, "this process was forked from one that had loaded zipserv, and the threads of its run time did not come along; "
            "start worker processes by spawn instead: multiprocessing.set_start_method(\"spawn\"), or "
            "DataLoader(..., multiprocessing_context=\"spawn\")");
    return 1;
}

zs_poll_t zs_swap_poll(zs_poll_t next) {
    thread_state *s = state(next.fn != NULL);
    zs_poll_t before = {NULL, NULL};
    if (s != NULL) {
        before = s->poll;
        s->poll = next;
    }
    return before;
}

int32_t zs_has_poll(void) {
    thread_state *s = state(0);
    return s != NULL && s->poll.fn != NULL;
}

int32_t zs_call_poll(void) {
    thread_state *s = state(0);
    return s != NULL && s->poll.fn != NULL ? s->poll.fn(s->poll.user) : 0;
}

#define STR_(x) #x
#define STR(x) STR_(x)
const char *zs_version(void) { return ZIPSERV_VERSION; }

const char *zs_last_error(void) {
    thread_state *s = state(0);
    return s == NULL ? "" : s->message;
}

void zs_set_poll(zs_poll_fn poll, void *user) {
    zs_poll_t p = {poll, user};
    zs_swap_poll(p);
}

#define REFUSE_IN_CHILD() do { if (zs_forked()) return ZS_ERR_FORKED; } while (0)
#define REQUIRE(pointer) do { if ((pointer) == NULL) return fail(ZS_ERR_ARGUMENT, #pointer " is NULL"); } while (0)

int32_t zs_plan_new(const void *src, int32_t dtype, uint64_t m, uint64_t k, const uint64_t *shape, int32_t ndim, uint64_t *size,
                    uint64_t *handle) {
    REFUSE_IN_CHILD();
    REQUIRE(src);
    REQUIRE(size);
    REQUIRE(handle);
    if (ndim < 0 || ndim > ZS_MAX_DIMS) return fail(ZS_ERR_ARGUMENT, "ndim must be 0 to " STR(ZS_MAX_DIMS));
    if (ndim > 0) REQUIRE(shape);
    uint64_t own[ZS_MAX_DIMS] = {m, k};
    if (ndim > 0) memcpy(own, shape, (size_t)ndim * sizeof *shape);
    return zsgo_plan_new((void *)src, dtype, m, k, own, ndim > 0 ? ndim : 2, size, handle);
}

int32_t zs_plan_encode(uint64_t handle, void *dst, uint64_t len) {
    REFUSE_IN_CHILD();
    REQUIRE(dst);
    return zsgo_plan_encode(handle, dst, len);
}

int32_t zs_plan_free(uint64_t handle) {
    REFUSE_IN_CHILD();
    return handle == 0 ? ZS_OK : zsgo_plan_free(handle);
}

int32_t zs_info(const void *blob, uint64_t len, zs_info_t *info) {
    REFUSE_IN_CHILD();
    REQUIRE(blob);
    REQUIRE(info);
    return zsgo_info((void *)blob, len, info);
}

int32_t zs_header(const void *header, uint64_t len, zs_info_t *info) {
    REFUSE_IN_CHILD();
    REQUIRE(header);
    REQUIRE(info);
    return zsgo_header((void *)header, len, info);
}

int32_t zs_check(const void *blob, uint64_t len, int32_t full) {
    REFUSE_IN_CHILD();
    REQUIRE(blob);
    return zsgo_check((void *)blob, len, full);
}

int32_t zs_decode(const void *blob, uint64_t len, void *dst, uint64_t dst_len) {
    REFUSE_IN_CHILD();
    REQUIRE(blob);
    REQUIRE(dst);
    return zsgo_decode((void *)blob, len, dst, dst_len);
}

int32_t zs_decode_rows(const void *blob, uint64_t len, uint64_t row0, uint64_t row1, void *dst, uint64_t dst_len, uint64_t stride) {
    REFUSE_IN_CHILD();
    REQUIRE(blob);
    if (row0 != row1) REQUIRE(dst);
    return zsgo_decode_rows((void *)blob, len, row0, row1, dst, dst_len, stride);
}

int32_t zs_linear(const void *blob, uint64_t len, uint64_t m, uint64_t k, uint64_t row0, uint64_t row1, const void *x, uint64_t x_stride, uint64_t rows,
                  const void *bias, void *y, uint64_t y_stride, int32_t threads) {
    REFUSE_IN_CHILD();
    REQUIRE(blob);
    if (rows > 0 && row0 != row1) {
        REQUIRE(x);
        REQUIRE(y);
    }
    return zsgo_linear((void *)blob, len, m, k, row0, row1, (void *)x, x_stride, rows, (void *)bias, y, y_stride, threads);
}

uint64_t zs_linear_few(void) { return zs_forked() ? 0 : zsgo_linear_few(); }

int32_t zs_histogram(const void *src, uint64_t n, int32_t dtype, uint64_t counts[256]) {
    REFUSE_IN_CHILD();
    if (n > 0) REQUIRE(src);
    REQUIRE(counts);
    return zsgo_histogram((void *)src, n, dtype, counts);
}

int32_t zs_checksum(const void *src, uint64_t m, uint64_t k, uint32_t *checksum) {
    REFUSE_IN_CHILD();
    REQUIRE(src);
    REQUIRE(checksum);
    return zsgo_checksum((void *)src, m, k, checksum);
}
