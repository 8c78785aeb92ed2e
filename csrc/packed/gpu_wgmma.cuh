// SPDX-License-Identifier: Apache-2.0
// Clusters (sm_90) and warpgroup products (sm_90a). Compiled with DISCQUANT_EMULATE, tests/packed/gpu_emulator_wgmma.h
// gives the same functions on the host.
#pragma once

#include "packed/gpu_primitives.cuh"

#if defined(DISCQUANT_EMULATE)
#include "gpu_emulator_wgmma.h"
#else

namespace discquant {
namespace packed {

// What this thread has waited for of its copies may be read by wgmma, which reads through the asynchronous proxy.
__device__ __forceinline__ void show_copies_to_wgmma() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before the first wgmma after registers were written that it reads.
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler does not know that wgmma reads and writes registers until it has been waited for: what lies in `v` stays
// in its register until here.
__device__ __forceinline__ void keep(float& v) { asm volatile("" : "+f"(v)::"memory"); }
__device__ __forceinline__ void keep(uint32_t& v) { asm volatile("" : "+r"(v)::"memory"); }

#define DISCQUANT_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define DISCQUANT_32(d, i) DISCQUANT_8(d, i), DISCQUANT_8(d, i + 8), DISCQUANT_8(d, i + 16), DISCQUANT_8(d, i + 24)
#define DISCQUANT_NAMES_32                                                                                     \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
  "%29,%30,%31"
#define DISCQUANT_NAMES_64                                                                                        \
  DISCQUANT_NAMES_32                                                                                              \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
#define DISCQUANT_WGMMA_64(type)                                                                           \
  asm volatile("{.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." type     \
               " {" DISCQUANT_NAMES_32 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;}"                            \
               : DISCQUANT_32(d, 0)                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define DISCQUANT_WGMMA_128(type)                                                                          \
  asm volatile("{.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type    \
               " {" DISCQUANT_NAMES_64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 0;}"                            \
               : DISCQUANT_32(d, 0), DISCQUANT_32(d, 32)                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d[64 rows of the warpgroup][kColumns] += a b of 16 k, asynchronously. Each warp holds 16 rows, of `a` and `d` as
// mma.m16n8k16 has them; d[4j..4j+3] are columns 8j..8j+7.
template <class T>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, T) {
  if constexpr (T::kWide)
    DISCQUANT_WGMMA_64("f16.f16");
  else
    DISCQUANT_WGMMA_64("bf16.bf16");
}
template <class T>
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, T) {
  if constexpr (T::kWide)
    DISCQUANT_WGMMA_128("f16.f16");
  else
    DISCQUANT_WGMMA_128("bf16.bf16");
}

// All threads of the cluster; what they wrote to shared memory before is seen by all after it. Not called where there are
// no clusters.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// 16 bytes of the shared memory of the cluster's thread block `rank`, at the place that `address` has here; of one's own
// where there are no clusters.
__device__ __forceinline__ uint4 load_peer16(uint32_t address, int rank) {
  uint4 v;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .u32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [there];}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(address), "r"(rank)
      : "memory");
#else
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
#endif
  return v;
}

}  // namespace packed
}  // namespace discquant
#endif
