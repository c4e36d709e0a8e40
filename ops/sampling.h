// The mathematics of one sampling point, shared by the CPU and the CUDA kernels, so that the tests of one cover the other.
// No branches, not even those of && and ||, so that compilers put loops over points into vectors.
// Deformable DETR (https://arxiv.org/abs/2010.04159): bilinear sampling, zeros outside, align_corners=False.
//
// Along an axis of `size` pixels a point lies at  pixel = location * size + shift,  where pixel 0 is the centre of the
// first one. Plain form: location in [0, 1], shift = -0.5. Fused form: location = reference point, shift = offset - 0.5.
#pragma once

#if defined(__CUDACC__)
#define MSDA_INLINE __host__ __device__ __forceinline__
#else
#define MSDA_INLINE inline __attribute__((always_inline))
#endif

namespace msda {
namespace {

template <typename A>
struct AxisPoint {
  int low;     // the pixel at or below the point; low + 1 is the one above
  A fraction;  // 0 <= fraction < 1: the point lies at low + fraction
};

// A point further than one pixel from the axis, infinite or NaN touches no pixel: low = -2.
// The fraction is taken from the inputs a second time, so that it does not inherit the rounding of a large coordinate.
template <typename A>
MSDA_INLINE AxisPoint<A> locate(A location, A shift, int size) {
  const A extent = static_cast<A>(size);
  const A pixel = location * extent + shift;
  const bool near = (pixel >= A(-1)) & (pixel < extent);
  const A safe = near ? pixel : A(-2);
  int low = static_cast<int>(safe);
  low -= safe < static_cast<A>(low) ? 1 : 0;
  const A fraction = location * extent + (shift - static_cast<A>(low));
  return {low, near ? fraction : A(0)};
}

// Corners are numbered row by row: 0 and 1 on line y.low, 2 and 3 on line y.low + 1.
template <typename A>
MSDA_INLINE void corner_weights(const AxisPoint<A>& x, const AxisPoint<A>& y, A scale, A weight[4]) {
  const A upper = scale * (A(1) - y.fraction), lower = scale * y.fraction;
  weight[0] = upper * (A(1) - x.fraction);
  weight[1] = upper * x.fraction;
  weight[2] = lower * (A(1) - x.fraction);
  weight[3] = lower * x.fraction;
}

MSDA_INLINE bool in_level(int x, int y, int width, int height) {
  return (x >= 0) & (x < width) & (y >= 0) & (y < height);
}

template <typename A>
struct PointGradient {
  A weight;  // by the attention weight
  A x, y;    // by the pixel coordinates
};

// dot[i] = <gradient of the output, value at corner i>, zero for a corner outside the level.
template <typename A>
MSDA_INLINE PointGradient<A> point_gradient(const AxisPoint<A>& x, const AxisPoint<A>& y, A attention, const A dot[4]) {
  const A top = dot[0] + (dot[1] - dot[0]) * x.fraction;
  const A bottom = dot[2] + (dot[3] - dot[2]) * x.fraction;
  const A across = (dot[1] - dot[0]) * (A(1) - y.fraction) + (dot[3] - dot[2]) * y.fraction;
  return {top + (bottom - top) * y.fraction, attention * across, attention * (bottom - top)};
}

}  // namespace
}  // namespace msda
