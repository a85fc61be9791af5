// SPDX-License-Identifier: Apache-2.0

// Command asm writes the codec's assembly: `go run . -out ../kernels_amd64.s -stubs ../kernels_stubs_amd64.go -pkg codec`, or `go generate` in the
// package above. It is a module of its own, so that the assembler library is no dependency of ZipServ.
package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Layout of the fixed part (docs/format.md section 5), in bytes.
const (
	warpTiles       = 4
	warpSM          = 1024 // sign and mantissa of a warp tile
	chunkSM         = 128  // one column block of 8 rows
	bitmapOffset    = 4096
	warpBitmap      = 384
	planeBytes      = 128
	maskA           = 0x807F
	rowBytes        = 128
	tileWeights     = 4096
	planeWork       = 128  // 16 rows of 64 code bits
	fixedAhead      = 5632 // the next tile
	prefetchForward = 512  // four tiles ahead in the same row
)

func main() {
	ConstraintExpr("amd64")
	scanAVX2()
	countAVX2("countFewAVX2", 0, 1, 8)
	countAVX2("countAVX2", 0, 1, 2, 3, 8, 9, 10)
	outsideAVX2()
	encodeAVX2()
	decodeAVX2()
	streamAVX2()
	fence()
	scanAVX512()
	encodeAVX512()
	decodeAVX512()
	dotAVX2()
	expsAVX512()
	expsGFNI()
	patchExps()
	for tokens := 1; tokens <= 4; tokens *= 2 {
		multiply("multiplyBF16x"+string('0'+rune(tokens)), tokens, true)
	}
	for tokens := 1; tokens <= 2; tokens *= 2 {
		multiply("multiplyFP32x"+string('0'+rune(tokens)), tokens, false)
	}
	Generate()
}

// words16 is read-only data that repeats a pattern of 16-bit values up to n bytes.
func words16(name string, n int, pattern ...uint16) Mem {
	m := GLOBL(name, 8|16)
	for i := 0; i < n/2; i++ {
		DATA(2*i, U16(pattern[i%len(pattern)]))
	}
	return m
}

func words32(name string, n int, pattern ...uint32) Mem {
	m := GLOBL(name, 8|16)
	for i := 0; i < n/4; i++ {
		DATA(4*i, U32(pattern[i%len(pattern)]))
	}
	return m
}

func bytes8(name string, n int, pattern ...uint8) Mem {
	m := GLOBL(name, 8|16)
	for i := 0; i < n; i++ {
		DATA(i, U8(pattern[i%len(pattern)]))
	}
	return m
}

// ptr is a Mem at a register.
func ptr(r reg.Register, disp int) Mem { return Mem{Base: r, Disp: disp} }

// broadcastByte fills a YMM register with the low byte of a parameter.
func broadcastByte(r reg.Register) reg.VecVirtual {
	x, y := XMM(), YMM()
	MOVD(r, x)
	VPBROADCASTB(x, y)
	return y
}
