// SPDX-License-Identifier: Apache-2.0
// What the C and Go halves of the library tell each other. Not installed.
#ifndef ZS_INTERNAL_H
#define ZS_INTERNAL_H

#include "zipserv.h"

// Every exported C function begins with `if (zs_forked()) return ZS_ERR_FORKED;`: no Go code may run in a forked child.
// It sets the thread's message. One load when not forked.
int32_t zs_forked(void);

// Sets the thread's message. Called by Go on the thread that entered it.
void zs_set_error(const char *text, uint64_t len);

// The poll function of this thread: whether there is one, and one call of it.
int32_t zs_has_poll(void);
int32_t zs_call_poll(void);

// Sets the poll function and returns the one before, so that nested calls (a signal handler's) can put it back.
typedef struct { zs_poll_fn fn; void *user; } zs_poll_t;
zs_poll_t zs_swap_poll(zs_poll_t next);

// Runs zsgo_team_member(work) on that many threads of the program's OpenMP library at once; 0 where there is none (team.c).
int32_t zs_team_run(uint32_t threads, uint64_t work);

#endif
