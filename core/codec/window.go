// SPDX-License-Identifier: Apache-2.0

package codec

import "github.com/zipserv/zipserv/core/format"

// window is the choice of format.md section 3 for one tile.
type window struct {
	base     uint8
	escapes  int
	literals int
}

// histogramWindow chooses from the tile's whole histogram: the reference that any faster choice must equal.
func histogramWindow(hist *[256]uint32, weights, maxBase int) window {
	covered := 0
	for e := range format.WindowSize {
		covered += int(hist[e])
	}
	best, base := covered, 0
	for b := 1; b <= maxBase; b++ {
		covered += int(hist[b+format.WindowSize-1]) - int(hist[b-1])
		if covered > best {
			best, base = covered, b
		}
	}
	w := window{base: uint8(base), escapes: weights - best}
	lo, hi := literalBounds(w.base)
	near := 0
	for e := lo; e <= hi; e++ {
		near += int(hist[e])
	}
	w.literals = weights - near
	return w
}

// literalBounds are the exponents that need no literal byte: the window and those that have a symbol.
func literalBounds(base uint8) (lo, hi int) {
	return max(int(base)-format.SymbolsBelow, 0), min(int(base)+format.WindowSize+format.SymbolsAbove-1, 255)
}

// chooseWindow chooses for the exponents in s.exps; `padding` of them are 0 and stand for no weight.
func (s *scratch) chooseWindow(lowest, highest uint8, padding, maxBase int) window {
	weights := tileWeights - padding
	if kern.count != nil {
		if w, ok := s.quickWindow(lowest, highest, padding, weights, maxBase); ok {
			return w
		}
	}
	hist := &s.work.hist
	histogram(hist, s.exps[:])
	hist[0] -= uint32(padding)
	return histogramWindow(hist, weights, maxBase)
}

// quickWindow decides from a few counts around the highest exponent, which is enough for weights that were trained. A window above
// top-7 covers no more than the one at top-7, so the search goes down from there. The window at top-7-d misses the d exponents at the top;
// as soon as that alone makes it worse than the best so far, so are all windows below it. Padding (exponent 0) must be in none of the counts.
func (s *scratch) quickWindow(lowest, highest uint8, padding, weights, maxBase int) (window, bool) {
	first := int(highest) - (format.WindowSize - 1)
	if first-len(counts{}.below) <= 0 || first > maxBase {
		return window{}, false
	}
	// Two steps down are enough nine times out of ten.
	best, base, ok := kern.count(s, highest, false).search(first, weights, 1)
	if !ok {
		if best, base, ok = kern.count(s, highest, true).search(first, weights, len(counts{}.below)); !ok {
			return window{}, false
		}
	}
	w := window{base: uint8(base), escapes: weights - best}
	lo, hi := literalBounds(w.base)
	if int(lowest) >= lo && int(highest) <= hi {
		return w, true
	}
	w.literals = int(kern.outside(s, uint8(lo), uint8(hi)))
	if lo > 0 {
		w.literals -= padding
	}
	return w, true
}

// search goes down from the window at `first`, up to `depth` steps.
func (c counts) search(first, weights, depth int) (best, base int, ok bool) {
	covered := int(c.window)
	best, base = covered, first
	above := 0
	for d := 1; ; d++ {
		above += int(c.top[d-1])
		if weights-above < best {
			return best, base, true
		}
		if d > depth {
			return 0, 0, false
		}
		covered += int(c.below[d-1]) - int(c.top[d-1])
		if covered >= best { // the smallest base on ties
			best, base = covered, first-d
		}
	}
}

// histogram counts bytes; four tables, because runs of equal bytes would wait for each other's counter.
func histogram(hist *[256]uint32, b []byte) {
	var t [4][256]uint32
	for len(b) >= 4 {
		t[0][b[0]]++
		t[1][b[1]]++
		t[2][b[2]]++
		t[3][b[3]]++
		b = b[4:]
	}
	for _, x := range b {
		t[0][x]++
	}
	for i := range hist {
		hist[i] = t[0][i] + t[1][i] + t[2][i] + t[3][i]
	}
}
