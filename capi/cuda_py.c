// SPDX-License-Identifier: Apache-2.0
// The CUDA functions of the Python module. Addresses, streams and sizes are ints; zipserv/cuda.py checks tensors and calls these.
#include "py.h"
#include "zipserv_cuda.h"

#include <stdlib.h>

#define ARG(i, name) \
    uint64_t name;   \
    if (!zs_py_u64(args, i, #name, &name)) return NULL
#define ARGS(function, count) \
    if (!zs_py_count(function, nargs, count)) return NULL

// Arguments that go to fields of a job, in order from the one numbered `first`.
typedef struct {
    const char *name;
    uint64_t *value;
} field_t;
static int read_fields(PyObject *const *args, Py_ssize_t first, const field_t *fields, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (!zs_py_u64(args, first + (Py_ssize_t)i, fields[i].name, fields[i].value)) return 0;
    return 1;
}
#define READ(first, fields) read_fields(args, first, fields, sizeof fields / sizeof *fields)

// A launch may wait for room in the driver's queue, and compiling takes its time: both without the GIL. No poll function: neither can be
// stopped half way.
#define WITHOUT_GIL(statement)                     \
    do {                                           \
        PyThreadState *thread = PyEval_SaveThread(); \
        statement;                                 \
        PyEval_RestoreThread(thread);              \
    } while (0)

static int32_t device_number(uint64_t device) { return device > INT32_MAX ? -1 : (int32_t)device; }

static PyObject *py_set_dirs(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_set_dirs", 1);
    Py_ssize_t length;
    const char *dirs = PyUnicode_AsUTF8AndSize(args[0], &length);
    if (dirs == NULL) return NULL;
    int32_t code = zs_cuda_set_dirs(dirs);
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

// The reply to a request, or without one the description of everything.
static PyObject *text_of(int32_t device, const char *request) {
    uint64_t capacity = 16384, length = 0;
    for (;;) {
        char *text = malloc(capacity);
        if (text == NULL) return PyErr_NoMemory();
        int32_t code;
        if (request)
            WITHOUT_GIL(code = zs_cuda_control(device, request, text, capacity, &length));
        else
            WITHOUT_GIL(code = zs_cuda_describe(text, capacity, &length));
        PyObject *out = NULL;
        if (code != ZS_OK) {
            out = zs_py_fail(code);
        } else if (length <= capacity) {
            out = PyUnicode_FromStringAndSize(text, (Py_ssize_t)length - 1);
        }
        free(text);
        if (code != ZS_OK || length <= capacity) return out;
        capacity = length + 1024;
    }
}

static PyObject *py_describe(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    return text_of(0, NULL);
}

static PyObject *py_control(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_control", 2);
    ARG(0, device);
    Py_ssize_t length;
    const char *request = PyUnicode_AsUTF8AndSize(args[1], &length);
    if (request == NULL) return NULL;
    return text_of(device_number(device), request);
}

static PyObject *py_clear_cache(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    int32_t code = zs_cuda_clear_cache();
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_set_batch_invariant(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_set_batch_invariant", 1);
    int on = PyObject_IsTrue(args[0]);
    if (on < 0) return NULL;
    int32_t code = zs_cuda_set_batch_invariant(on);
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_linear(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (nargs != 16 && nargs != 17) {
        ARGS("cuda_linear", 13);
    }
    ARG(0, device);
    zs_cuda_linear_t job = {0};
    const field_t fields[] = {
        {"stream", &job.stream}, {"blob", &job.blob}, {"m", &job.m}, {"k", &job.k}, {"x", &job.x}, {"n", &job.n}, {"ldx", &job.ldx},
        {"bias", &job.bias}, {"y", &job.y}, {"ldy", &job.ldy}, {"scratch", &job.scratch}, {"scratch_bytes", &job.scratch_bytes},
    };
    if (!READ(1, fields)) return NULL;
    const field_t rows[] = {{"row0", &job.row0}, {"rows", &job.rows}, {"part_rows", &job.part_rows}};
    if (nargs > 13 && !READ(13, rows)) return NULL;
    const field_t gated[] = {{"gated", &job.gated}};
    if (nargs > 16 && !READ(16, gated)) return NULL;
    int32_t code;
    uint64_t needs = 0;
    WITHOUT_GIL(code = zs_cuda_linear(device_number(device), &job, &needs));
    if (code != ZS_OK) return zs_py_fail(code);
    return PyLong_FromUnsignedLongLong(needs);
}

static PyObject *py_changed(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_changed", 2);
    ARG(0, device);
    ARG(1, blob);
    int32_t code = zs_cuda_changed(device_number(device), blob);
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_decompress(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_decompress", 9);
    ARG(0, device);
    ARG(1, stream);
    ARG(2, blob);
    ARG(3, m);
    ARG(4, k);
    ARG(5, row0);
    ARG(6, rows);
    ARG(7, out);
    ARG(8, ld);
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_decompress(device_number(device), stream, blob, m, k, row0, rows, out, ld));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_gather(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_gather", 10);
    ARG(0, device);
    zs_cuda_gather_t job;
    uint64_t dtype, id_bytes;
    const field_t fields[] = {
        {"stream", &job.stream}, {"blob", &job.blob}, {"dtype", &dtype}, {"m", &job.m}, {"k", &job.k}, {"ids", &job.ids}, {"id_bytes", &id_bytes},
        {"n", &job.n}, {"out", &job.out},
    };
    if (!READ(1, fields)) return NULL;
    job.dtype = (int32_t)(dtype & 0xFF), job.id_bytes = (int32_t)(id_bytes & 0xFF);
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_gather(device_number(device), &job));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_route(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_route", 9);
    ARG(0, device);
    zs_cuda_route_t job;
    uint64_t id_bytes;
    const field_t fields[] = {
        {"stream", &job.stream}, {"ids", &job.ids}, {"id_bytes", &id_bytes}, {"pairs", &job.pairs}, {"top", &job.top}, {"experts", &job.experts}, {"tile", &job.tile},
        {"routing", &job.routing},
    };
    if (!READ(1, fields)) return NULL;
    job.id_bytes = (int32_t)(id_bytes & 0xFF);
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_route(device_number(device), &job));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_grouped(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_grouped", 13);
    ARG(0, device);
    zs_cuda_grouped_t job;
    uint64_t by_pair, gated;
    const field_t fields[] = {
        {"stream", &job.stream}, {"blobs", &job.blobs}, {"step", &job.step}, {"m", &job.m}, {"k", &job.k}, {"x", &job.x}, {"by_pair", &by_pair}, {"y", &job.y},
        {"routing", &job.routing}, {"pairs", &job.pairs}, {"tile", &job.tile}, {"gated", &gated},
    };
    if (!READ(1, fields)) return NULL;
    job.by_pair = by_pair != 0, job.gated = gated != 0;
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_grouped(device_number(device), &job));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_combine(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_combine", 11);
    ARG(0, device);
    zs_cuda_combine_t job;
    uint64_t id_bytes;
    const field_t fields[] = {
        {"stream", &job.stream}, {"y", &job.y}, {"ids", &job.ids}, {"id_bytes", &id_bytes}, {"weights", &job.weights}, {"tokens", &job.tokens}, {"top", &job.top},
        {"experts", &job.experts}, {"m", &job.m}, {"out", &job.out},
    };
    if (!READ(1, fields)) return NULL;
    job.id_bytes = (int32_t)(id_bytes & 0xFF);
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_combine(device_number(device), &job));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_warm_grouped(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_warm_grouped", 4);
    ARG(0, device);
    ARG(1, m);
    ARG(2, k);
    ARG(3, gated);
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_warm_grouped(device_number(device), m, k, gated != 0));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_compress_scratch(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_compress_scratch", 3);
    ARG(0, device);
    ARG(1, m);
    ARG(2, k);
    uint64_t bytes = 0;
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_compress_scratch(device_number(device), m, k, &bytes));
    if (code != ZS_OK) return zs_py_fail(code);
    return PyLong_FromUnsignedLongLong(bytes);
}

// The first eight arguments of a compression's calls: device, stream, src, ld, m, k, shape, scratch.
static int compress_job(PyObject *const *args, uint64_t *device, zs_cuda_compress_t *job) {
    const field_t fields[] = {
        {"device", device}, {"stream", &job->stream}, {"src", &job->src}, {"ld", &job->ld}, {"m", &job->m}, {"k", &job->k},
    };
    if (!READ(0, fields)) return 0;
    Py_ssize_t ndim = PyTuple_Size(args[6]);
    if (ndim < 0) return 0;
    if (ndim < 1 || ndim > ZS_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "a tensor must have 1 to %d dimensions, got %zd", ZS_MAX_DIMS, ndim);
        return 0;
    }
    job->ndim = (int32_t)ndim;
    for (Py_ssize_t i = 0; i < ndim; i++) {
        PyObject *dim = PyTuple_GetItem(args[6], i);
        if (!zs_py_u64(&dim, 0, "a dimension of shape", &job->shape[i])) return 0;
    }
    return zs_py_u64(args, 7, "scratch", &job->scratch);
}

static PyObject *py_compress_plan(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_compress_plan", 8);
    zs_cuda_compress_t job = {0};
    uint64_t device;
    if (!compress_job(args, &device, &job)) return NULL;
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_compress_plan(device_number(device), &job));
    if (code != ZS_OK) return zs_py_fail(code);
    return PyLong_FromUnsignedLongLong(job.nbytes);
}

static PyObject *py_compress_write(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_compress_write", 10);
    zs_cuda_compress_t job = {0};
    uint64_t device;
    if (!compress_job(args, &device, &job)) return NULL;
    ARG(8, blob);
    ARG(9, room);
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_compress_write(device_number(device), &job, blob, room));
    if (code != ZS_OK) return zs_py_fail(code);
    return Py_BuildValue("iKI", (int)job.mode, (unsigned long long)job.nbytes, (unsigned int)job.checksum);
}

static PyObject *py_compress_raw(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_compress_raw", 10);
    zs_cuda_compress_t job = {0};
    uint64_t device;
    if (!compress_job(args, &device, &job)) return NULL;
    ARG(8, checksum);
    ARG(9, blob);
    job.checksum = (uint32_t)checksum;
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_compress_raw(device_number(device), &job, blob));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_warm(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_warm", 5);
    ARG(0, device);
    ARG(1, m);
    ARG(2, k);
    ARG(3, tokens);
    ARG(4, gated);
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_warm(device_number(device), m, k, tokens, gated != 0));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_side_stream(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_side_stream", 2);
    ARG(0, device);
    ARG(1, i);
    uint64_t stream = 0;
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_side_stream(device_number(device), (int32_t)(i & 0xFF), &stream));
    if (code != ZS_OK) return zs_py_fail(code);
    return PyLong_FromUnsignedLongLong(stream);
}

static PyObject *py_follow(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_follow", 3);
    ARG(0, device);
    ARG(1, after);
    ARG(2, before);
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_follow(device_number(device), after, before));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_load_start(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_load_start", 5);
    ARG(0, device);
    ARG(1, after);
    ARG(2, parts);
    ARG(3, count);
    ARG(4, lanes);
    uint64_t load = 0;
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_load_start(device_number(device), after, (const zs_cuda_load_part_t *)(uintptr_t)parts, count, (int32_t)(lanes & 0xFFFF), &load));
    if (code != ZS_OK) return zs_py_fail(code);
    return PyLong_FromUnsignedLongLong(load);
}

