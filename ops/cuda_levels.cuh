// The levels as the CUDA kernels read them.
#pragma once

#include <cuda_runtime.h>

#include "problem.h"

namespace msda {
namespace {

struct alignas(16) Level {
  int height, width, start;
  int number;
};

// A level that reaches beyond value would read foreign memory: it ends the kernel, which CUDA reports as a failed launch
// (an assertion would cost registers).
__device__ __forceinline__ Level read_level(const Problem& p, int l) {
  const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1], start = p.starts[l];
  const bool fits_value = height >= 0 && width >= 0 && height <= p.keys && width <= p.keys && start >= 0 &&
                          start <= p.keys - height * width;
  if (!fits_value) __trap();
  return {static_cast<int>(height), static_cast<int>(width), static_cast<int>(start), l};
}

}  // namespace
}  // namespace msda
