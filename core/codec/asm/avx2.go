// SPDX-License-Identifier: Apache-2.0

package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Operands stand in the order of Go's assembler: sources from last to first, then the destination.

func scanAVX2() {
	TEXT("scanAVX2", NOSPLIT, "func(src *byte, stride, rows int, rowA *uint32, colB *uint16, exps *byte) (sum, lowest, highest uint32)")
	src := Load(Param("src"), GP64())
	stride := Load(Param("stride"), GP64())
	rows := Load(Param("rows"), GP64())
	rowA := Load(Param("rowA"), GP64())
	colB := Load(Param("colB"), GP64())
	exps := Load(Param("exps"), GP64())
	factor := [4]reg.VecVirtual{YMM(), YMM(), YMM(), YMM()}
	for i, f := range factor {
		VMOVDQU(ptr(colB, 32*i), f)
	}
	sum, low, high := YMM(), YMM(), YMM()
	VPXOR(sum, sum, sum)
	VPXOR(high, high, high)
	VPCMPEQB(low, low, low)

	Label("row")
	var w [4]reg.VecVirtual
	part := YMM()
	for i := range w {
		w[i] = YMM()
		VMOVDQU(ptr(src, 32*i), w[i])
		if i == 0 {
			VPMADDWD(factor[0], w[0], part)
		} else {
			t := YMM()
			VPMADDWD(factor[i], w[i], t)
			VPADDD(t, part, part)
		}
	}
	PREFETCHT1(ptr(src, prefetchForward))
	PREFETCHT1(ptr(src, prefetchForward+64))
	a := YMM()
	VPBROADCASTD(ptr(rowA, 0), a)
	VPMULLD(a, part, part)
	VPADDD(part, sum, sum)
	for i := range w {
		VPSLLW(U8(1), w[i], w[i])
		VPSRLW(U8(8), w[i], w[i])
	}
	for i := 0; i < 4; i += 2 {
		VPACKUSWB(w[i+1], w[i], w[i])
		VMOVDQU(w[i], ptr(exps, 16*i))
		VPMAXUB(w[i], high, high)
		VPMINUB(w[i], low, low)
	}
	ADDQ(stride, src)
	ADDQ(U8(4), rowA)
	ADDQ(U8(64), exps)
	DECQ(rows)
	JNZ(LabelRef("row"))

	Store(reduce(sum, func(a, b, c Op) { VPADDD(a, b, c) }, 4), ReturnIndex(0))
	Store(reduce(low, func(a, b, c Op) { VPMINUB(a, b, c) }, 1), ReturnIndex(1))
	Store(reduce(high, func(a, b, c Op) { VPMAXUB(a, b, c) }, 1), ReturnIndex(2))
	VZEROUPPER()
	RET()
}

// reduce folds y with op down to its lowest 4 bytes or lowest byte.
func reduce(y reg.VecVirtual, op func(a, b, c Op), smallest int) reg.GPVirtual {
	x, t, r := XMM(), XMM(), GP32()
	VEXTRACTI128(U8(1), y, x)
	op(y.AsX(), x, x)
	for n := 8; n >= smallest; n /= 2 {
		VPSRLDQ(U8(n), x, t)
		op(t, x, x)
	}
	VMOVD(x, r)
	if smallest == 1 {
		MOVBLZX(r.As8(), r)
	}
	return r
}

// sumBytes adds the 32 byte counters of y into a general register.
func sumBytes(y, zero reg.VecVirtual) reg.GPVirtual {
	x, t, r := XMM(), XMM(), GP32()
	VPSADBW(zero, y, y)
	VEXTRACTI128(U8(1), y, x)
	VPADDQ(y.AsX(), x, x)
	VPSRLDQ(U8(8), x, t)
	VPADDQ(t, x, x)
	VMOVD(x, r)
	return r
}

// countAVX2 counts 0..7 below the highest exponent, then the distances one by one.
func countAVX2(name string, distances ...uint8) {
	TEXT(name, NOSPLIT, "func(exps *byte, highest uint32, counts *uint32)")
	exps := Load(Param("exps"), GP64())
	high := broadcastByte(Load(Param("highest"), GP32()))
	out := Load(Param("counts"), GP64())
	equal := make([]Mem, len(distances))
	for i, d := range distances {
		if d != 0 {
			equal[i] = bytes8(name+"Distance"+string('A'+rune(d)), 32, d)
		}
	}
	seven := bytes8(name+"Sevens", 32, 7)
	zero := YMM()
	VPXOR(zero, zero, zero)
	acc := make([]reg.VecVirtual, 1+len(distances))
	for i := range acc {
		acc[i] = YMM()
		VPXOR(acc[i], acc[i], acc[i])
	}
	n := GP64()
	MOVQ(U32(tileWeights/32), n)
	Label("next")
	d, t := YMM(), YMM()
	VPSUBB(ptr(exps, 0), high, d)
	VPMINUB(seven, d, t)
	VPCMPEQB(t, d, t)
	VPSUBB(t, acc[0], acc[0])
	for i := range distances {
		t := YMM()
		if distances[i] == 0 {
			VPCMPEQB(zero, d, t)
		} else {
			VPCMPEQB(equal[i], d, t)
		}
		VPSUBB(t, acc[1+i], acc[1+i])
	}
	ADDQ(U8(32), exps)
	DECQ(n)
	JNZ(LabelRef("next"))
	for i, a := range acc {
		MOVL(sumBytes(a, zero), ptr(out, 4*i))
	}
	VZEROUPPER()
	RET()
}

