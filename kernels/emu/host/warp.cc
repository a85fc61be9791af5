// SPDX-License-Identifier: Apache-2.0
#include "warp.h"
#include <cmath>
#include <cstring>
#include "float16.h"

namespace zsemu {

static const char* const names[] = {"", "__syncwarp", "a shuffle", "a vote", "a reduce", "a match", "ldmatrix", "stmatrix", "mma", "wgmma", "wgmma_commit", "wgmma_wait", "an arrival at the cluster's barrier", "cluster_wait"};

void meet(Meeting kind, uint32_t mask, void* data, Work work, bool whole_warp) {
  Fiber* f = cur;
  Warp& w = *f->warp;
  if (!(mask >> f->lane & 1)) fault("divergence", "%s with mask %08x by lane %u, which is not in it", names[kind], mask, f->lane);
  if (whole_warp && w.live != 0xFFFFFFFFu) fault("divergence", "%s needs the whole warp; only lanes %08x are left", names[kind], w.live);
  w.slot[f->lane] = {kind, mask, data};
  uint32_t here = 0;
  for (uint32_t m = mask & w.live; m; m &= m - 1) {
    uint32_t l = uint32_t(__builtin_ctz(m));
    const Slot& s = w.slot[l];
    if (!s.kind) continue;
    if (s.kind == kind && s.mask == mask)
      here |= 1u << l;
    else if (s.mask >> f->lane & 1)
      fault("divergence", "lane %u is in %s (mask %08x) while lane %u of the same warp is in %s (mask %08x) [pc %x]", f->lane, names[kind], mask, l, names[s.kind],
            s.mask, w.lane[l]->pc);
  }
  if (here != (mask & w.live)) {
    f->waits = {names[kind], ", mask %08llx, lanes %08llx missing", {mask, mask & w.live & ~here}};
    suspend();
    return;
  }
  g.collectives++;
  void* all[32] = {};
  for (uint32_t m = here; m; m &= m - 1) {
    int l = __builtin_ctz(m);
    all[l] = w.slot[l].data;
  }
  for (uint32_t m = here; m; m &= m - 1) w.slot[__builtin_ctz(m)] = {};
  if (work) work(w, here, all);
  for (uint32_t m = here; m; m &= m - 1) {
    int l = __builtin_ctz(m);
    if (w.lane[l] != f) resume(w.lane[l]);   // lanes that poll together are no progress
  }
}

#define EACH_LANE(l, mask) for (uint32_t m_ = (mask), l = 0; m_ && (l = uint32_t(__builtin_ctz(m_)), true); m_ &= m_ - 1)

void warp_sync(uint32_t mask) {
  ZS_ENTER();
  // The only one of these that orders memory.
  meet(kSyncwarp, mask, nullptr,
       [](Warp& w, uint32_t here, void* const*) {
         std::vector<Fiber*> all;
         EACH_LANE(l, here) all.push_back(w.lane[l]);
         if (g.opt.races) sync_group(all, nullptr);
       },
       false);
  yield();
}

namespace {
struct ShuffleData {
  Shuffle kind;
  uint64_t value, result;
  uint32_t arg, width;
};
struct WordData {
  int kind;
  uint64_t value;
  uint32_t result;
};
struct MatrixData {
  uint32_t* dst;
  int count;
  uint32_t addr;
  bool transpose;
};
struct MmaData {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  bool fp16;
};
}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, uint32_t arg, uint32_t width) {
  ZS_ENTER();
  if (width == 0 || width > 32 || (width & (width - 1))) fault("argument", "a shuffle of width %u", width);
  ShuffleData d{kind, value, 0, arg, width};
  meet(kShuffle, mask, &d,
       [](Warp&, uint32_t here, void* const* data) {
         EACH_LANE(l, here) {
           auto& me = *(ShuffleData*)data[l];
           uint32_t base = l & ~(me.width - 1), src = l;
           switch (me.kind) {
             case Shuffle::idx: src = base + (me.arg & (me.width - 1)); break;
             case Shuffle::up: src = l - base >= me.arg ? l - me.arg : l; break;
             case Shuffle::down: src = l - base + me.arg < me.width ? l + me.arg : l; break;
             case Shuffle::bfly: src = base + ((l - base) ^ me.arg); break;
           }
           if (me.kind == Shuffle::bfly && src >= base + me.width) src = l;
           // A lane outside the mask has no value to give.
           me.result = src < 32 && data[src] ? ((ShuffleData*)data[src])->value : 0xFFFFFFFFFFFFFFFFull;
         }
       },
       false);
  return d.result;
}

