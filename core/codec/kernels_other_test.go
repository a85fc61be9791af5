// SPDX-License-Identifier: Apache-2.0

//go:build !amd64

package codec

func kernelSets() []kernels { return []kernels{portable} }
