// SPDX-License-Identifier: Apache-2.0

package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// These need AVX-512 F, BW, VBMI and VBMI2. A register holds a row of 64 exponents, or half a row of weights: four chunks of 8 columns.

// codeOrder is the column whose code bit stands at bit i of a row's 64: for each column group 0..3 the even columns of chunk `group`, those of chunk
// group+4, then the odd columns of both. So two bytes of it are the row's share in the word of one lane.
func codeOrder(i int) int {
	group, odd, upper, pair := i/16, i/8%2, i/4%2, i%4
	return 8*(group+4*upper) + 2*pair + odd
}

func data64(name string, n int, f func(i int) int) Mem {
	b := make([]uint8, n)
	for i := range b {
		b[i] = uint8(f(i))
	}
	return bytes8(name, n, b...)
}

func constant64(name string, f func(i int) int) reg.VecVirtual {
	z := ZMM()
	VMOVDQU8(data64(name, 64, f), z)
	return z
}

func constantWords(name string, w uint16) reg.VecVirtual {
	z := ZMM()
	VMOVDQU16(words16(name, 64, w), z)
	return z
}

func swapWords(name string) reg.VecVirtual {
	return constant64(name, func(i int) int { return i%16 ^ 1 })
}

// transpose4 turns four rows of four 16-byte chunks into four chunks of four rows, or back.
func transpose4(a [4]reg.VecVirtual) (out [4]reg.VecVirtual) {
	var t [4]reg.VecVirtual
	for i := range 4 {
		t[i], out[i] = ZMM(), ZMM()
	}
	VSHUFI64X2(U8(0x44), a[1], a[0], t[0])
	VSHUFI64X2(U8(0x44), a[3], a[2], t[1])
	VSHUFI64X2(U8(0xEE), a[1], a[0], t[2])
	VSHUFI64X2(U8(0xEE), a[3], a[2], t[3])
	VSHUFI64X2(U8(0x88), t[1], t[0], out[0])
	VSHUFI64X2(U8(0xDD), t[1], t[0], out[1])
	VSHUFI64X2(U8(0x88), t[3], t[2], out[2])
	VSHUFI64X2(U8(0xDD), t[3], t[2], out[3])
	return out
}

func scanAVX512() {
	TEXT("scanAVX512", NOSPLIT, "func(src *byte, stride, rows int, rowA *uint32, colB *uint16, exps *byte) (sum, lowest, highest uint32)")
	src := Load(Param("src"), GP64())
	stride := Load(Param("stride"), GP64())
	rows := Load(Param("rows"), GP64())
	rowA := Load(Param("rowA"), GP64())
	colB := Load(Param("colB"), GP64())
	exps := Load(Param("exps"), GP64())
	factor := [2]reg.VecVirtual{ZMM(), ZMM()}
	for i, f := range factor {
		VMOVDQU16(ptr(colB, 64*i), f)
	}
	highBytes := constant64("highBytes", func(i int) int { return 2*i + 1 })
	sum, low, high := ZMM(), ZMM(), ZMM()
	VPXORQ(sum, sum, sum)
	VPXORQ(high, high, high)
	VPTERNLOGQ(U8(0xFF), low, low, low)

	Label("row")
	w := [2]reg.VecVirtual{ZMM(), ZMM()}
	t := [2]reg.VecVirtual{ZMM(), ZMM()}
	for i := range w {
		VMOVDQU16(ptr(src, 64*i), w[i])
		PREFETCHT1(ptr(src, prefetchForward+64*i))
		VPMADDWD(factor[i], w[i], t[i])
		VPSLLW(U8(1), w[i], w[i])
	}
	VPADDD(t[1], t[0], t[0])
	VPMULLD_BCST(ptr(rowA, 0), t[0], t[0])
	VPADDD(t[0], sum, sum)
	VPERMT2B(w[1], highBytes, w[0])
	VMOVDQU8(w[0], ptr(exps, 0))
	VPMAXUB(w[0], high, high)
	VPMINUB(w[0], low, low)
	ADDQ(stride, src)
	ADDQ(U8(4), rowA)
	ADDQ(U8(64), exps)
	DECQ(rows)
	JNZ(LabelRef("row"))

	for i, z := range []reg.VecVirtual{sum, low, high} {
		half := YMM()
		VEXTRACTI64X4(U8(1), z, half)
		op := []func(a, b, c Op){
			func(a, b, c Op) { VPADDD(a, b, c) }, func(a, b, c Op) { VPMINUB(a, b, c) }, func(a, b, c Op) { VPMAXUB(a, b, c) },
		}[i]
		op(z.AsY(), half, half)
		Store(reduce(half, op, []int{4, 1, 1}[i]), ReturnIndex(i))
	}
	VZEROUPPER()
	RET()
}

