// SPDX-License-Identifier: Apache-2.0

package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// dotAVX2 adds the products of 64 rows of 64 weights with 64 values of x, which stay in registers as FP32: eight sums a row.
func dotAVX2() {
	TEXT("dotAVX2", NOSPLIT, "func(acc *float32, tile, x *byte)")
	acc := Load(Param("acc"), GP64())
	tile := Load(Param("tile"), GP64())
	x := Load(Param("x"), GP64())
	high, rows := YMM(), GP64()
	VPCMPEQD(high, high, high)
	VPSLLD(U8(16), high, high)
	var even, odd [4]reg.VecVirtual
	for i := range even {
		even[i], odd[i] = YMM(), YMM()
		VMOVDQU(ptr(x, 32*i), odd[i])
		VPSLLD(U8(16), odd[i], even[i])
		VPAND(high, odd[i], odd[i])
	}
	MOVQ(U32(64), rows)
	Label("row")
	sum := YMM()
	VMOVUPS(ptr(acc, 0), sum)
	for i := range even {
		w, v := YMM(), YMM()
		VMOVDQU(ptr(tile, 32*i), w)
		VPSLLD(U8(16), w, v)
		VPAND(high, w, w)
		VFMADD231PS(v, even[i], sum)
		VFMADD231PS(w, odd[i], sum)
	}
	VMOVUPS(sum, ptr(acc, 0))
	ADDQ(U32(rowBytes), tile)
	ADDQ(U8(32), acc)
	DECQ(rows)
	JNZ(LabelRef("row"))
	VZEROUPPER()
	RET()
}
