// SPDX-License-Identifier: Apache-2.0
// csrc/packed/gpu_primitives.cuh for a host: the threads of a block are fibers that change place at barriers and at
// warp-wide instructions; blocks, or clusters of them, run one after another in any order. What is asynchronous happens
// at once or as late as it may (`late`), by the caller's choice. For tests of the kernels' logic, not for speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "packed/dequant.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct Place {
  unsigned x, y, z;
};
inline Place threadIdx, blockIdx, gridDim;

namespace discquant {
namespace packed {
namespace emulated {

constexpr size_t kStack = 128 * 1024;

inline bool late = false;  // asynchronous work is done when it is waited for, instead of when it is asked for

enum class Waits { kNot, kBlock, kCluster };

// Asynchronous work in the order it was asked for; an empty function ends a group.
using Work = std::vector<std::function<void()>>;

struct Fiber {
  ucontext_t context;
  bool done = false;
  Waits waits = Waits::kNot;
  bool polls = false;     // waits for what another warp writes
  unsigned meetings = 0;  // of its warp
  Work copies, products;
  bool may_begin = false;  // a product: registers have been fenced
};

// What lanes show each other in one meeting.
struct Table {
  uint32_t a[32][4], b[32][2];
};

struct Warp {
  int arrived = 0;
  uint64_t generation = 0;
  Table tables[2];  // by turns: a lane may be one meeting ahead of the others
};

struct Block {
  Place place;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  ucontext_t scheduler;
  size_t current = 0;
  std::function<void()> body;
};
inline Block* block = nullptr;                           // of the thread that runs
inline std::vector<std::unique_ptr<Block>> cluster;       // by rank

inline void yield() { swapcontext(&block->fibers[block->current].context, &block->scheduler); }

inline void run_fiber() {
  block->body();
  block->fibers[block->current].done = true;
  yield();
}

inline Warp& warp() { return block->warps[block->current / 32]; }
inline int lane() { return static_cast<int>(block->current % 32); }

// Where this lane writes before the next meeting, and reads after it.
inline Table& table() { return warp().tables[block->fibers[block->current].meetings % 2]; }

// Every lane of the warp must come here; returns the table that they wrote.
inline const Table& warp_meets() {
  Warp& w = warp();
  const Table& shown = table();
  ++block->fibers[block->current].meetings;
  const uint64_t generation = w.generation;
  if (++w.arrived == 32) {
    w.arrived = 0;
    ++w.generation;
  } else {
    while (w.generation == generation) yield();
  }
  return shown;
}

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("emulated GPU: %s\n", what);
  std::exit(1);
}

inline Fiber& fiber() { return block->fibers[block->current]; }

inline void wait(Waits what) {
  fiber().waits = what;
  yield();
}

// Do all groups of work but the last `pending`; without groups (-1), everything.
inline void finish(Work& work, int pending) {
  int groups = 0;
  for (const auto& one : work) groups += !one;
  size_t done = 0;
  for (int left = pending < 0 ? groups + 1 : groups - pending; left > 0 && done < work.size(); ++done)
    if (work[done])
      work[done]();
    else
      --left;
  work.erase(work.begin(), work.begin() + static_cast<int64_t>(done));
}

// A warp runs until all its lanes wait for others or are done, which lets warps drift as far apart as they may; the first
// warp leads, or the last.
inline bool run_warps(Block& now, size_t& left, bool backwards) {
  bool moved = false;
  block = &now;
  blockIdx = now.place;
  for (size_t turn = 0; turn < now.warps.size(); ++turn) {
    const size_t w = backwards ? now.warps.size() - 1 - turn : turn;
    for (bool again = true; again;) {
      again = false;
      for (size_t i = 32 * w; i < 32 * w + 32; ++i) {
        Fiber& one = now.fibers[i];
        if (one.done || one.waits != Waits::kNot) continue;
        now.current = i;
        threadIdx = Place{static_cast<unsigned>(i), 0, 0};
        one.polls = false;
        swapcontext(&now.scheduler, &one.context);
        moved = moved || !one.polls;
        if (one.done) --left;
        again = again || !(one.done || one.polls || one.waits != Waits::kNot);
      }
    }
  }
  return moved;
}

// Where all of them wait for the same, let them go on.
inline bool release(const std::vector<Fiber*>& fibers, Waits what) {
  size_t waiting = 0;
  for (const Fiber* one : fibers) waiting += one->waits == what;
  if (waiting < fibers.size()) return false;
  for (Fiber* one : fibers) one->waits = Waits::kNot;
  return true;
}

// Run `body` on every thread of every block; blocks in the given order, each `cluster_size` of them together.
inline void launch(const std::vector<Place>& order, Place grid, unsigned threads, size_t shared_bytes,
                   const std::function<void()>& body, size_t cluster_size = 1) {
  gridDim = grid;
  static bool backwards = true;  // every other launch
  backwards = !backwards;
  static std::vector<std::unique_ptr<char[]>> stacks;  // kept from launch to launch: fresh pages cost more than the kernels
  while (stacks.size() < threads * cluster_size) stacks.emplace_back(new char[kStack]);
  for (size_t first = 0; first < order.size(); first += cluster_size) {
    cluster.clear();
    std::vector<Fiber*> all;
    for (size_t rank = 0; rank < cluster_size; ++rank) {
      cluster.push_back(std::make_unique<Block>());
      Block& now = *cluster.back();
      now.place = order[first + rank];
      now.fibers.resize(threads);
      now.warps.resize(threads / 32);
      now.shared.assign(shared_bytes, 0xa5);  // nothing may rely on zeros
      now.body = body;
      for (size_t i = 0; i < threads; ++i) {
        Fiber& one = now.fibers[i];
        getcontext(&one.context);
        one.context.uc_stack.ss_sp = stacks[rank * threads + i].get();
        one.context.uc_stack.ss_size = kStack;
        one.context.uc_link = nullptr;
        makecontext(&one.context, run_fiber, 0);
        all.push_back(&one);
      }
    }
    for (size_t left = all.size(); left > 0;) {
      bool moved = false;
      for (auto& now : cluster) {
        moved = run_warps(*now, left, backwards) || moved;
        if (std::all_of(now->fibers.begin(), now->fibers.end(), [](const Fiber& one) { return one.done; }))
          std::fill(now->shared.begin(), now->shared.end(), uint8_t{0x5a});  // a block that is over has no memory left
        std::vector<Fiber*> own;
        for (Fiber& one : now->fibers) own.push_back(&one);
        moved = release(own, Waits::kBlock) || moved;
      }
      moved = release(all, Waits::kCluster) || moved;
      require(moved, "no thread can go on: a barrier that not every thread reaches");
    }
    for (const Fiber* one : all)
      require(one->products.empty(), "a product that nobody has waited for");
  }
  block = nullptr;
}

}  // namespace emulated

inline uint8_t* dynamic_shared() { return emulated::block->shared.data(); }
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - dynamic_shared());
}