func encodeAVX512() {
	TEXT("encodeAVX512", NOSPLIT, "func(dst, src *byte, stride int, base uint32, masks *uint64, planes *uint64)")
	dst := Load(Param("dst"), GP64())
	upper := Load(Param("src"), GP64())
	stride := Load(Param("stride"), GP64())
	b := Load(Param("base"), GP32())
	masks := Load(Param("masks"), GP64())
	planes := Load(Param("planes"), GP64())
	base, baseWords := ZMM(), ZMM()
	VPBROADCASTB(b, base)
	SHLL(U8(7), b)
	VPBROADCASTW(b, baseWords)
	mA := constantWords("signMantissaZ", maskA)
	exponentBits := constantWords("exponentZ", 0x7F80)
	windowEnd := constantWords("windowEndZ", 8<<7)
	seven := constant64("sevensZ", func(int) int { return 7 })
	var bit [3]reg.VecVirtual
	for k := range bit {
		bit[k] = constant64("codeBitZ"+string('A'+rune(k)), func(int) int { return 1 << k })
	}
	swap := swapWords("swapZ")
	order := constant64("codeOrderZ", func(i int) int { return 2*codeOrder(i) + 1 })
	// Byte j of lane l's word, l = 8 group + r: even columns of rows r and r+8, odd columns of rows r and r+8.
	laneByte := func(i int) int { l, j := i/4, i%4; return l%8*8 + 2*(l/8) + j/2 + j%2*64 }
	lanes := data64("lanes", 128, laneByte)
	bitmaps, lower, warp, stride3 := GP64(), GP64(), GP64(), GP64()
	LEAQ(ptr(dst, bitmapOffset), bitmaps)
	LEAQ(Mem{Base: stride, Index: stride, Scale: 2}, stride3)
	MOVQ(U32(warpTiles), warp)

	codes := func(w [2]reg.VecVirtual, row int) {
		var e [2]reg.VecVirtual
		for g := range 2 {
			d, outside := ZMM(), K()
			VPANDQ(exponentBits, w[g], d)
			VPSUBW(baseWords, d, d)
			VPCMPUW(U8(5), windowEnd, d, outside) // d >= 8 << 7, below the window by wrapping
			KMOVD(outside, ptr(masks, 8*row+4*g))
			e[g] = ZMM()
			VPSLLW(U8(1), w[g], e[g])
		}
		VPERMT2B(e[1], order, e[0])
		VPSUBB(base, e[0], e[0])
		inside := K()
		VPCMPUB(U8(2), seven, e[0], inside) // <= 7
		for k := range bit {
			set := K()
			VPTESTMB(bit[k], e[0], inside, set)
			KMOVQ(set, ptr(planes, k*planeWork+8*row))
		}
	}

	Label("warp")
	LEAQ(Mem{Base: upper, Index: stride, Scale: 8}, lower)
	for r := 0; r < 8; r += 4 {
		// Four rows of a half warp tile, and the same of the other half.
		row := func(base reg.Register, i, g int) Mem {
			m := Mem{Base: base, Disp: 64 * g}
			switch i {
			case 1, 2:
				m.Index, m.Scale = stride, uint8(i)
			case 3:
				m.Index, m.Scale = stride3, 1
			}
			return m
		}
		for i := range 4 {
			for half, from := range []reg.Register{upper, lower} {
				w := [2]reg.VecVirtual{ZMM(), ZMM()}
				for g := range 2 {
					VMOVDQU16(row(from, i, g), w[g])
					next := row(from, i, g)
					next.Disp += prefetchForward
					PREFETCHT1(next)
				}
				codes(w, r+i+8*half)
			}
		}
		for g := range 2 {
			var sm [4]reg.VecVirtual
			for i := range sm {
				sm[i] = ZMM()
				VMOVDQU16(row(lower, i, g), sm[i])
				VPSHUFB(swap, sm[i], sm[i])
				VPTERNLOGQ(U8(0xB8), row(upper, i, g), mA, sm[i]) // mask ? upper : swapped
			}
			for c, z := range transpose4(sm) {
				VMOVDQU8(z, ptr(dst, (4*g+c)*chunkSM+16*r))
			}
		}
		LEAQ(Mem{Base: upper, Index: stride, Scale: 4}, upper)
		LEAQ(Mem{Base: lower, Index: stride, Scale: 4}, lower)
	}
	for k := range bit {
		up, low := ZMM(), ZMM()
		VMOVDQU8(ptr(planes, k*planeWork), up)
		VMOVDQU8(ptr(planes, k*planeWork+64), low)
		for i := range 2 {
			z := ZMM()
			VMOVDQU8(lanes.Offset(64*i), z)
			VPERMI2B(low, up, z)
			if k > 0 {
				VPSHLDW(U8(k), z, z, z)
			}
			VMOVDQU8(z, ptr(bitmaps, k*planeBytes+64*i))
		}
	}
	MOVQ(lower, upper)
	ADDQ(U32(warpSM), dst)
	ADDQ(U32(warpBitmap), bitmaps)
	ADDQ(U32(8*16), masks)
	DECQ(warp)
	JNZ(LabelRef("warp"))
	VZEROUPPER()
	RET()
}

