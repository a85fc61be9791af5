// SPDX-License-Identifier: Apache-2.0
// Work on the threads of the program's own OpenMP library, where it has one (PyTorch does). They are there already, and after their own work they wait
// for more in a loop, which takes the processors away from any other threads: those of a Go worker would get half of each at best.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>

#include "internal.h"
#include "_cgo_export.h"

typedef void (*parallel_fn)(void (*member)(void *), void *data, unsigned threads, unsigned flags);
typedef int (*in_parallel_fn)(void);

static _Atomic(parallel_fn) found;

static void member(void *work) { zsgo_team_member((uint64_t)(uintptr_t)work); }

int32_t zs_team_run(uint32_t threads, uint64_t work) {
    parallel_fn parallel = atomic_load_explicit(&found, memory_order_relaxed);
    if (parallel == NULL) {
        // GNU's entry point; the libraries of LLVM and Intel have it too.
        parallel = (parallel_fn)dlsym(RTLD_DEFAULT, "GOMP_parallel");
        if (parallel == NULL) return 0;
        atomic_store_explicit(&found, parallel, memory_order_relaxed);
    }
    in_parallel_fn in_parallel = (in_parallel_fn)dlsym(RTLD_DEFAULT, "omp_in_parallel");
    if (in_parallel == NULL || in_parallel()) return 0; // a team inside a team would be made of new threads each time
    parallel(member, (void *)(uintptr_t)work, threads, 0);
    return 1;
}
