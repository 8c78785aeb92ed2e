// SPDX-License-Identifier: Apache-2.0
// The Python module discquant._C: build facts only. Tensor operators register themselves with the dispatcher
// (STABLE_TORCH_LIBRARY_IMPL in their own files) and need no binding here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_facts.h"

PYBIND11_MODULE(DISCQUANT_EXTENSION_NAME, module) {
  module.doc() = "Compiled part of discquant: build facts and, registered with torch, the C++ and CUDA operators.";
  module.def("build_facts", [] {
    pybind11::dict facts;
    facts["compiler"] = discquant::compiler();
    facts["cuda_architectures"] = discquant::cuda_architectures();
    facts["cpu_features"] = discquant::cpu_features();
    facts["layout_version"] = discquant::kLayoutVersion;
    facts["torch_target_version"] = static_cast<unsigned long long>(DISCQUANT_TORCH_TARGET);
    return facts;
  });
}
