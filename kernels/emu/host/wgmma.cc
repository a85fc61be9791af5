// SPDX-License-Identifier: Apache-2.0
// Warpgroup matrix multiply: D[64 x n] += A[64 x 16] * B[n x 16]^T, each warp its 16 rows. It executes when it is waited for, from
// the shared memory of that moment; its operands must have been ordered before the issue; accumulators read as NaN until the wait.
#include <cmath>
#include <cstring>
#include "float16.h"
#include "warp.h"

namespace zsemu {

namespace {
struct Issue {
  float* d;
  int n;
  const uint32_t* a;
  uint64_t desc_a, desc_b;
  bool accumulate, fp16;
};
struct Wait {
  uint32_t pending;
};

// Element (row, k) of a K-major operand, by the matrix descriptor.
size_t operand_offset(uint64_t desc, int row, int k) {
  auto start = uint32_t(desc & 0x3FFF) << 4, lbo = uint32_t(desc >> 16 & 0x3FFF) << 4, sbo = uint32_t(desc >> 32 & 0x3FFF) << 4;
  auto mode = uint32_t(desc >> 62);
  if (desc >> 49 & 7) fault("argument", "a wgmma descriptor with a base offset: align the operand to its swizzle atom instead");
  uint32_t at = 0;
  switch (mode) {
    case 0: at = start + uint32_t(row / 8) * sbo + uint32_t(k / 8) * lbo + uint32_t(row % 8) * 16 + uint32_t(k % 8) * 2; break;
    case 1: at = start + uint32_t(row / 8) * sbo + uint32_t(row % 8) * 128 + uint32_t(k) * 2, at ^= (at >> 7 & 7) << 4; break;
    case 2: at = start + uint32_t(row / 8) * sbo + uint32_t(row % 8) * 64 + uint32_t(k) * 2, at ^= (at >> 7 & 3) << 4; break;
    case 3: at = start + uint32_t(row / 8) * sbo + uint32_t(row % 8) * 32 + uint32_t(k) * 2, at ^= (at >> 7 & 1) << 4; break;
  }
  return at - (kSharedOrigin & 0x3FFFF);
}

float operand(const Wgmma& op, uint64_t desc, int row, int k, Region& s) {
  size_t off = operand_offset(desc, row, k);
  if (off + 2 > s.size) fault("bounds", "a wgmma operand at shared address %zu: shared memory has %zu bytes", off, s.size);
  uint16_t v;
  memcpy(&v, s.base + off, 2);
  return widen(v, op.fp16);
}

void check_operand(const Wgmma& op, uint64_t desc, int row0, int rows, Region& s) {
  for (int r = row0; r < row0 + rows; r++)
    for (int k = 0; k < 16; k += 8) {   // eight elements stay together in every layout
      size_t off = operand_offset(desc, r, k);
      if (off + 16 > s.size) fault("bounds", "a wgmma operand at shared address %zu: shared memory has %zu bytes", off, s.size);
      check_read(op.issue, s, off, 16, Access::async);
    }
}

void execute(Warp& w, Wgmma& op) {
  Region& s = *w.block->smem;
  int row0 = int(w.id % 4) * 16;
  uint32_t pc = cur ? cur->pc : 0;
  op.issue.clock = op.reader->clock;   // it reads until now, but knows only what it knew at the issue
  if (!op.from_regs) check_operand(op, op.desc_a, row0, 16, s);
  check_operand(op, op.desc_b, 0, op.n, s);
  if (cur) cur->pc = pc;
  float A[16][16];
  std::vector<float> B(size_t(op.n) * 16);
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < 16; k++) {
      if (!op.from_regs) {
        A[r][k] = operand(op, op.desc_a, row0 + r, k, s);
      } else {
        int lane = r % 8 * 4 + k % 8 / 2, word = r / 8 + 2 * (k / 8);
        A[r][k] = widen(uint16_t(op.a[lane][word] >> (16 * (k % 2))), op.fp16);
      }
    }
  for (int n = 0; n < op.n; n++)
    for (int k = 0; k < 16; k++) B[size_t(n) * 16 + size_t(k)] = operand(op, op.desc_b, n, k, s);
  for (int l = 0; l < 32; l++) {
    auto& acc = w.held[op.d[l]];
    for (int i = 0; i < op.n / 2; i++) {
      int row = l / 4 + 8 * (i / 2 % 2), col = 8 * (i / 4) + l % 4 * 2 + i % 2;
      double sum = op.accumulate ? acc[size_t(i)] : 0;
      for (int k = 0; k < 16; k++) sum += double(A[row][k]) * double(B[size_t(col) * 16 + size_t(k)]);
      acc[size_t(i)] = float(sum);
    }
  }
}

void finish_oldest(Warp& w) {
  for (Wgmma& op : w.groups.front()) execute(w, op);
  w.groups.erase(w.groups.begin());
  // Accumulators that nothing works on any more become visible.
  for (auto it = w.held.begin(); it != w.held.end();) {
    bool used = false;
    for (auto& group : w.groups)
      for (auto& op : group)
        for (float* d : op.d) used |= d == it->first;
    for (auto& op : w.open)
      for (float* d : op.d) used |= d == it->first;
    if (used) {
      ++it;
    } else {
      memcpy(it->first, it->second.data(), it->second.size() * 4);
      it = w.held.erase(it);
    }
  }
}
}  // namespace

