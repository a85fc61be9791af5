// SPDX-License-Identifier: Apache-2.0

//go:build !amd64

package codec

func bestProducts() products { return portableProducts }
