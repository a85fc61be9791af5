// SPDX-License-Identifier: Apache-2.0
// A C program that uses the library as zipserv.h describes it, with no Python in the process. Prints one line for each check that fails;
// the exit status is the number of them. Built and run by tests/python/test_c.py.
#include "zipserv.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int failures;

static void check(int ok, const char *what, int line) {
    if (ok) return;
    __atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);
    printf("line %d: %s (last error: %s)\n", line, what, zs_last_error());
}
#define CHECK(condition) check(condition, #condition, __LINE__)

// Weights that look trained: a bell curve of exponents, all signs and mantissas; some zeros, infinities and NaN payloads.
static uint16_t *weights(uint64_t n, uint64_t seed) {
    uint16_t *w = malloc(2 * n);
    for (uint64_t i = 0; i < n; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        uint64_t r = seed >> 20;
        unsigned exponent = 120 - (unsigned)__builtin_ctzll(r | 1 << 12);
        w[i] = (uint16_t)((r >> 30 & 1) << 15 | exponent << 7 | (r >> 13 & 127));
        if (r % 1000 == 0) w[i] = (uint16_t)(seed >> 40);
    }
    return w;
}

static uint8_t *compress(const uint16_t *w, uint64_t m, uint64_t k, uint64_t *size) {
    uint64_t plan = 0;
    CHECK(zs_plan_new(w, ZS_BF16, m, k, NULL, 0, size, &plan) == ZS_OK);
    uint8_t *blob = malloc(*size);
    CHECK(zs_plan_encode(plan, blob, *size) == ZS_OK);
    CHECK(zs_plan_free(plan) == ZS_OK);
    return blob;
}

static void round_trip(uint64_t m, uint64_t k) {
    uint16_t *w = weights(m * k, m), *back = calloc(m * k, 2);
    uint64_t size = 0;
    uint8_t *blob = compress(w, m, k, &size);
    CHECK(size <= 2 * m * k + 128);
    zs_info_t info, header;
    CHECK(zs_info(blob, size, &info) == ZS_OK);
    CHECK(info.m == m && info.k == k && info.dtype == ZS_BF16 && info.ndim == 2 && info.shape[0] == m && info.shape[1] == k);
    CHECK(info.nbytes == size);
    CHECK(zs_header(blob, 128, &header) == ZS_OK && header.nbytes == size && header.checksum == info.checksum);
    uint32_t sum = 0;
    CHECK(zs_checksum(w, m, k, &sum) == ZS_OK && sum == info.checksum);
    CHECK(zs_check(blob, size, 0) == ZS_OK);
    CHECK(zs_check(blob, size, 1) == ZS_OK);
    CHECK(zs_decode(blob, size, back, 2 * m * k) == ZS_OK);
    CHECK(memcmp(w, back, 2 * m * k) == 0);

    // Two rows of x, of which the second is zero, with a bias: 1 + x W^T in the first, 1 in the second.
    uint16_t *x = calloc(2 * k, 2), *bias = malloc(2 * m), *y = malloc(2 * 2 * m);
    for (uint64_t r = 0; r < m; r++) bias[r] = 0x3F80;
    x[k - 1] = 0x4000; // 2.0 in the last column
    CHECK(zs_linear(blob, size, m, k, 0, m, x, k, 2, bias, y, m, 2) == ZS_OK);
    int right = 1;
    for (uint64_t r = 0; r < m; r++) {
        float weight, got, one;
        uint32_t bits[3] = {(uint32_t)w[r * k + k - 1] << 16, (uint32_t)y[r] << 16, (uint32_t)y[m + r] << 16};
        memcpy(&weight, &bits[0], 4), memcpy(&got, &bits[1], 4), memcpy(&one, &bits[2], 4);
        float want = 1 + 2 * weight, off = got - want;
        int finite = 1; // an infinity or a NaN in a row's other columns makes a NaN of its sums
        for (uint64_t c = 0; c < k; c++) finite &= (w[r * k + c] >> 7 & 255) != 255;
        if (finite) right &= one == 1 && (off < 0 ? -off : off) <= (want < 0 ? -want : want) / 256;
    }
    CHECK(right);
    CHECK(zs_linear(blob, size, m, k + 1, 0, m, x, k + 1, 1, NULL, y, m, 1) == ZS_ERR_ARGUMENT);
    CHECK(zs_linear(blob, size, m, k, 0, m + 1, x, k, 1, NULL, y, m + 1, 1) == ZS_ERR_ARGUMENT);
    CHECK(zs_linear(blob, size, m, k, 0, m, NULL, k, 1, NULL, y, m, 1) == ZS_ERR_ARGUMENT);
    free(x), free(bias), free(y);

    // Rows into a wider matrix: what lies between the rows stays.
    if (m > 2) {
        uint64_t stride = k + 3, rows = m - 2;
        uint16_t *wide = malloc(2 * stride * rows);
        memset(wide, 0xAB, 2 * stride * rows);
        CHECK(zs_decode_rows(blob, size, 1, m - 1, wide, 2 * stride * rows, stride) == ZS_OK);
        int same = 1, kept = 1;
        for (uint64_t r = 0; r < rows; r++) {
            same &= memcmp(wide + r * stride, w + (r + 1) * k, 2 * k) == 0;
            for (uint64_t c = k; c < stride; c++) kept &= wide[r * stride + c] == 0xABAB;
        }
        CHECK(same);
        CHECK(kept);
        free(wide);
    }
    free(w), free(back), free(blob);
}