void wgmma_fence() {
  ZS_ENTER();
  cur->wgmma_fenced = true;
}

void wgmma(float* d, int n, const uint32_t* a, uint64_t desc_a, uint64_t desc_b, bool accumulate, bool fp16) {
  ZS_ENTER();
  if (n < 8 || n > 256 || n % 8) fault("argument", "wgmma with n = %d", n);
  if (!cur->wgmma_fenced) fault("wgmma", "wgmma with no wgmma_fence since the last wait");
  Issue me{d, n, a, desc_a, desc_b, accumulate, fp16};
  meet(kWgmma, 0xFFFFFFFFu, &me,
       [](Warp& w, uint32_t, void* const* data) {
         if ((w.id / 4 + 1) * 128 > g.threads) fault("wgmma", "wgmma by warp %u of a block of %u threads: not a whole warpgroup", w.id, g.threads);
         Wgmma op;
         auto& first = *(Issue*)data[0];
         op.n = first.n;
         op.from_regs = first.a != nullptr;
         op.accumulate = first.accumulate;
         op.fp16 = first.fp16;
         op.desc_a = first.desc_a;
         op.desc_b = first.desc_b;
         for (int l = 0; l < 32; l++) {
           auto& i = *(Issue*)data[l];
           if (i.desc_b != first.desc_b || i.n != first.n || i.accumulate != first.accumulate || (!i.a) != (!first.a) || (!i.a && i.desc_a != first.desc_a))
             fault("divergence", "lanes of a warp issue wgmma with different operands");
           op.d[l] = i.d;
           if (i.a) memcpy(op.a[l], i.a, 16);
           auto& acc = w.held[i.d];
           if (acc.empty()) acc.assign(i.d, i.d + i.n / 2);
           for (int k = 0; k < i.n / 2; k++) i.d[k] = std::nanf("");
         }
         Fiber* reader = w.lane[rnd() % 32];
         op.keep = reader->view;
         op.reader = reader;
         op.issue = {reader->gid, reader->clock, reader->view.get(), cur->pc};
         w.open.push_back(op);
       },
       true);
}

void wgmma_commit() {
  ZS_ENTER();
  meet(kWgmmaCommit, 0xFFFFFFFFu, nullptr,
       [](Warp& w, uint32_t, void* const*) {
         w.groups.push_back(std::move(w.open));
         w.open.clear();
       },
       true);
}

void wgmma_wait(uint32_t pending) {
  ZS_ENTER();
  yield();
  Wait me{pending};
  meet(kWgmmaWait, 0xFFFFFFFFu, &me,
       [](Warp& w, uint32_t, void* const* data) {
         uint32_t keep = ((Wait*)data[0])->pending;
         while (w.groups.size() > keep) finish_oldest(w);
         for (Fiber* f : w.lane) f->wgmma_fenced = false;
       },
       true);
}

}  // namespace zsemu
