// SPDX-License-Identifier: Apache-2.0

//go:build !amd64

package codec

func productSets() []products { return []products{portableProducts} }
