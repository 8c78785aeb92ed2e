// SPDX-License-Identifier: Apache-2.0
// The solver's elementwise kernels compiled for one instruction set (see setup.py for the flags of this file's name).
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
// Before every include: no fused multiply-adds, no errno from square roots, no floating-point exceptions.
#pragma GCC optimize("fp-contract=off", "no-math-errno", "no-trapping-math")
#endif
#include "solver/state_rows.h"

namespace discquant {
namespace solver {

StateKernels kernels_scalar() { return StateKernels{step_rows, weight_rows}; }

}  // namespace solver
}  // namespace discquant
