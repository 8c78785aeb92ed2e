// SPDX-License-Identifier: Apache-2.0
// What the C++ tests share: a check that ends the program, and numbers that are the same on every machine.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                \
  do {                                                                  \
    if (!(condition)) {                                                 \
      std::printf("line %d: %s does not hold\n", __LINE__, #condition); \
      std::exit(1);                                                     \
    }                                                                   \
  } while (0)

static uint32_t state = 12345;
static uint32_t random_word() {
  state = state * 1664525u + 1013904223u;
  return state ^ (state >> 15);
}
