// SPDX-License-Identifier: Apache-2.0

package main

import (
	. "github.com/mmcloughlin/avo/build"
	"github.com/mmcloughlin/avo/ir"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// The product with a compressed tile, without ever writing its weights. Three steps, of which only the last is done again for more tokens:
//
//	expsGFNI, expsAVX512
//	               bitmaps -> one exponent byte a weight, in `exps` (4096 bytes in the first-level cache)
//	patchExps      escapes -> their bytes there
//	multiply...    sign and mantissa with exponents -> 32 weights in a register -> sums
//
// Weights stay in the order in which the format holds them: a register is 4 rows x 8 columns of a FragTile. A sum does not care in which order
// the columns come, so x is what is arranged: its 8 values, four times over. Each row has four sums in each token's `acc`.

// expOrder is where the exponent of the weight at a position 64 row + column stands: for each 4 x 16 weights (chunk `group` and chunk group+4 of four
// rows) one block of 64 bytes in the order row, parity of the column, chunk, pair. Bits 11..8 are the position's own.
//
//	position: w w ih rq r r  g c c p p h        row = 16 w + 8 ih + 4 rq + r, column = 8 (4 g + c) + 2 p + h
//	index:    w w ih rq c c  r r h g p p
func expOrder(position int) int {
	r, g, c, p, h := position>>6&3, position>>5&1, position>>3&3, position>>1&3, position&1
	return position&0xF00 | c<<6 | r<<4 | h<<3 | g<<2 | p
}

// fusedAhead is how far in front of the tile in work the next ones are fetched; a few lines at a time, or the wait for them is not hidden.
const fusedAhead = 4 * fixedAhead

// blockByte is where byte 2 r + h of the masks of block q = 4 c + 2 rq + ih stands in 16 lanes' words, which are two column groups: byte 2 h + ih of
// lane 8 c + 4 rq + r.
func blockByte(q, b int) int {
	r, h := b/2, b%2
	return 4*(8*(q/4)+4*(q/2%2)+r) + 2*h + q%2
}

// exponents is the frame of both: work makes the exponents of a warp tile from its bitmaps. Block (c, rq, ih) goes to blockAt.
func exponents(name string, setup func(base reg.GPVirtual), work func(bitmaps, exps reg.Register)) {
	TEXT(name, NOSPLIT, "func(exps, fixed *byte, base uint32, planes *uint64)")
	exps := Load(Param("exps"), GP64())
	bitmaps := Load(Param("fixed"), GP64())
	b := Load(Param("base"), GP32()).(reg.GPVirtual)
	warp := GP64()
	ADDQ(U32(bitmapOffset), bitmaps)
	MOVQ(U32(warpTiles), warp)
	setup(b)
	Label("warp")
	for i := range warpBitmap / 64 {
		PREFETCHT1(ptr(bitmaps, fusedAhead+64*i))
	}
	work(bitmaps, exps)
	ADDQ(U32(warpBitmap), bitmaps)
	ADDQ(U32(16*64), exps)
	DECQ(warp)
	JNZ(LabelRef("warp"))
	VZEROUPPER()
	RET()
}

// blockAt is the offset of the exponents of block q = 4 c + 2 rq + ih of the column groups 2 half and 2 half + 1.
func blockAt(half, q int) int { return 64 * (8*(q%2) + 4*(q/2%2) + 2*half + q/4) }

// planeWords loads the words of 16 lanes and turns them back to the order of pairs.
func planeWords(bitmaps reg.Register, k, half int) reg.VecVirtual {
	w := ZMM()
	VMOVDQU8(ptr(bitmaps, k*planeBytes+64*half), w)
	if k > 0 {
		VPSHRDW(U8(k), w, w, w)
	}
	return w
}

// expsAVX512 takes the bits as masks.
func expsAVX512() {
	var planes reg.Register
	var base, next, two, four, order reg.VecVirtual
	exponents("expsAVX512", func(b reg.GPVirtual) {
		planes = Load(Param("planes"), GP64())
		one := constant64("onesF", func(int) int { return 1 })
		two = constant64("twosF", func(int) int { return 2 })
		four = constant64("foursF", func(int) int { return 4 })
		order = constant64("blockMasks", func(i int) int { return blockByte(i/8, i%8) })
		base, next = ZMM(), ZMM()
		VPBROADCASTB(b, base)
		VPADDB(one, base, next)
	}, func(bitmaps, exps reg.Register) {
		for k := range 3 {
			for half := range 2 {
				w := planeWords(bitmaps, k, half)
				VPERMB(w, order, w)
				VMOVDQU8(w, ptr(planes, k*planeWork+64*half))
			}
		}
		for half := range 2 {
			for q := range 8 {
				var set [3]reg.OpmaskVirtual
				for k := range set {
					set[k] = K()
					KMOVQ(ptr(planes, k*planeWork+64*half+8*q), set[k])
				}
				e := ZMM()
				VPBLENDMB(next, base, set[0], e)
				VPADDB(two, e, set[1], e)
				VPADDB(four, e, set[2], e)
				VMOVDQU8(e, ptr(exps, blockAt(half, q)))
			}
		}
	})
}

// expsGFNI transposes 8 x 8 bits at once: of two bytes of each plane and two zeros it makes 8 bytes with a code in each half.
func expsGFNI() {
	var table, identity, order, zero reg.VecVirtual
	exponents("expsGFNI", func(b reg.GPVirtual) {
		count := constant64("codes", func(i int) int { return i % 16 % 8 })
		table, zero = ZMM(), ZMM()
		VPBROADCASTB(b, table)
		VPADDB(count, table, table)
		VPXORQ(zero, zero, zero)
		identity = constant64("identity", func(i int) int { return 1 << (i % 8) })
		// Unpacked twice, bytes 4 i .. 4 i + 3 of each of the four parts of a register come to register i: the bytes 2 part, 2 part + 1 of the blocks
		// 2 i and 2 i + 1, in turns.
		order = constant64("blockPairs", func(i int) int { return blockByte(2*(i/4%4)+i%2, 2*(i/16)+i/2%2) })
	}, func(bitmaps, exps reg.Register) {
		for half := range 2 {
			var p [3]reg.VecVirtual
			for k := range p {
				p[k] = planeWords(bitmaps, k, half)
				VPERMB(p[k], order, p[k])
			}
			for side := range 2 {
				upper, lower := ZMM(), ZMM() // words of planes 1, 0 and of 2, nothing
				if side == 0 {
					VPUNPCKLBW(p[2], zero, upper)
					VPUNPCKLBW(p[0], p[1], lower)
				} else {
					VPUNPCKHBW(p[2], zero, upper)
					VPUNPCKHBW(p[0], p[1], lower)
				}
				for i := range 2 {
					m, e := ZMM(), ZMM()
					if i == 0 {
						VPUNPCKLWD(lower, upper, m)
					} else {
						VPUNPCKHWD(lower, upper, m)
					}
					q := 2 * (2*side + i)
					VGF2P8AFFINEQB(U8(0), m, identity, m)
					VPSHUFB(m, table, e) // the code in the lower half: the second byte of each pair
					VMOVDQU8(e, ptr(exps, blockAt(half, q+1)))
					VPSRLW(U8(4), m, m)
					VPSHUFB(m, table, m)
					VMOVDQU8(m, ptr(exps, blockAt(half, q)))
				}
			}
		}
	})
}

// patchExps writes the exponents of the escapes: first those with a literal byte each, then those whose symbol says it. Any entries are safe.
func patchExps() {
	TEXT("patchExps", NOSPLIT, "func(exps, entries *byte, n int, literals *byte, literal int, base uint32, symbols *byte)")
	exps := Load(Param("exps"), GP64())
	at := Load(Param("entries"), GP64())
	n := Load(Param("n"), GP64())
	literals := Load(Param("literals"), GP64())
	literal := Load(Param("literal"), GP64())
	b := Load(Param("base"), GP32())
	symbols := Load(Param("symbols"), GP64())
	place := GP64()
	low := GLOBL("expOrder", 8|16)
	for i := range 256 {
		DATA(i, U8(expOrder(i)))
	}
	LEAQ(low, place)
	// Symbol s < 12: base - 1 - s; then base + 8 + s - 12.
	table := GLOBL("symbolExponents", 8|16)
	for s := range 16 {
		d := -1 - s
		if s >= 12 {
			d = 8 + s - 12
		}
		DATA(s, U8(uint8(d)))
	}
	base := XMM()
	MOVD(b, base)
	zero := XMM()
	VPXOR(zero, zero, zero)
	VPSHUFB(zero, base, base)
	VPADDB(table, base, base)
	VMOVDQU(base, ptr(symbols, 0))

	index := func(entry reg.GPVirtual) (to, rest reg.GPVirtual) {
		lowByte, high := GP64(), GP64()
		MOVBLZX(entry.As8(), lowByte.As32())
		MOVBLZX(Mem{Base: place, Index: lowByte, Scale: 1}, lowByte.As32())
		MOVL(entry.As32(), high.As32())
		ANDL(U32(0xF00), high.As32())
		ORL(high.As32(), lowByte.As32())
		return lowByte, entry
	}
	SUBQ(literal, n)
	TESTQ(literal, literal)
	JZ(LabelRef("symbols"))
	Label("literal")
	{
		entry, e := GP64(), GP64()
		MOVWLZX(ptr(at, 0), entry.As32())
		MOVBLZX(ptr(literals, 0), e.As32())
		to, _ := index(entry)
		MOVB(e.As8(), Mem{Base: exps, Index: to, Scale: 1})
		ADDQ(U8(2), at)
		INCQ(literals)
		DECQ(literal)
		JNZ(LabelRef("literal"))
	}
	Label("symbols")
	TESTQ(n, n)
	JZ(LabelRef("done"))
	Label("symbol")
	{
		entry, e := GP64(), GP64()
		MOVWLZX(ptr(at, 0), entry.As32())
		to, rest := index(entry)
		SHRL(U8(12), rest.As32())
		MOVBLZX(Mem{Base: symbols, Index: rest, Scale: 1}, e.As32())
		MOVB(e.As8(), Mem{Base: exps, Index: to, Scale: 1})
		ADDQ(U8(2), at)
		DECQ(n)
		JNZ(LabelRef("symbol"))
	}
	Label("done")
	RET()
}

var zmm = [32]reg.VecPhysical{
	reg.Z0, reg.Z1, reg.Z2, reg.Z3, reg.Z4, reg.Z5, reg.Z6, reg.Z7, reg.Z8, reg.Z9, reg.Z10, reg.Z11, reg.Z12, reg.Z13, reg.Z14, reg.Z15,
	reg.Z16, reg.Z17, reg.Z18, reg.Z19, reg.Z20, reg.Z21, reg.Z22, reg.Z23, reg.Z24, reg.Z25, reg.Z26, reg.Z27, reg.Z28, reg.Z29, reg.Z30, reg.Z31,
}

// dotBF16 is VDPBF16PS, which neither the assembler library nor Go's assembler knows: sums += pairs of a times pairs of b. Numbers are those of
// ZMM registers.
func dotBF16(a, b, sums int) {
	inverted := func(n, bit, at int) int { return (1 - n>>bit&1) << at }
	p0 := inverted(sums, 3, 7) | inverted(a, 4, 6) | inverted(a, 3, 5) | inverted(sums, 4, 4) | 2 // 0F38
	p1 := (15-b&15)<<3 | 1<<2 | 2                                                                 // W0, F3
	p2 := 2<<5 | inverted(b, 4, 3)                                                                // 512 bits
	code := []int{0x62, p0, p1, p2, 0x52, 0xC0 | sums&7<<3 | a&7}
	for i, c := range code {
		in := &ir.Instruction{Opcode: "BYTE", Operands: []Op{U8(uint8(c))}}
		if i == 0 {
			in.Inputs, in.Outputs = []Op{zmm[a], zmm[b], zmm[sums]}, []Op{zmm[sums]}
		}
		Instruction(in)
	}
}

// multiply adds the products of a tile with `tokens` rows of x. With bf16 it needs AVX512_BF16; without, a pair of weights is two FP32 products.
func multiply(name string, tokens int, bf16 bool) {
	TEXT(name, NOSPLIT, "func(acc *float32, accStride int, signMantissa, exps, x *byte, xStride int)")
	acc := Load(Param("acc"), GP64())
	accStride := Load(Param("accStride"), GP64())
	sm := Load(Param("signMantissa"), GP64())
	exps := Load(Param("exps"), GP64())
	x := []reg.Register{Load(Param("x"), GP64())}
	xStride := Load(Param("xStride"), GP64())
	to := []reg.Register{acc}
	for t := 1; t < tokens; t++ {
		a, b := GP64(), GP64()
		LEAQ(Mem{Base: to[t-1], Index: accStride, Scale: 1}, a)
		LEAQ(Mem{Base: x[t-1], Index: xStride, Scale: 1}, b)
		to, x = append(to, a), append(x, b)
	}
	warp := GP64()
	MOVQ(U32(warpTiles), warp)
	next := 0
	take := func() int { next++; return next - 1 }
	mA, shuffle := take(), [2]int{take(), take()}
	VMOVDQU16(words16("signMantissa"+name, 64, maskA), zmm[mA])
	for g, s := range shuffle {
		VMOVDQU8(data64("place"+string('A'+rune(g))+name, 64, func(i int) int { n := i % 16 / 2; return 8*(n%2) + 4*g + n/2 }), zmm[s])
	}
	swap := data64("swap"+name, 64, func(i int) int { return i%16 ^ 1 })
	high := 0
	if !bf16 {
		high = take()
		VPTERNLOGD(U8(0xFF), zmm[high], zmm[high], zmm[high])
		VPSLLD(U8(16), zmm[high], zmm[high])
	}
	var sums [4][4]int // [2 ih + rq][token]
	for q := range sums {
		for t := range tokens {
			sums[q][t] = take()
		}
	}
	halves := 1 // of the values of x: as they are, or even and odd columns in FP32
	if !bf16 {
		halves = 2
	}
	var xs [2][4][2]int
	for g := range 2 {
		for t := range tokens {
			for i := range halves {
				xs[g][t][i] = take()
			}
		}
	}
	s, e, w, v := [2]int{take(), take()}, take(), take(), 0
	if !bf16 {
		v = take()
	}

	Label("warp")
	for q := range sums {
		for t := range tokens {
			VMOVUPS(ptr(to[t], 64*q), zmm[sums[q][t]])
		}
	}
	for c := range 4 {
		for g := range 2 {
			for t := range tokens {
				even := zmm[xs[g][t][0]]
				VBROADCASTI32X4(ptr(x[t], 16*(4*g+c)), even)
				if !bf16 {
					VPANDD(zmm[high], even, zmm[xs[g][t][1]])
					VPSLLD(U8(16), even, even)
				}
			}
		}
		for rq := range 2 {
			for g := range 2 {
				VMOVDQU8(ptr(sm, (4*g+c)*chunkSM+64*rq), zmm[s[g]])
				PREFETCHT1(ptr(sm, fusedAhead+(4*g+c)*chunkSM+64*rq))
			}
			for ih := range 2 {
				VMOVDQU8(ptr(exps, 64*(8*ih+4*rq+c)), zmm[e])
				for g := range 2 {
					VPSHUFB(zmm[shuffle[g]], zmm[e], zmm[w])
					VPSRLW(U8(1), zmm[w], zmm[w])
					if ih == 1 {
						VPSHUFB(swap, zmm[s[g]], zmm[s[g]])
					}
					VPTERNLOGQ(U8(0xD8), zmm[mA], zmm[s[g]], zmm[w]) // mask ? s : w
					if bf16 {
						for t := range tokens {
							dotBF16(w, xs[g][t][0], sums[2*ih+rq][t])
						}
						continue
					}
					VPANDD(zmm[high], zmm[w], zmm[v])
					VPSLLD(U8(16), zmm[w], zmm[w])
					for i, a := range []int{w, v} {
						for t := range tokens {
							VFMADD231PS(zmm[a], zmm[xs[g][t][i]], zmm[sums[2*ih+rq][t]])
						}
					}
				}
			}
		}
	}
	for q := range sums {
		for t := range tokens {
			VMOVUPS(zmm[sums[q][t]], ptr(to[t], 64*q))
		}
	}
	for t := range tokens {
		ADDQ(U32(4*64), to[t])
	}
	ADDQ(U32(warpSM), sm)
	ADDQ(U32(16*64), exps)
	DECQ(warp)
	JNZ(LabelRef("warp"))
	VZEROUPPER()
	RET()
}
