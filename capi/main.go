// SPDX-License-Identifier: Apache-2.0

// Package main is the native library of ZipServ: built with -buildmode=c-shared it is one file that is both the C library
// of zipserv.h and the Python extension module zipserv._zipserv.
//
// A call passes through three layers. The C functions (zipserv.c) refuse to run in a forked child and check for NULL. The exported Go
// functions (zsgo_*, codec.go) turn addresses into slices and call core/codec. The Python functions (py_*.c) stand on the C functions alone.
package main

/*
#cgo CFLAGS: -std=gnu11 -O2 -Wall -Wextra -fvisibility=hidden
#include "internal.h"
*/
import "C"

func main() {} // -buildmode=c-shared requires it; nothing calls it
