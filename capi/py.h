// SPDX-License-Identifier: Apache-2.0
// Python's C API for the py_*.c files. Include this, never Python.h: every name of Python's that the library uses must be weak, because a
// C program that loads the library has none of them. (tests/python/test_packaging.py fails when one is missing here.)
#ifndef ZS_PY_H
#define ZS_PY_H

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#pragma weak PyDict_New
#pragma weak PyDict_SetItemString
#pragma weak PyErr_CheckSignals
#pragma weak PyErr_Clear
#pragma weak PyErr_ExceptionMatches
#pragma weak PyErr_Format
#pragma weak PyErr_NewExceptionWithDoc
#pragma weak PyErr_NoMemory
#pragma weak PyErr_Occurred
#pragma weak PyErr_SetString
#pragma weak PyEval_RestoreThread
#pragma weak PyEval_SaveThread
#pragma weak PyExc_MemoryError
#pragma weak PyExc_OverflowError
#pragma weak PyExc_RuntimeError
#pragma weak PyExc_TypeError
#pragma weak PyExc_ValueError
#pragma weak PyList_Append
#pragma weak PyList_New
#pragma weak PyList_SetItem
#pragma weak PyLong_AsLong
#pragma weak PyLong_AsUnsignedLongLong
#pragma weak PyLong_FromLong
#pragma weak PyLong_FromLongLong
#pragma weak PyLong_FromUnsignedLongLong
#pragma weak PyFloat_AsDouble
#pragma weak PyFloat_FromDouble
#pragma weak PyModule_AddFunctions
#pragma weak PyModule_AddObjectRef
#pragma weak PyModule_Create2
#pragma weak PyObject_IsTrue
#pragma weak PyTuple_GetItem
#pragma weak PyTuple_New
#pragma weak PyTuple_SetItem
#pragma weak PyTuple_Size
#pragma weak PyType_GetFlags
#pragma weak PyUnicode_AsUTF8AndSize
#pragma weak PyUnicode_FromString
#pragma weak PyUnicode_FromStringAndSize
#pragma weak PyBytes_AsStringAndSize
#pragma weak Py_BuildValue
#pragma weak _Py_BuildValue_SizeT
#pragma weak Py_DecRef
#pragma weak Py_IncRef
#pragma weak _Py_Dealloc
#pragma weak _Py_NoneStruct
#pragma weak _Py_TrueStruct
#pragma weak _Py_FalseStruct

#include "internal.h"

// The exception zipserv.Error; set when the module is initialised.
extern PyObject *zs_py_error;

// Raises the Python exception for a code of the C functions, with their message; keeps one that a signal handler raised. Returns NULL.
PyObject *zs_py_fail(int32_t code);

// -1 with zipserv.Error raised in a forked child, else 0. For functions that enter Go other than by the C functions of zipserv.h.
int zs_py_check_fork(void);

// Reads argument i of a METH_FASTCALL function as an unsigned number. False with a Python exception set if it is none.
int zs_py_u64(PyObject *const *args, Py_ssize_t i, const char *name, uint64_t *value);

// Raises TypeError unless nargs is what the function takes.
int zs_py_count(const char *function, Py_ssize_t nargs, Py_ssize_t want);

// A long call: ZS_PY_LONG(code = zs_check(...)) runs its argument without the GIL and lets Ctrl-C stop it.
typedef struct {
    PyThreadState *thread;
    zs_poll_t before;
} zs_py_long_t;
void zs_py_begin_long(zs_py_long_t *state);
void zs_py_end_long(zs_py_long_t *state);
#define ZS_PY_LONG(statement)       \
    do {                            \
        zs_py_long_t long_call;     \
        zs_py_begin_long(&long_call); \
        statement;                  \
        zs_py_end_long(&long_call);   \
    } while (0)

// The functions of the CUDA side, ended by an empty entry; absent (NULL) in a build without it.
extern PyMethodDef zs_cuda_methods[] __attribute__((weak));

#endif