uint32_t vote(Vote kind, uint32_t mask, bool pred) {
  ZS_ENTER();
  WordData d{int(kind), pred, 0};
  meet(kVote, mask, &d,
       [](Warp&, uint32_t here, void* const* data) {
         uint32_t yes = 0;
         EACH_LANE(l, here) if (((WordData*)data[l])->value) yes |= 1u << l;
         EACH_LANE(l, here) {
           auto& me = *(WordData*)data[l];
           me.result = me.kind == int(Vote::ballot) ? yes : me.kind == int(Vote::any) ? yes != 0 : yes == here;
         }
       },
       false);
  return d.result;
}

uint32_t reduce(Reduce kind, uint32_t mask, uint32_t value) {
  ZS_ENTER();
  WordData d{int(kind), value, 0};
  meet(kReduce, mask, &d,
       [](Warp&, uint32_t here, void* const* data) {
         bool first = true;
         uint32_t r = 0;
         EACH_LANE(l, here) {
           auto& me = *(WordData*)data[l];
           auto v = uint32_t(me.value);
           if (first)
             r = v;
           else
             switch (Reduce(me.kind)) {
               case Reduce::add: r += v; break;
               case Reduce::min_u: r = v < r ? v : r; break;
               case Reduce::max_u: r = v > r ? v : r; break;
               case Reduce::min_s: r = int32_t(v) < int32_t(r) ? v : r; break;
               case Reduce::max_s: r = int32_t(v) > int32_t(r) ? v : r; break;
               case Reduce::and_: r &= v; break;
               case Reduce::or_: r |= v; break;
               case Reduce::xor_: r ^= v; break;
             }
           first = false;
         }
         EACH_LANE(l, here)((WordData*)data[l])->result = r;
       },
       false);
  return d.result;
}

uint32_t match_any(uint32_t mask, uint64_t value) {
  ZS_ENTER();
  WordData d{0, value, 0};
  meet(kMatch, mask, &d,
       [](Warp&, uint32_t here, void* const* data) {
         EACH_LANE(l, here) {
           auto& me = *(WordData*)data[l];
           for (uint32_t o = 0; o < 32; o++)
             if (here >> o & 1 && ((WordData*)data[o])->value == me.value) me.result |= 1u << o;
         }
       },
       false);
  return d.result;
}

namespace {
// The rows of an 8x8 matrix in shared memory, each at the address that a lane, `cur`, gives; two in the same banks are a conflict.
struct MatrixRows {
  uint32_t banks = 0;
  bool conflict = false;
  uint8_t* row(uint32_t addr, bool write, const char* what) {
    uint32_t at = addr - kSharedOrigin;
    Region* s = cur->block->smem;
    if (at + 16 > s->size || at + 16 < at) fault("bounds", "%s row at shared address %u: shared memory has %zu bytes", what, at, s->size);
    checked(s->base + at, 16, 16, write, Access::plain, what);
    uint32_t bank = 1u << (at / 16 % 8);
    conflict |= (banks & bank) != 0;
    banks |= bank;
    return s->base + at;
  }
  ~MatrixRows() {
    g.matrices++;
    g.conflicts += conflict;
  }
};
}  // namespace

