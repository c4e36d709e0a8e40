// What cpu.cpp asks of the CPU kernels. cpu_kernels.cpp implements it once per instruction set.
#pragma once

#include "problem.h"

namespace msda {

// A slice is one head of one image, number batch * heads + head. Its value is packed into rows of `width` numbers of
// the accumulation type (float; double for f64), followed by one row of zeros, which stands for all that lies outside.
// Rows and scratch begin at multiples of kAlignment bytes.
struct Kernels {
  const char* name;
  int64_t number_bytes;  // of the accumulation type
  int64_t (*width)(const Problem&);          // numbers in a row: the channels, rounded up to whole vectors
  int64_t (*scratch_bytes)(const Problem&);  // of the private scratch that the functions below need
  void (*pack)(const Problem&, int64_t slice, int64_t begin, int64_t end, void* rows);
  void (*unpack)(const Problem&, int64_t slice, int64_t begin, int64_t end, const void* grad_rows);
  void (*forward)(const Problem&, int64_t slice, int64_t begin, int64_t end, const void* rows, void* scratch);
  // All queries of a slice, restricted to band `band` of `bands` (bands of lines of each level): the corners in the band
  // receive their gradient in `grad_rows`, and points whose upper line is in the band the gradient of location and
  // attention weight; those of a level without lines belong to band 0. Row `keys + band` of `grad_rows` takes what belongs to no pixel of the band.
  void (*backward)(const Problem&, int64_t slice, int64_t band, int64_t bands, const void* rows, void* grad_rows,
                   void* scratch);
  // Of the fused form, after `backward` of all bands: makes gradients of logits of those of the attention weights.
  void (*softmax_backward)(const Problem&, int64_t slice, int64_t begin, int64_t end, void* scratch);
};

constexpr int64_t kAlignment = 64;

const Kernels& baseline_kernels(bool f64);
#if defined(__x86_64__)
const Kernels& avx2_kernels(bool f64);
const Kernels& avx512_kernels(bool f64);
#endif

}  // namespace msda
