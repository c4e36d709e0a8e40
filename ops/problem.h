// One call of the operator as plain pointers and sizes: what operator.cpp hands to the CPU and the CUDA kernels, which
// therefore know nothing of PyTorch.
#pragma once

#include <cstdint>

namespace msda {

enum class Type { f32, f64, f16, bf16 };

// One call of the operator. All tensors are contiguous, except for `reference`.
// Plain form: `locations` in [0, 1] and attention `weights`, `reference` null.
// Fused form: `locations` are offsets in pixels from the reference points, `weights` are logits.
struct Problem {
  int64_t batch, keys, heads, channels, queries, levels, points;
  Type value_type, point_type;  // of value, output, gradients of both; of locations and their gradient, weights
  const void* value;            // (batch, keys, heads, channels)
  const int64_t* shapes;        // (levels, 2): height, width
  const int64_t* starts;        // (levels)
  const void* locations;        // (batch, queries, heads, levels, points, 2): x, y
  const void* weights;          // (batch, queries, heads, levels, points)
  const void* reference;        // (batch, queries, levels, 2): x, y, in the accumulation type: float; double for f64
  int64_t reference_strides[3];
  const void* grad_output;  // backward: (batch, queries, heads * channels)
  void* output;                // forward
  void* grad_value;
  void* grad_locations;
  void* grad_weights;  // in the accumulation type

  int64_t samples() const { return levels * points; }
};

void cpu_forward(const Problem& problem);
void cpu_backward(const Problem& problem);
const char* cpu_instructions();  // the instruction set that this machine's processor will use

// On the current device. `grad_value` of the problem points to zeros in the accumulation type.
void cuda_forward(const Problem& problem, void* stream);
void cuda_backward(const Problem& problem, bool deterministic, void* stream);

}  // namespace msda
