// SPDX-License-Identifier: Apache-2.0
// What this binary was compiled for and what this processor can run. No torch header: see bindings.cpp.
#include "build_facts.h"

#include <sstream>

#include "packed/cpu_linear.h"

namespace discquant {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> archs;
  std::istringstream list(DISCQUANT_CUDA_ARCHS);
  for (std::string arch; std::getline(list, arch, ',');) {
    archs.push_back(arch);
  }
  return archs;
}

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> found;
#if defined(__x86_64__)
  // The builtin also asks the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  found["avx2"] = __builtin_cpu_supports("avx2");
  found["fma"] = __builtin_cpu_supports("fma");
  found["avx512f"] = __builtin_cpu_supports("avx512f");
  found["avx512bw"] = __builtin_cpu_supports("avx512bw");
  found["avx512dq"] = __builtin_cpu_supports("avx512dq");
  found["avx512vl"] = __builtin_cpu_supports("avx512vl");
  found["avx512_vnni"] = __builtin_cpu_supports("avx512vnni");
  found["avx512_bf16"] = __builtin_cpu_supports("avx512bf16");
  found["amx_int8"] = packed::has_isa(packed::Isa::kAmx);  // a process must ask Linux for it
#endif
  return found;
}

}  // namespace discquant
