// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <string>
#include <vector>

namespace discquant {

// Version of the packed weight layout that the kernels of this binary read; a packed buffer made for another is refused.
inline constexpr int kLayoutVersion = 1;

std::string compiler();
// As nvcc names them ("90a"); empty in a CPU build.
std::vector<std::string> cuda_architectures();
// Names as /proc/cpuinfo spells them; empty on processors other than x86-64.
std::map<std::string, bool> cpu_features();

}  // namespace discquant