static void errors(void) {
    uint64_t m = 130, k = 70, size = 0, plan = 0, other;
    uint16_t *w = weights(m * k, 5), *back = malloc(2 * m * k);
    uint8_t *blob = compress(w, m, k, &size);
    zs_info_t info;
    uint64_t wrong[2] = {m, k + 1};

    CHECK(zs_plan_new(NULL, ZS_BF16, m, k, NULL, 0, &other, &plan) == ZS_ERR_ARGUMENT);
    CHECK(strstr(zs_last_error(), "src") != NULL);
    CHECK(zs_plan_new(w, 7, m, k, NULL, 0, &other, &plan) == ZS_ERR_ARGUMENT);
    CHECK(zs_plan_new(w, ZS_BF16, 0, k, NULL, 0, &other, &plan) == ZS_ERR_ARGUMENT);
    CHECK(zs_plan_new(w, ZS_BF16, UINT64_MAX, UINT64_MAX, NULL, 0, &other, &plan) == ZS_ERR_ARGUMENT);
    CHECK(zs_plan_new(w, ZS_BF16, m, k, wrong, 2, &other, &plan) == ZS_ERR_ARGUMENT);
    CHECK(zs_plan_new(w, ZS_BF16, m, k, wrong, 9, &other, &plan) == ZS_ERR_ARGUMENT);
    CHECK(zs_plan_encode(123456, back, 10) == ZS_ERR_ARGUMENT);
    CHECK(zs_plan_free(123456) == ZS_ERR_ARGUMENT);
    CHECK(zs_plan_free(0) == ZS_OK);
    CHECK(zs_plan_new(w, ZS_BF16, m, k, NULL, 0, &other, &plan) == ZS_OK);
    CHECK(zs_plan_encode(plan, back, other - 1) == ZS_ERR_ARGUMENT);
    CHECK(zs_plan_free(plan) == ZS_OK);
    CHECK(zs_plan_free(plan) == ZS_ERR_ARGUMENT);

    CHECK(zs_info(blob, 0, &info) == ZS_ERR_FORMAT);
    CHECK(zs_info(blob, 127, &info) == ZS_ERR_FORMAT);
    CHECK(zs_info(blob, size - 1, &info) == ZS_ERR_FORMAT);
    CHECK(zs_info(w, size, &info) == ZS_ERR_FORMAT);
    CHECK(zs_check(blob, size + 1, 0) == ZS_ERR_FORMAT);
    CHECK(zs_decode(blob, size, back, 2 * m * k - 2) == ZS_ERR_ARGUMENT);
    CHECK(zs_decode(blob, size, NULL, 2 * m * k) == ZS_ERR_ARGUMENT);
    CHECK(zs_decode_rows(blob, size, 0, m + 1, back, 2 * m * k, k) == ZS_ERR_ARGUMENT);
    CHECK(zs_decode_rows(blob, size, 2, 1, back, 2 * m * k, k) == ZS_ERR_ARGUMENT);
    CHECK(zs_decode_rows(blob, size, 0, m, back, 2 * m * k, k - 1) == ZS_ERR_ARGUMENT);
    CHECK(zs_decode_rows(blob, size, 0, m, back, 2 * m * k, k + 1) == ZS_ERR_ARGUMENT);
    CHECK(zs_decode_rows(blob, size, 0, m, back, UINT64_MAX, UINT64_MAX) == ZS_ERR_ARGUMENT);
    CHECK(zs_decode_rows(blob, size, 3, 3, NULL, 0, k) == ZS_OK);

    // A changed weight keeps the structure but not the checksum.
    blob[size / 2] ^= 1;
    CHECK(zs_check(blob, size, 1) == ZS_ERR_FORMAT);
    CHECK(strlen(zs_last_error()) > 10);

    uint64_t counts[256], sum = 0;
    CHECK(zs_histogram(w, m * k, ZS_BF16, counts) == ZS_OK);
    for (int i = 0; i < 256; i++) sum += counts[i];
    CHECK(sum == m * k);
    CHECK(zs_histogram(w, m * k, 0, counts) == ZS_ERR_ARGUMENT);
    free(w), free(back), free(blob);
}