void ldmatrix(uint32_t* dst, int count, uint32_t addr, bool transpose) {
  ZS_ENTER();
  MatrixData d{dst, count, addr, transpose};
  meet(kLdmatrix, 0xFFFFFFFFu, &d,
       [](Warp& w, uint32_t, void* const* data) {
         auto& any = *(MatrixData*)data[0];
         uint8_t rows[4][8][16];
         Fiber* self = cur;
         for (int i = 0; i < any.count; i++) {
           MatrixRows of;
           for (int r = 0; r < 8; r++) {
             cur = w.lane[8 * i + r];   // the lane that gives the address is the one that reads
             memcpy(rows[i][r], of.row(((MatrixData*)data[8 * i + r])->addr, false, "ldmatrix"), 16);
           }
         }
         cur = self;
         for (int i = 0; i < any.count; i++)
           for (int l = 0; l < 32; l++) {
             uint16_t pair[2];
             for (int k = 0; k < 2; k++) {
               int r = l / 4, c = l % 4 * 2 + k;
               if (any.transpose) std::swap(r, c);
               memcpy(&pair[k], &rows[i][r][2 * c], 2);
             }
             memcpy(&((MatrixData*)data[l])->dst[i], pair, 4);
           }
       },
       true);
}

void stmatrix(const uint32_t* src, int count, uint32_t addr, bool transpose) {
  ZS_ENTER();
  MatrixData d{const_cast<uint32_t*>(src), count, addr, transpose};
  meet(kStmatrix, 0xFFFFFFFFu, &d,
       [](Warp& w, uint32_t, void* const* data) {
         auto& any = *(MatrixData*)data[0];
         Fiber* self = cur;
         for (int i = 0; i < any.count; i++) {
           MatrixRows of;
           for (int r = 0; r < 8; r++) {
             uint16_t row[8];
             for (int c = 0; c < 8; c++) {
               int fr = any.transpose ? c : r, fc = any.transpose ? r : c;
               row[c] = uint16_t(((MatrixData*)data[4 * fr + fc / 2])->dst[i] >> (16 * (fc % 2)));
             }
             cur = w.lane[8 * i + r];   // the lane that gives the address is the one that writes
             cur->pc = self->pc;
             memcpy(of.row(((MatrixData*)data[8 * i + r])->addr, true, "stmatrix"), row, 16);
           }
         }
         cur = self;
       },
       true);
}

void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool fp16) {
  ZS_ENTER();
  MmaData m{d, a, {b0, b1}, fp16};
  meet(kMma, 0xFFFFFFFFu, &m,
       [](Warp&, uint32_t, void* const* data) {
         float A[16][16], B[16][8];
         bool half = ((MmaData*)data[0])->fp16;
         for (int l = 0; l < 32; l++) {
           auto& me = *(MmaData*)data[l];
           for (int i = 0; i < 8; i++) {   // element i of A: word i/2, half i%2
             int row = l / 4 + 8 * (i / 2 % 2), col = l % 4 * 2 + i % 2 + 8 * (i / 4);
             A[row][col] = widen(uint16_t(me.a[i / 2] >> (16 * (i % 2))), half);
           }
           for (int i = 0; i < 4; i++) B[l % 4 * 2 + i % 2 + 8 * (i / 2)][l / 4] = widen(uint16_t(me.b[i / 2] >> (16 * (i % 2))), half);
         }
         for (int l = 0; l < 32; l++)
           for (int i = 0; i < 4; i++) {
             int row = l / 4 + 8 * (i / 2), col = l % 4 * 2 + i % 2;
             // Products are exact in double; one rounding at the end stands for the tensor core's own few.
             double s = ((MmaData*)data[l])->d[i];
             for (int k = 0; k < 16; k++) s += double(A[row][k]) * double(B[k][col]);
             ((MmaData*)data[l])->d[i] = float(s);
           }
       },
       true);
}

}  // namespace zsemu
