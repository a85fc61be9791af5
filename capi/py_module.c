// SPDX-License-Identifier: Apache-2.0
// The Python extension module zipserv._zipserv: thin functions over zipserv.h that take addresses as ints. The package in
// python/zipserv keeps the tensors alive that they point into; nothing else should call them.
#include "py.h"

PyObject *zs_py_error;

#define ARG(i, name) \
    uint64_t name;   \
    if (!zs_py_u64(args, i, #name, &name)) return NULL
#define ARGS(function, count) \
    if (!zs_py_count(function, nargs, count)) return NULL
#define POINTER(x) ((void *)(uintptr_t)(x))

static PyObject *py_version(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    return PyUnicode_FromString(zs_version());
}

static PyObject *py_plan(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("plan", 5);
    ARG(0, ptr);
    ARG(1, dtype_code);
    ARG(2, m);
    ARG(3, k);
    uint64_t shape[ZS_MAX_DIMS], size = 0, handle = 0;
    Py_ssize_t ndim = PyTuple_Size(args[4]);
    if (ndim < 0) {
        PyErr_Format(PyExc_TypeError, "shape must be a tuple of ints, got %R", args[4]);
        return NULL;
    }
    if (ndim < 1 || ndim > ZS_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "a tensor must have 1 to %d dimensions, got %zd", ZS_MAX_DIMS, ndim);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < ndim; i++) {
        PyObject *dim = PyTuple_GetItem(args[4], i);
        if (!zs_py_u64(&dim, 0, "a dimension of shape", &shape[i])) return NULL;
    }
    int32_t dtype = dtype_code > INT32_MAX ? -1 : (int32_t)dtype_code, code;
    ZS_PY_LONG(code = zs_plan_new(POINTER(ptr), dtype, m, k, shape, (int32_t)ndim, &size, &handle));
    if (code != ZS_OK) return zs_py_fail(code);
    return Py_BuildValue("KK", (unsigned long long)handle, (unsigned long long)size);
}

static PyObject *py_encode(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("encode", 3);
    ARG(0, handle);
    ARG(1, dst_ptr);
    ARG(2, dst_len);
    int32_t code;
    ZS_PY_LONG(code = zs_plan_encode(handle, POINTER(dst_ptr), dst_len));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_free_plan(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("free_plan", 1);
    ARG(0, handle);
    int32_t code = zs_plan_free(handle);
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *info_dict(const zs_info_t *info) {
    PyObject *shape = PyTuple_New(info->ndim);
    if (shape == NULL) return NULL;
    for (int32_t i = 0; i < info->ndim; i++) {
        PyObject *dim = PyLong_FromUnsignedLongLong(info->shape[i]);
        if (dim == NULL || PyTuple_SetItem(shape, i, dim) != 0) {
            Py_DecRef(shape);
            return NULL;
        }
    }
    return Py_BuildValue("{s:i,s:i,s:N,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:I}", "dtype", (int)info->dtype, "mode", (int)info->mode, "shape", shape,
                         "m", (unsigned long long)info->m, "k", (unsigned long long)info->k, "nbytes", (unsigned long long)info->nbytes,
                         "escapes", (unsigned long long)info->escapes, "literals", (unsigned long long)info->literals, "dense_tiles",
                         (unsigned long long)info->dense_tiles, "tiles", (unsigned long long)info->tiles, "checksum",
                         (unsigned int)info->checksum);
}

static PyObject *py_info(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("info", 2);
    ARG(0, ptr);
    ARG(1, length);
    zs_info_t info;
    int32_t code;
    ZS_PY_LONG(code = zs_info(POINTER(ptr), length, &info));
    return code != ZS_OK ? zs_py_fail(code) : info_dict(&info);
}

static PyObject *py_header(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("header", 2);
    ARG(0, ptr);
    ARG(1, length);
    zs_info_t info;
    int32_t code = zs_header(POINTER(ptr), length, &info);
    return code != ZS_OK ? zs_py_fail(code) : info_dict(&info);
}

static PyObject *py_check(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("check", 3);
    ARG(0, ptr);
    ARG(1, length);
    int full = PyObject_IsTrue(args[2]);
    if (full < 0) return NULL;
    int32_t code;
    ZS_PY_LONG(code = zs_check(POINTER(ptr), length, full));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_decode_rows(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("decode_rows", 7);
    ARG(0, ptr);
    ARG(1, length);
    ARG(2, row0);
    ARG(3, row1);
    ARG(4, dst_ptr);
    ARG(5, dst_len);
    ARG(6, stride);
    int32_t code;
    ZS_PY_LONG(code = zs_decode_rows(POINTER(ptr), length, row0, row1, POINTER(dst_ptr), dst_len, stride));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_linear(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("linear", 13);
    ARG(0, ptr);
    ARG(1, length);
    ARG(2, m);
    ARG(3, k);
    ARG(4, row0);
    ARG(5, row1);
    ARG(6, x_ptr);
    ARG(7, x_stride);
    ARG(8, rows);
    ARG(9, bias_ptr);
    ARG(10, y_ptr);
    ARG(11, y_stride);
    ARG(12, threads);
    int32_t code, most = threads > INT32_MAX ? INT32_MAX : (int32_t)threads;
    ZS_PY_LONG(code = zs_linear(POINTER(ptr), length, m, k, row0, row1, POINTER(x_ptr), x_stride, rows, POINTER(bias_ptr), POINTER(y_ptr), y_stride, most));
    if (code != ZS_OK) return zs_py_fail(code);
    Py_RETURN_NONE;
}

static PyObject *py_linear_few(PyObject *self, PyObject *args) {
    (void)self, (void)args;
    return PyLong_FromUnsignedLongLong(zs_linear_few());
}

static PyObject *py_histogram(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("histogram", 3);
    ARG(0, ptr);
    ARG(1, n_elements);
    ARG(2, dtype_code);
    uint64_t counts[256];
    int32_t dtype = dtype_code > INT32_MAX ? -1 : (int32_t)dtype_code, code;
    ZS_PY_LONG(code = zs_histogram(POINTER(ptr), n_elements, dtype, counts));
    if (code != ZS_OK) return zs_py_fail(code);
    PyObject *list = PyList_New(256);
    for (Py_ssize_t i = 0; list != NULL && i < 256; i++) {
        PyObject *count = PyLong_FromUnsignedLongLong(counts[i]);
        if (count == NULL || PyList_SetItem(list, i, count) != 0) {
            Py_DecRef(list);
            return NULL;
        }
    }
    return list;
}

static PyObject *py_checksum(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    ARGS("checksum", 3);
    ARG(0, ptr);
    ARG(1, m);
    ARG(2, k);
    uint32_t sum = 0;
    int32_t code;
    ZS_PY_LONG(code = zs_checksum(POINTER(ptr), m, k, &sum));
    if (code != ZS_OK) return zs_py_fail(code);
    return PyLong_FromUnsignedLongLong(sum);
}

#define FUNCTION(name, doc) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, doc}
static PyMethodDef methods[] = {
    {"version", py_version, METH_NOARGS, "version() -> str"},
    FUNCTION(plan, "plan(ptr, dtype_code, m, k, shape) -> (handle, nbytes): first pass of a compression"),
    FUNCTION(encode, "encode(handle, dst_ptr, dst_len) -> None: second pass, writes the blob"),
    FUNCTION(free_plan, "free_plan(handle) -> None"),
    FUNCTION(info, "info(ptr, length) -> dict: what a blob says of itself"),
    FUNCTION(header, "header(ptr, length) -> dict: the same from the first 128 bytes; tiles' counters are 0"),
    FUNCTION(check, "check(ptr, length, full) -> None: raises Error for a blob that is not valid"),
    FUNCTION(decode_rows, "decode_rows(ptr, length, row0, row1, dst_ptr, dst_len, stride) -> None"),
    FUNCTION(linear, "linear(ptr, length, m, k, row0, row1, x_ptr, x_stride, rows, bias_ptr, y_ptr, y_stride, threads) -> None"),
    {"linear_few", py_linear_few, METH_NOARGS, "linear_few() -> int: rows up to which linear is faster than decoding and a product"},
    FUNCTION(histogram, "histogram(ptr, n_elements, dtype_code) -> list of 256 counts of exponents"),
    FUNCTION(checksum, "checksum(ptr, m, k) -> int"),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "zipserv._zipserv", "The native library of ZipServ; use the package zipserv instead.", -1, methods,
    NULL, NULL, NULL, NULL,
};

__attribute__((visibility("default"))) PyMODINIT_FUNC PyInit__zipserv(void) {
    PyObject *m = PyModule_Create(&module);
    if (m == NULL) return NULL;
    if (zs_py_error == NULL) {
        zs_py_error = PyErr_NewExceptionWithDoc("zipserv.Error", "Raised when ZipServ cannot do what was asked, other than for a wrong argument.",
                                                PyExc_RuntimeError, NULL);
    }
    if (zs_py_error == NULL || PyModule_AddObjectRef(m, "Error", zs_py_error) != 0 ||
        (zs_cuda_methods != NULL && PyModule_AddFunctions(m, zs_cuda_methods) != 0)) {
        Py_DecRef(m);
        return NULL;
    }
    return m;
}
