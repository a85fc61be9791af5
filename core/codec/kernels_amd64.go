// SPDX-License-Identifier: Apache-2.0

package codec

func best() kernels { return portable }