inline void block_barrier(int) { emulated::wait(emulated::Waits::kBlock); }

inline void copy16(void* to, const void* from, int bytes) {
  emulated::require(reinterpret_cast<uintptr_t>(to) % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0,
                    "a copy of 16 bytes that is not aligned");
  emulated::fiber().copies.push_back([=] {
    std::memset(to, 0, 16);
    std::memcpy(to, from, static_cast<size_t>(bytes));
  });
  if (!emulated::late) {
    emulated::fiber().copies.back()();
    emulated::fiber().copies.pop_back();
  }
}
inline void close_copies() { emulated::fiber().copies.push_back(nullptr); }
template <int kLater>
void wait_for_copies() {
  emulated::finish(emulated::fiber().copies, kLater);
}

template <class V>
V read(const void* p, int64_t byte = 0) {
  const uint8_t* const at = static_cast<const uint8_t*>(p) + byte;
  emulated::require(reinterpret_cast<uintptr_t>(at) % sizeof(V) == 0, "a load that is not aligned");
  V value;
  std::memcpy(&value, at, sizeof(V));
  return value;
}
inline void prefetch(const void* p) { read<uint32_t>(p); }
inline uint4 load_once16(const void* p) { return read<uint4>(p); }
inline uint2 load_once8(const void* p) { return read<uint2>(p); }
inline uint32_t load_word(const void* p, int64_t byte) { return read<uint32_t>(p, byte); }
inline uint32_t load_half(const void* p, int64_t byte) { return read<uint16_t>(p, byte); }
inline uint32_t load_byte(const void* p, int64_t byte) { return read<uint8_t>(p, byte); }
inline void load_shared_floats(float v[4], const float* p) {
  emulated::require(reinterpret_cast<uintptr_t>(p) % 16 == 0, "a load that is not aligned");
  std::memcpy(v, p, 16);
}