static PyObject *py_load_wait(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_load_wait", 3);
    ARG(0, load);
    ARG(1, part);
    ARG(2, after);
    int64_t failed = -1;
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_load_wait(load, part, after, &failed));
    if (code != ZS_OK) return zs_py_fail(code);
    return PyLong_FromLongLong(failed);
}

static PyObject *py_load_finish(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("cuda_load_finish", 2);
    ARG(0, load);
    ARG(1, stop);
    int32_t code;
    WITHOUT_GIL(code = zs_cuda_load_finish(load, stop != 0));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_check_lists(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("check_lists", 2);
    ARG(0, ptr);
    ARG(1, length);
    int32_t code;
    ZS_PY_LONG(code = zs_check_lists((const void *)(uintptr_t)ptr, length));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

#define FUNCTION(name, doc) {"cuda_" #name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, doc}
PyMethodDef zs_cuda_methods[] = {
    FUNCTION(set_dirs, "cuda_set_dirs(dirs) -> None: directories, separated by ':', in which NVRTC may lie"),
    {"cuda_describe", py_describe, METH_NOARGS, "cuda_describe() -> str: JSON about driver, devices, compiler, cache"},
    FUNCTION(control, "cuda_control(device, request) -> str: a request about plans and tuning and its reply, both JSON"),
    {"cuda_clear_cache", py_clear_cache, METH_NOARGS, "cuda_clear_cache() -> None: removes the compiled kernels on disk"},
    FUNCTION(set_batch_invariant, "cuda_set_batch_invariant(on) -> None"),
    FUNCTION(linear, "cuda_linear(device, stream, blob, m, k, x, n, ldx, bias, y, ldy, scratch, scratch_bytes[, row0, rows, part_rows[, gated]]) -> int: 0 queued; 1 decompress and multiply instead; else bytes of scratch that it needs"),
    FUNCTION(changed, "cuda_changed(device, blob) -> None: the blob has new content, written by work in a stream"),
    FUNCTION(decompress, "cuda_decompress(device, stream, blob, m, k, row0, rows, out, ld) -> None"),
    FUNCTION(gather, "cuda_gather(device, stream, blob, dtype, m, k, ids, id_bytes, n, out) -> None"),
    FUNCTION(route, "cuda_route(device, stream, ids, id_bytes, pairs, top, experts, tile, routing) -> None"),
    FUNCTION(grouped, "cuda_grouped(device, stream, blobs, step, m, k, x, by_pair, y, routing, pairs, tile, gated) -> None"),
    FUNCTION(combine, "cuda_combine(device, stream, y, ids, id_bytes, weights, tokens, top, experts, m, out) -> None"),
    FUNCTION(warm_grouped, "cuda_warm_grouped(device, m, k, gated) -> None"),
    FUNCTION(compress_scratch, "cuda_compress_scratch(device, m, k) -> bytes"),
    FUNCTION(compress_plan, "cuda_compress_plan(device, stream, src, ld, m, k, shape, scratch) -> nbytes, or 0"),
    FUNCTION(compress_write, "cuda_compress_write(device, stream, src, ld, m, k, shape, scratch, blob, room) -> (mode, nbytes, checksum)"),
    FUNCTION(compress_raw, "cuda_compress_raw(device, stream, src, ld, m, k, shape, scratch, checksum, blob) -> None"),
    FUNCTION(warm, "cuda_warm(device, m, k, tokens, gated) -> None"),
    FUNCTION(load_start, "cuda_load_start(device, after, parts_ptr, count, lanes) -> load; a part: file, offset, bytes, address as uint64"),
    FUNCTION(load_wait, "cuda_load_wait(load, part, after) -> -1 when its copies are queued, before later work of that stream, or the part that failed"),
    FUNCTION(load_finish, "cuda_load_finish(load, stop) -> None: waits; raises what went wrong"),
    {"check_lists", (PyCFunction)(void (*)(void))py_check_lists, METH_FASTCALL, "check_lists(ptr, length) -> None: what decoding on a GPU relies on"},
    FUNCTION(side_stream, "cuda_side_stream(device, i) -> stream"),
    FUNCTION(follow, "cuda_follow(device, after, before) -> None"),
    {NULL, NULL, 0, NULL},
};