func decodeAVX512() {
	TEXT("decodeAVX512", NOSPLIT, "func(dst *byte, stride int, signMantissa, bitmaps *byte, warps int, base uint32, planes *uint64)")
	dst := Load(Param("dst"), GP64())
	stride := Load(Param("stride"), GP64())
	sm := Load(Param("signMantissa"), GP64())
	bitmaps := Load(Param("bitmaps"), GP64())
	warps := Load(Param("warps"), GP64())
	b := Load(Param("base"), GP32())
	planes := Load(Param("planes"), GP64())
	base := ZMM()
	VPBROADCASTB(b, base)
	one := constant64("ones", func(int) int { return 1 })
	mA := constantWords("signMantissaY", maskA)
	two := constant64("twos", func(int) int { return 2 })
	four := constant64("fours", func(int) int { return 4 })
	swap := swapWords("swapY")
	// Byte i of the row masks: lane 8 group + r, bytes 0 and 2 (rows 0..7) or 1 and 3 (rows 8..15) of its word.
	rowByte := func(i int) int { r, group, odd := i/8, i%8/2, i%2; return 4*(8*group+r) + 2*odd }
	rowMasks := [2]reg.VecVirtual{
		constant64("rowsUpper", rowByte),
		constant64("rowsLower", func(i int) int { return rowByte(i) + 1 }),
	}
	// The place of each column's code, twice: a word then has the exponent in both bytes, and shifted right by one, where it belongs.
	var place [64]int
	for i := range place {
		place[codeOrder(i)] = i
	}
	columns := [2]reg.VecVirtual{
		constant64("columnsLow", func(i int) int { return place[i/2] }),
		constant64("columnsHigh", func(i int) int { return place[32+i/2] }),
	}
	lower := GP64()

	Label("warp")
	for k := range 3 {
		words := [2]reg.VecVirtual{ZMM(), ZMM()}
		for i, w := range words {
			VMOVDQU8(ptr(bitmaps, k*planeBytes+64*i), w)
			PREFETCHT1(ptr(bitmaps, fixedAhead+k*planeBytes+64*i))
			if k > 0 {
				VPSHRDW(U8(k), w, w, w)
			}
		}
		for half, rows := range rowMasks {
			z := ZMM()
			VMOVDQA64(rows, z)
			VPERMI2B(words[1], words[0], z)
			VMOVDQU8(z, ptr(planes, k*planeWork+64*half))
		}
	}
	LEAQ(Mem{Base: dst, Index: stride, Scale: 8}, lower)
	for r := 0; r < 8; r += 4 {
		var rows [2][4]reg.VecVirtual
		for g := range rows {
			for c := range 4 {
				rows[g][c] = ZMM()
				VMOVDQU8(ptr(sm, (4*g+c)*chunkSM+16*r), rows[g][c])
				PREFETCHT1(ptr(sm, fixedAhead+(4*g+c)*chunkSM+16*r))
			}
			rows[g] = transpose4(rows[g])
		}
		for i := range 4 {
			for half, to := range []reg.Register{dst, lower} {
				var set [3]reg.OpmaskVirtual
				for k := range set {
					set[k] = K()
					KMOVQ(ptr(planes, k*planeWork+64*half+8*(r+i)), set[k])
				}
				e := ZMM()
				VMOVDQA64(base, e)
				VPADDB(one, e, set[0], e)
				VPADDB(two, e, set[1], e)
				VPADDB(four, e, set[2], e)
				for g := range 2 {
					x := ZMM()
					VPERMB(e, columns[g], x)
					VPSRLW(U8(1), x, x)
					s := rows[g][i]
					if half == 1 {
						s = ZMM()
						VPSHUFB(swap, rows[g][i], s)
					}
					VPTERNLOGQ(U8(0xD8), mA, s, x) // mask ? s : x
					VMOVDQU16(x, ptr(to, 64*g))
				}
			}
			ADDQ(stride, dst)
			ADDQ(stride, lower)
		}
	}
	MOVQ(lower, dst)
	ADDQ(U32(warpSM), sm)
	ADDQ(U32(warpBitmap), bitmaps)
	DECQ(warps)
	JNZ(LabelRef("warp"))
	VZEROUPPER()
	RET()
}
