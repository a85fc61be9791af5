// SPDX-License-Identifier: Apache-2.0

// Package kernels carries the CUDA C++ sources. They are compiled by NVRTC for the GPU that is there at first use, and as
// host C++ by kernels/emu for the tests.
package kernels

import "embed"

// Sources holds every .cu file (one kernel, or the passes of one job, each) and the .cuh files they include.
//
//go:embed *.cu *.cuh
var Sources embed.FS
