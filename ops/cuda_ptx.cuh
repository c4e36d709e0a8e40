// What CUDA C++ has no words for.
#pragma once

#include <cuda_runtime.h>

namespace msda {
namespace {

// 16 bytes, zeros for a negative number. The load is predicated, not jumped over, so that several are in flight.
__device__ __forceinline__ uint4 load_16_bytes_or_zeros(const void* source, int number) {
  uint4 bits = make_uint4(0, 0, 0, 0);
  asm("{\n\t.reg .pred inside;\n\t"
      "setp.ge.s32 inside, %5, 0;\n\t"
      "@inside ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)
      : "l"(__cvta_generic_to_global(source)), "r"(number));
  return bits;
}

// Adds to four neighbouring numbers: at once on compute capability 9.0, one by one before.
__device__ __forceinline__ void add_4(float* target, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
#else
  asm volatile("red.global.add.f32 [%0], %1;\n\t"
               "red.global.add.f32 [%0 + 4], %2;\n\t"
               "red.global.add.f32 [%0 + 8], %3;\n\t"
               "red.global.add.f32 [%0 + 12], %4;"
#endif
               :
               : "l"(__cvta_generic_to_global(target)), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

// The same pointer, computed here and not once more where it is used.
__device__ __forceinline__ float* computed_here(float* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

}  // namespace
}  // namespace msda
