// SPDX-License-Identifier: Apache-2.0

package main

// #include "internal.h"
import "C"

import "runtime/cgo"

// team runs member on so many threads of the program's OpenMP library at once and returns when all are done; false: there is none. Call it on the
// thread that the caller entered by, whose team it is.
func team(threads int, member func()) bool {
	work := cgo.NewHandle(member)
	defer work.Delete()
	return C.zs_team_run(C.uint32_t(threads), C.uint64_t(work)) != 0
}

//export zsgo_team_member
func zsgo_team_member(work C.uint64_t) {
	cgo.Handle(work).Value().(func())()
}