inline void load_matrices(uint32_t v[4], uint32_t address) {
  emulated::require(address % 16 == 0 && address + 16 <= emulated::block->shared.size(), "ldmatrix out of bounds");
  emulated::table().b[emulated::lane()][0] = address;
  const emulated::Table& shown = emulated::warp_meets();
  for (int m = 0; m < 4; ++m)
    std::memcpy(&v[m], dynamic_shared() + shown.b[m * 8 + emulated::lane() / 4][0] + emulated::lane() % 4 * 4, 4);
}

template <class T>
float half_value(uint32_t pair, int i) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * i));
  return T::kWide ? half_to_float(bits) : bfloat_to_float(bits);
}

// Lane (g, t) holds A rows g, g + 8 at k = 2t, 2t + 1, 2t + 8, 2t + 9; B of column g at the same k; C of columns 2t, 2t + 1.
template <class T>
void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1, T) {
  const int lane = emulated::lane();
  std::memcpy(emulated::table().a[lane], a, 16);
  emulated::table().b[lane][0] = b0, emulated::table().b[lane][1] = b1;
  const emulated::Table& shown = emulated::warp_meets();
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int high = k / 8, t = k % 8 / 2, half = k % 2;
      const uint32_t* from = shown.a[lane / 4 * 4 + t];
      sum += static_cast<double>(half_value<T>(from[(i >= 2 ? 1 : 0) + 2 * high], half)) *
             half_value<T>(shown.b[(lane % 4 * 2 + i % 2) * 4 + t][high], half);
    }
    c[i] = static_cast<float>(sum);
  }
}

inline uint32_t shuffle(uint32_t value, int lane) {
  emulated::table().b[emulated::lane()][0] = value;
  return emulated::warp_meets().b[lane & 31][0];
}

inline uint32_t uniform(uint32_t value) {
  const uint32_t first = shuffle(value, 0);
  emulated::require(first == value, "lanes differ where they must not");
  return first;
}
inline uint32_t quad_shuffle(uint32_t value, int r) { return shuffle(value, emulated::lane() / 4 * 4 + r); }
template <class V>
V kept(V value) {
  return value;
}

inline int warp_index() { return static_cast<int>(threadIdx.x / 32); }
inline void warp_barrier() { emulated::warp_meets(); }
inline uint32_t increment_released(uint32_t* p) { return (*p)++; }
inline void wait_for_previous_kernel() {}
// 16 bits each of a meeting: arrivals still to come, arrivals of every meeting, meetings that are over.
inline void init_meeting(uint64_t* meeting, uint32_t arrivals) { *meeting = arrivals | arrivals << 16; }
inline void arrive(uint64_t* meeting) {
  emulated::warp_meets();
  if (emulated::lane() > 0) return;
  emulated::require((*meeting & 0xffff) > 0, "an arrival at no meeting");
  if ((--*meeting & 0xffff) == 0) *meeting += (*meeting >> 16 & 0xffff) + (uint64_t{1} << 32);
}
inline void wait_for_meeting(const uint64_t* meeting, uint32_t parity) {
  while ((*static_cast<const volatile uint64_t*>(meeting) >> 32 & 1) == parity) {
    emulated::fiber().polls = true;
    emulated::yield();
  }
  emulated::warp_meets();
}
inline uint32_t count_in(uint32_t* count) {
  if (emulated::lane() == 0) emulated::table().b[0][0] = (*count)++;
  return emulated::warp_meets().b[0][0];
}
inline float word_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_word(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float half_to_float32(uint16_t bits) { return half_to_float(bits); }
template <class T>
uint16_t float_to_bits(float value) {
  return T::kWide ? float_to_half(value) : float_to_bfloat(value);
}
template <class T>
uint32_t float_pair_to_bits(float low, float high) {
  return float_to_bits<T>(low) | static_cast<uint32_t>(float_to_bits<T>(high)) << 16;
}
inline uint32_t pick_bytes(uint32_t value, uint32_t selector) {
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) picked |= static_cast<uint32_t>(uint64_t{value} >> (selector >> 4 * i & 7) * 8 & 255u) << 8 * i;
  return picked;
}
inline float fused(float a, float b, float c) {
  return static_cast<float>(static_cast<double>(a) * b + c);
}

}  // namespace packed
}  // namespace discquant
