// SPDX-License-Identifier: Apache-2.0
// csrc/packed/gpu_wgmma.cuh for a host, on the fibers of gpu_emulator.h. With `emulated::late` a product reads its
// registers and its shared memory when it is waited for, so that whatever was overwritten too early shows.
#pragma once

#include "gpu_emulator.h"

namespace discquant {
namespace packed {

inline void show_copies_to_wgmma() {}

inline void wgmma_begin() { emulated::fiber().may_begin = true; }
inline void wgmma_commit() {
  emulated::fiber().products.push_back(nullptr);
  emulated::fiber().may_begin = false;
}
template <int kPending>
void wgmma_wait() {
  emulated::finish(emulated::fiber().products, kPending);
}
inline void keep(float&) {}
inline void keep(uint32_t&) {}

// The product of one warp's 16 rows. B lies as the descriptor says, of which only what the kernel uses is known here: the
// 128-byte swizzle, in which bits 4 to 6 of an address are exchanged by bits 7 to 9.
template <class T, int kSums>
void multiply_rows(float* d, const uint32_t* a, uint64_t b) {
  const int lane = emulated::lane();
  std::memcpy(emulated::table().a[lane], a, 16);
  const emulated::Table& shown = emulated::warp_meets();
  const uint32_t start = static_cast<uint32_t>(b & 0x3fff) << 4, eight_rows = static_cast<uint32_t>(b >> 32 & 0x3fff) << 4;
  emulated::require(b >> 62 == 1 && (b >> 49 & 7) == 0 && start % 1024 < 128, "not a swizzled tile");
  float rows[2][16];
  for (int k = 0; k < 16; ++k)
    for (int r = 0; r < 2; ++r)
      rows[r][k] = half_value<T>(shown.a[lane / 4 * 4 + k % 8 / 2][r + 2 * (k / 8)], k % 2);
  for (int j = 0; j < kSums / 4; ++j)
    for (int c = 0; c < 2; ++c) {
      double sum[2] = {d[4 * j + c], d[4 * j + 2 + c]};
      for (int k = 0; k < 16; ++k) {
        const uint32_t plain = start + j * eight_rows + static_cast<uint32_t>((lane % 4 * 2 + c) * 128 + 2 * k);
        const uint32_t address = plain ^ (plain >> 7 & 7) << 4;
        emulated::require(address + 2 <= emulated::block->shared.size(), "wgmma out of bounds");
        uint16_t bits;
        std::memcpy(&bits, dynamic_shared() + address, 2);
        const double value = half_value<T>(bits, 0);
        for (int r = 0; r < 2; ++r) sum[r] += rows[r][k] * value;
      }
      d[4 * j + c] = static_cast<float>(sum[0]);
      d[4 * j + 2 + c] = static_cast<float>(sum[1]);
    }
}

template <class T, int kSums>
void wgmma(float (&d)[kSums], const uint32_t (&a)[4], uint64_t b, T) {
  emulated::Fiber& one = emulated::fiber();
  emulated::require(one.may_begin, "a product before the fence of its registers");
  float* const sums = d;
  const uint32_t* const rows = a;
  if (emulated::late)
    one.products.push_back([=] { multiply_rows<T, kSums>(sums, rows, b); });
  else
    multiply_rows<T, kSums>(sums, rows, b);
}

inline void cluster_barrier() { emulated::wait(emulated::Waits::kCluster); }

inline uint4 load_peer16(uint32_t address, int rank) {
  const auto& shared = emulated::cluster[static_cast<size_t>(rank)]->shared;
  emulated::require(address % 16 == 0 && address + 16 <= shared.size(), "a load from a peer out of bounds");
  uint4 value;
  std::memcpy(&value, shared.data() + address, 16);
  return value;
}

}  // namespace packed
}  // namespace discquant