func outsideAVX2() {
	TEXT("outsideAVX2", NOSPLIT, "func(exps *byte, lo, span uint32) (inside uint32)")
	exps := Load(Param("exps"), GP64())
	lo := broadcastByte(Load(Param("lo"), GP32()))
	span := broadcastByte(Load(Param("span"), GP32()))
	acc, zero := YMM(), YMM()
	VPXOR(acc, acc, acc)
	VPXOR(zero, zero, zero)
	n := GP64()
	MOVQ(U32(tileWeights/32), n)
	Label("next")
	d, t := YMM(), YMM()
	VMOVDQU(ptr(exps, 0), d)
	VPSUBB(lo, d, d)
	VPMINUB(span, d, t)
	VPCMPEQB(t, d, t)
	VPSUBB(t, acc, acc)
	ADDQ(U8(32), exps)
	DECQ(n)
	JNZ(LabelRef("next"))
	Store(sumBytes(acc, zero), ReturnIndex(0))
	VZEROUPPER()
	RET()
}

// slot is where the code bits of a row wait, so that a load of 32 bytes brings the rows [0 1 | 4 5] or [2 3 | 6 7] of a half warp tile.
func slot(row int) int { return row&^7 + []int{0, 1, 4, 5, 2, 3, 6, 7}[row&7] }