static void *worker(void *argument) {
    uint64_t seed = (uint64_t)(uintptr_t)argument;
    CHECK(strcmp(zs_last_error(), "") == 0);  // a message belongs to its thread
    for (int i = 0; i < 20; i++) {
        round_trip(64 + seed, 65 + (uint64_t)i);
        zs_info_t info;
        CHECK(zs_info("nothing of ours", seed, &info) == ZS_ERR_FORMAT);
        char expected[32];
        snprintf(expected, sizeof expected, "%d bytes", (int)seed);
        CHECK(strstr(zs_last_error(), expected) != NULL);
    }
    return NULL;
}

static void threads(void) {
    pthread_t t[8];
    for (uintptr_t i = 0; i < 8; i++) CHECK(pthread_create(&t[i], NULL, worker, (void *)(i + 1)) == 0);
    for (int i = 0; i < 8; i++) pthread_join(t[i], NULL);
}

static int32_t stop_at_once(void *calls) {
    ++*(int *)calls;
    return 1;
}

static void cancel(void) {
    // Large enough that the first poll finds it at work: nothing encodes 256 MiB in 20 ms on a machine that a test runs on.
    uint64_t m = 8192, k = 16384, size = 0, plan = 0;
    uint16_t *w = calloc(m * k, 2);
    for (uint64_t i = 0; i < m * k; i++) w[i] = (uint16_t)(i * 40503u);
    int calls = 0;
    zs_set_poll(stop_at_once, &calls);
    int32_t code = zs_plan_new(w, ZS_BF16, m, k, NULL, 0, &size, &plan);
    CHECK(code == ZS_ERR_CANCELLED);
    CHECK(calls == 1);
    zs_set_poll(NULL, NULL);
    free(w);
}

static void forked_child(void) {
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        zs_info_t info = {0};
        uint64_t size, plan;
        int ok = zs_info(&info, sizeof info, &info) == ZS_ERR_FORKED && zs_plan_new(&info, 1, 1, 1, NULL, 0, &size, &plan) == ZS_ERR_FORKED &&
                 strstr(zs_last_error(), "spawn") != NULL;
        _exit(ok ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void) {
    CHECK(strcmp(zs_version(), ZIPSERV_VERSION) == 0);
    CHECK(strcmp(zs_last_error(), "") == 0);
    round_trip(1, 1);
    round_trip(1, 1000);
    round_trip(1000, 1);
    round_trip(64, 64);
    round_trip(333, 777);
    errors();
    threads();
    cancel();
    forked_child();
    if (failures == 0) printf("all passed\n");
    return failures > 100 ? 100 : failures;
}
