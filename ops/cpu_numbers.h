// Runs of float32, float64, float16 and bfloat16 numbers to and from the accumulation type. IEEE 754 from its definition,
// without branches, so that compilers vectorise the loops; rounding is to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu_kernels.h"

namespace msda {
namespace {

inline float as_float(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline uint32_t as_bits(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

inline float from_bf16(uint16_t half) { return as_float(static_cast<uint32_t>(half) << 16); }

inline uint16_t to_bf16(float number) {
  const uint32_t bits = as_bits(number);
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded >> 16);
}

inline float from_f16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7F800000u;                                          // infinity, NaN
  const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);  // exact
  const uint32_t bits = magnitude < 0x0400u ? subnormal : magnitude < 0x7C00u ? normal : special;
  return as_float(sign | bits);
}

inline uint16_t to_f16(float number) {
  const uint32_t bits = as_bits(number), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // the unit in the last place of 0.5 is 2^-24
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return static_cast<uint16_t>(sign | half);
}

// `count` numbers of `type` from element `offset` of `source` on.
template <typename A>
inline void load(const void* source, Type type, int64_t offset, int64_t count, A* __restrict target) {
  switch (type) {
    case Type::f32: {
      const float* from = static_cast<const float*>(source) + offset;
      for (int64_t i = 0; i < count; ++i) target[i] = static_cast<A>(from[i]);
      return;
    }
    case Type::f64: {
      const double* from = static_cast<const double*>(source) + offset;
      for (int64_t i = 0; i < count; ++i) target[i] = static_cast<A>(from[i]);
      return;
    }
    case Type::f16: {
      const uint16_t* from = static_cast<const uint16_t*>(source) + offset;
      for (int64_t i = 0; i < count; ++i) target[i] = static_cast<A>(from_f16(from[i]));
      return;
    }
    case Type::bf16: {
      const uint16_t* from = static_cast<const uint16_t*>(source) + offset;
      for (int64_t i = 0; i < count; ++i) target[i] = static_cast<A>(from_bf16(from[i]));
      return;
    }
  }
}

template <typename A>
inline void store(const A* __restrict source, int64_t count, void* target, Type type, int64_t offset) {
  switch (type) {
    case Type::f32: {
      float* to = static_cast<float*>(target) + offset;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(source[i]);
      return;
    }
    case Type::f64: {
      double* to = static_cast<double*>(target) + offset;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<double>(source[i]);
      return;
    }
    case Type::f16: {
      uint16_t* to = static_cast<uint16_t*>(target) + offset;
      for (int64_t i = 0; i < count; ++i) to[i] = to_f16(static_cast<float>(source[i]));
      return;
    }
    case Type::bf16: {
      uint16_t* to = static_cast<uint16_t*>(target) + offset;
      for (int64_t i = 0; i < count; ++i) to[i] = to_bf16(static_cast<float>(source[i]));
      return;
    }
  }
}

}  // namespace
}  // namespace msda
