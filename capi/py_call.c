// SPDX-License-Identifier: Apache-2.0
// What every Python function of the module needs: arguments, errors, and long calls without the GIL.
#include "py.h"

#include <sys/syscall.h>
#include <unistd.h>

PyObject *zs_py_fail(int32_t code) {
    if (PyErr_Occurred()) return NULL;
    PyErr_SetString(code == ZS_ERR_ARGUMENT ? PyExc_ValueError : zs_py_error, zs_last_error());
    return NULL;
}

int zs_py_check_fork(void) {
    if (!zs_forked()) return 0;
    zs_py_fail(ZS_ERR_FORKED);
    return -1;
}

int zs_py_u64(PyObject *const *args, Py_ssize_t i, const char *name, uint64_t *value) {
    *value = PyLong_AsUnsignedLongLong(args[i]);
    if (*value != (uint64_t)-1 || !PyErr_Occurred()) return 1;
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Format(PyExc_ValueError, "%s must be 0 to 2**64-1, got %R", name, args[i]);
    } else {
        PyErr_Format(PyExc_TypeError, "%s must be an int, got %R", name, args[i]);
    }
    return 0;
}

int zs_py_count(const char *function, Py_ssize_t nargs, Py_ssize_t want) {
    if (nargs == want) return 1;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, got %zd", function, want, nargs);
    return 0;
}

// Takes the GIL for a moment and runs the Python signal handlers that are due; KeyboardInterrupt comes out of it.
static int32_t poll_signals(void *user) {
    PyThreadState **thread = user;
    PyEval_RestoreThread(*thread);
    int raised = PyErr_CheckSignals() != 0;
    *thread = PyEval_SaveThread();
    return raised;
}

void zs_py_begin_long(zs_py_long_t *state) {
    // Python runs signal handlers on its main thread only. Others get no poll function: they need not wake, and none of them
    // asks for the GIL while the interpreter ends.
    int main_thread = syscall(SYS_gettid) == getpid();
    zs_poll_t poll = {main_thread ? poll_signals : NULL, &state->thread};
    state->before = zs_swap_poll(poll);
    state->thread = PyEval_SaveThread();
}

void zs_py_end_long(zs_py_long_t *state) {
    PyEval_RestoreThread(state->thread);
    zs_swap_poll(state->before);
}
