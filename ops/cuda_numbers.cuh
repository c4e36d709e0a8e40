// Number types of the CUDA kernels, and how they move: packs of neighbouring numbers, sums added to a row of a gradient.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda_ptx.cuh"
#include "problem.h"

namespace msda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

template <typename T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <typename T>
using AccumulationOf = typename Accumulation<T>::type;

__device__ __forceinline__ float to_float(float number) { return number; }
__device__ __forceinline__ double to_float(double number) { return number; }
__device__ __forceinline__ float to_float(__half number) { return __half2float(number); }
__device__ __forceinline__ float to_float(__nv_bfloat16 number) { return __bfloat162float(number); }

template <typename T>
struct From {
  static __device__ __forceinline__ T number(T number) { return number; }
};
template <>
struct From<__half> {
  static __device__ __forceinline__ __half number(float number) { return __float2half_rn(number); }
};
template <>
struct From<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 number(float number) { return __float2bfloat16_rn(number); }
};

// V neighbouring numbers, moved by one instruction where they fill at most 16 bytes.
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T number[V];
};

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* source) {
  return *reinterpret_cast<const Pack<T, V>*>(source);
}

template <typename T, int V, typename A>
__device__ __forceinline__ void store(T* target, const A (&numbers)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.number[v] = From<T>::number(numbers[v]);
  *reinterpret_cast<Pack<T, V>*>(target) = pack;
}

template <typename T, int V>
__device__ __forceinline__ void unpack(const Pack<T, V>& pack, float (&numbers)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) numbers[v] = to_float(pack.number[v]);
}

// A bfloat16 number is the upper half of a float; the library's conversion takes an instruction more for every second one.
template <int V>
__device__ __forceinline__ void unpack(const Pack<__nv_bfloat16, V>& pack, float (&numbers)[V]) {
  const unsigned* pairs = reinterpret_cast<const unsigned*>(pack.number);
#pragma unroll
  for (int v = 0; v < V; v += 2) {
    numbers[v] = __uint_as_float(pairs[v / 2] << 16);
    numbers[v + 1] = __uint_as_float(pairs[v / 2] & 0xFFFF0000u);
  }
}

// Pack number `pack` of value, counted from `base`; zeros for a negative number.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* base, int pack) {
  static_assert(sizeof(Pack<T, V>) == 16, "one load");
  Pack<T, V> numbers;
  const Pack<T, V>* source = reinterpret_cast<const Pack<T, V>*>(base) + static_cast<unsigned>(pack);
  reinterpret_cast<uint4&>(numbers) = load_16_bytes_or_zeros(source, pack);
  return numbers;
}

// Adds V sums to the same pack of the gradient, to which other threads add as well.
template <int V>
__device__ __forceinline__ void add_to_pack(float* base, int pack, const float (&sums)[V]) {
  static_assert(V % 4 == 0, "four at a time");
  float* target = reinterpret_cast<Pack<float, V>*>(base)[static_cast<unsigned>(pack)].number;
#pragma unroll
  for (int v = 0; v < V; v += 4) add_4(target + v, sums[v], sums[v + 1], sums[v + 2], sums[v + 3]);
}

template <typename A>
__device__ __forceinline__ A group_sum(A number, int lanes) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) number += __shfl_xor_sync(kAllLanes, number, step);
  return number;
}

__device__ __forceinline__ float group_max(float number, int lanes) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) number = fmaxf(number, __shfl_xor_sync(kAllLanes, number, step));
  return number;
}

// Rows of one head of one image: row r begins at rows(...) + r * heads * channels.
template <typename T>
__device__ __forceinline__ T* rows(T* tensor, const Problem& p, int64_t image, int head) {
  return tensor + (image * p.keys * p.heads + head) * p.channels;
}

}  // namespace
}  // namespace msda