func encodeAVX2() {
	TEXT("encodeAVX2", NOSPLIT, "func(dst, src *byte, stride int, base uint32, masks *uint64, planes *uint64)")
	dst := Load(Param("dst"), GP64())
	upper := Load(Param("src"), GP64())
	stride := Load(Param("stride"), GP64())
	base := broadcastByte(Load(Param("base"), GP32()))
	masks := Load(Param("masks"), GP64())
	planes := Load(Param("planes"), GP64())
	maskWords := words16("signMantissa", 32, maskA)
	seven := bytes8("sevensB", 32, 7)
	swap := bytes8("swapBytes", 32, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
	// Two chunks of 8 columns -> even columns of both, odd columns of both.
	evenOdd := bytes8("evenOdd", 32, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)
	// Chunks come in the order 0 4 1 5 2 6 3 7.
	chunkOrder := bytes8("chunkOrder", 32, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)

	mA, sw, eo := YMM(), YMM(), YMM()
	VMOVDQU(maskWords, mA)
	VMOVDQU(swap, sw)
	VMOVDQU(evenOdd, eo)
	lower, bitmaps, out := GP64(), GP64(), GP64()
	LEAQ(ptr(dst, bitmapOffset), bitmaps)
	MOVQ(masks, out)
	warp := GP64()
	MOVQ(U32(warpTiles), warp)

	// codes leaves the escape mask and the code bits of 32 weights of a row: chunks 2h, 2h+1 in x, 2h+4, 2h+5 in y.
	codes := func(x, y reg.VecVirtual, row, h int) {
		VPSLLW(U8(1), x, x)
		VPSRLW(U8(8), x, x)
		VPSLLW(U8(1), y, y)
		VPSRLW(U8(8), y, y)
		VPACKUSWB(y, x, x)
		VPSUBB(base, x, x)
		in, bits := YMM(), GP32()
		VPMINUB(seven, x, in)
		VPCMPEQB(in, x, in)
		VPMOVMSKB(in, bits)
		MOVL(bits, ptr(out, 8*row+4*h))
		VPAND(in, x, x)
		VPSHUFB(eo, x, x)
		for k := range 3 {
			t, bits := YMM(), GP32()
			VPSLLW(U8(7-k), x, t)
			VPMOVMSKB(t, bits)
			MOVL(bits, ptr(planes, k*planeWork+8*slot(row)+4*h))
		}
	}

	Label("warp")
	LEAQ(Mem{Base: upper, Index: stride, Scale: 8}, lower)
	for r := range 8 {
		PREFETCHT1(ptr(upper, prefetchForward))
		PREFETCHT1(ptr(upper, prefetchForward+64))
		PREFETCHT1(ptr(lower, prefetchForward))
		PREFETCHT1(ptr(lower, prefetchForward+64))
		for h := range 2 {
			var u, l [2]reg.VecVirtual
			for g := range 2 { // chunks 2h, 2h+1, then 2h+4, 2h+5
				u[g], l[g] = YMM(), YMM()
				VMOVDQU(ptr(upper, 32*h+64*g), u[g])
				VMOVDQU(ptr(lower, 32*h+64*g), l[g])
				a, b := YMM(), YMM()
				VPAND(mA, u[g], a)
				VPSHUFB(sw, l[g], b)
				VPANDN(b, mA, b)
				VPOR(a, b, a)
				chunk := 2*h + 4*g
				VMOVDQU(a.AsX(), ptr(dst, chunk*chunkSM+16*r))
				VEXTRACTI128(U8(1), a, ptr(dst, (chunk+1)*chunkSM+16*r))
			}
			codes(u[0], u[1], r, h)
			codes(l[0], l[1], r+8, h)
		}
		ADDQ(stride, upper)
		ADDQ(stride, lower)
	}
	for k := range 3 {
		// Rows r and r+8 are interleaved into the lanes' words, which are then transposed from rows to column groups.
		var row [4]reg.VecVirtual
		for i := range 2 {
			a, b := YMM(), YMM()
			VMOVDQU(ptr(planes, k*planeWork+32*i), a)
			VMOVDQU(ptr(planes, k*planeWork+32*i+64), b)
			row[2*i], row[2*i+1] = YMM(), YMM()
			VPUNPCKLBW(b, a, row[2*i])
			VPUNPCKHBW(b, a, row[2*i+1])
		}
		var pair [4]reg.VecVirtual
		for i := range pair {
			pair[i] = YMM()
		}
		VPUNPCKLDQ(row[1], row[0], pair[0])
		VPUNPCKLDQ(row[3], row[2], pair[1])
		VPUNPCKHDQ(row[1], row[0], pair[2])
		VPUNPCKHDQ(row[3], row[2], pair[3])
		for group := range 4 {
			o := YMM()
			if group%2 == 0 {
				VPUNPCKLQDQ(pair[group/2*2+1], pair[group/2*2], o)
			} else {
				VPUNPCKHQDQ(pair[group/2*2+1], pair[group/2*2], o)
			}
			if k > 0 { // plane k is rotated left by k
				t := YMM()
				VPSRLW(U8(16-k), o, t)
				VPSLLW(U8(k), o, o)
				VPOR(t, o, o)
			}
			VMOVDQU(o, ptr(bitmaps, k*planeBytes+32*group))
		}
	}
	MOVQ(lower, upper) // 16 rows on
	ADDQ(U32(warpSM), dst)
	ADDQ(U32(warpBitmap), bitmaps)
	ADDQ(U32(8*16), out)
	DECQ(warp)
	JNZ(LabelRef("warp"))

	order, ones := YMM(), YMM()
	VMOVDQU(chunkOrder, order)
	VPCMPEQB(ones, ones, ones)
	for i := range 16 {
		t := YMM()
		VMOVDQU(ptr(masks, 32*i), t)
		VPSHUFB(order, t, t)
		VPXOR(ones, t, t)
		VMOVDQU(t, ptr(masks, 32*i))
	}
	VZEROUPPER()
	RET()
}

func decodeAVX2() {
	TEXT("decodeAVX2", NOSPLIT, "func(dst *byte, stride int, signMantissa, bitmaps *byte, warps int, base uint32)")
	dst := Load(Param("dst"), GP64())
	stride := Load(Param("stride"), GP64())
	sm := Load(Param("signMantissa"), GP64())
	bitmaps := Load(Param("bitmaps"), GP64())
	warps := Load(Param("warps"), GP64())
	b := Load(Param("base"), GP32())
	SHLL(U8(7), b)
	bx, base := XMM(), YMM()
	MOVD(b, bx)
	VPBROADCASTW(bx, base)

	mA, sw := YMM(), YMM()
	VMOVDQU(words16("signMantissaD", 32, maskA), mA)
	VMOVDQU(bytes8("swapBytesD", 32, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14), sw)
	// The words of the lanes r and r+1 to the four 32-bit words of the chunks of rows r and r+1: as they are for row r; byte-swapped in each half for row
	// r+8, whose pairs 8..15 so come to the bits of pairs 0..7.
	spread := bytes8("spread", 32, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7)
	spreadSwapped := bytes8("spreadSwapped", 32, 1, 0, 3, 2, 1, 0, 3, 2, 1, 0, 3, 2, 1, 0, 3, 2, 5, 4, 7, 6, 5, 4, 7, 6, 5, 4, 7, 6, 5, 4, 7, 6)
	asIs, swapped := YMM(), YMM()
	VMOVDQU(spread, asIs)
	VMOVDQU(spreadSwapped, swapped)
	// Pair p = 4 g + j of plane k is at bit (p + k) mod 16 of each half: with three masks the bits of one code stand side by side, from bit p.
	var bitMask [2][3]Mem
	var toExponent [2]Mem
	for g := range 2 {
		for k := range 3 {
			var m [4]uint32
			for j := range m {
				m[j] = 0x00010001 << (4*g + j + k)
			}
			bitMask[g][k] = words32("bit"+string('A'+rune(3*g+k)), 32, m[:]...)
		}
		p := uint32(4 * g)
		toExponent[g] = words32("shift"+string('A'+rune(g)), 32, 7-p, 6-p, 5-p, 4-p)
	}

	lower := GP64()
	Label("warp")
	LEAQ(Mem{Base: dst, Index: stride, Scale: 8}, lower)
	for i := range warpBitmap / 64 {
		PREFETCHT1(ptr(bitmaps, fixedAhead+64*i))
	}
	for r := 0; r < 8; r += 2 {
		if r%4 == 0 {
			for chunk := range 8 {
				PREFETCHT1(ptr(sm, fixedAhead+chunk*chunkSM+16*r))
			}
		}
		for pair := 0; pair < 4; pair += 2 { // column groups pair, pair+1: 16 columns in a row
			for half, to := range []reg.Register{dst, lower} {
				var done [2][2]reg.VecVirtual // [group][g]
				for group := range 2 {
					var plane [3]reg.VecVirtual
					for k := range plane {
						plane[k] = YMM()
						VPBROADCASTQ(ptr(bitmaps, k*planeBytes+4*(8*(pair+group)+r)), plane[k])
						VPSHUFB([]reg.VecVirtual{asIs, swapped}[half], plane[k], plane[k])
					}
					for g := range 2 {
						s, c, t := YMM(), YMM(), YMM()
						VMOVDQU(ptr(sm, (pair+group+4*g)*chunkSM+16*r), s)
						if half == 1 {
							VPSHUFB(sw, s, s)
						}
						VPAND(bitMask[g][0], plane[0], c)
						VPAND(bitMask[g][1], plane[1], t)
						VPOR(t, c, c)
						VPAND(bitMask[g][2], plane[2], t)
						VPOR(t, c, c)
						VPSLLVD(toExponent[g], c, c)
						VPAND(mA, s, s)
						VPADDW(base, c, c)
						VPOR(c, s, s)
						done[group][g] = s
					}
				}
				for g := range 2 {
					a, b := done[0][g], done[1][g]
					first, second := YMM(), YMM()
					VPERM2I128(U8(0x20), b, a, first)
					VPERM2I128(U8(0x31), b, a, second)
					VMOVDQU(first, ptr(to, 16*pair+64*g))
					VMOVDQU(second, Mem{Base: to, Index: stride, Scale: 1, Disp: 16*pair + 64*g})
				}
			}
		}
		LEAQ(Mem{Base: dst, Index: stride, Scale: 2}, dst)
		LEAQ(Mem{Base: lower, Index: stride, Scale: 2}, lower)
	}
	MOVQ(lower, dst)
	ADDQ(U32(warpSM), sm)
	ADDQ(U32(warpBitmap), bitmaps)
	DECQ(warps)
	JNZ(LabelRef("warp"))
	VZEROUPPER()
	RET()
}

// streamAVX2 copies rows of 128 bytes past the caches: the caller writes more than they hold and would first have to read each line from memory.
func streamAVX2() {
	TEXT("streamAVX2", NOSPLIT, "func(dst *byte, stride int, src *byte, rows int)")
	dst := Load(Param("dst"), GP64())
	stride := Load(Param("stride"), GP64())
	src := Load(Param("src"), GP64())
	rows := Load(Param("rows"), GP64())
	Label("row")
	var y [4]reg.VecVirtual
	for i := range y {
		y[i] = YMM()
		VMOVDQU(ptr(src, 32*i), y[i])
	}
	for i := range y {
		VMOVNTDQ(y[i], ptr(dst, 32*i))
	}
	ADDQ(U32(rowBytes), src)
	ADDQ(stride, dst)
	DECQ(rows)
	JNZ(LabelRef("row"))
	VZEROUPPER()
	RET()
}

// fence makes streamed bytes visible before whatever the goroutine does next.
func fence() {
	TEXT("fenceSSE", NOSPLIT, "func()")
	SFENCE()
	RET()
}
