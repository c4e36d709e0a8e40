// The kernels for what the vector kernels do not take: float64, channels that are not a multiple of 16 bytes, very many
// channels or points. A warp serves one query and head and walks over the channels, one number per lane.
#pragma once

#include "cuda_levels.cuh"
#include "cuda_numbers.cuh"
#include "problem.h"
#include "sampling.h"

namespace msda {
namespace {

constexpr int kThreads = 256, kBlocksPerMultiprocessor = 2;

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// Copies the levels to shared memory.
__device__ __forceinline__ void read_levels(const Problem& p, Level* levels) {
  for (int l = threadIdx.x; l < p.levels; l += blockDim.x) levels[l] = read_level(p, l);
  __syncthreads();
}

// The sampling points of one query and head: C is their type in memory, A the accumulation type.
template <typename C, typename A, bool Fused>
struct Points {
  const C *locations, *weights;
  const A* reference;
  int64_t reference_stride;
  A largest, scale;  // of the softmax

  __device__ Points(const Problem& p, int64_t image, int64_t query, int64_t pair) {
    const int count = static_cast<int>(p.levels * p.points);
    locations = static_cast<const C*>(p.locations) + pair * count * 2;
    weights = static_cast<const C*>(p.weights) + pair * count;
    if constexpr (Fused) {
      const int64_t* stride = p.reference_strides;
      reference = static_cast<const A*>(p.reference) + image * stride[0] + query * stride[1];
      reference_stride = stride[2];
    }
  }

  // Before the first call of `attention`.
  __device__ __forceinline__ void prepare(int count) {
    if constexpr (!Fused) return;
    largest = to_float(weights[0]);
    for (int k = 1; k < count; ++k) {
      const A logit = to_float(weights[k]);
      largest = logit > largest ? logit : largest;
    }
    A total = 0;
    for (int k = 0; k < count; ++k) total += exponential(to_float(weights[k]) - largest);
    scale = A(1) / total;
  }

  __device__ __forceinline__ A attention(int k) const {
    const A number = to_float(weights[k]);
    if constexpr (Fused) return exponential(number - largest) * scale;
    return number;
  }

  __device__ __forceinline__ void locate_point(int k, const Level& level, AxisPoint<A>& x, AxisPoint<A>& y) const {
    const Pack<C, 2> pair = load<C, 2>(locations + 2 * k);
    const A px = to_float(pair.number[0]), py = to_float(pair.number[1]);
    if constexpr (Fused) {
      const A* centre = reference + level.number * reference_stride;
      x = locate<A>(centre[0], px - A(0.5), level.width);
      y = locate<A>(centre[1], py - A(0.5), level.height);
    } else {
      x = locate<A>(px, A(-0.5), level.width);
      y = locate<A>(py, A(-0.5), level.height);
    }
  }
};

// One point as a warp sees it: its corners' rows of value, -1 outside the level.
template <typename A>
struct Sample {
  AxisPoint<A> x, y;
  A attention;
  int row[4];

  template <typename C, bool Fused>
  __device__ __forceinline__ Sample(const Points<C, A, Fused>& points, int k, const Level& level) {
    points.locate_point(k, level, x, y);
    attention = points.attention(k);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int cx = x.low + corner % 2, cy = y.low + corner / 2;
      row[corner] = in_level(cx, cy, level.width, level.height) ? level.start + cy * level.width + cx : -1;
    }
  }
};

// The query and head of a warp.
struct WarpPlace {
  int64_t pair, image, query;
  int head, lane;
  bool exists;

  __device__ explicit WarpPlace(const Problem& p) {
    pair = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    const int64_t line = pair / p.heads;
    head = static_cast<int>(pair - line * p.heads);
    image = line / p.queries;
    query = line - image * p.queries;
    exists = image < p.batch;
  }
};

template <typename T, typename C, bool Fused>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    general_forward_kernel(const __grid_constant__ Problem p) {
  using A = AccumulationOf<T>;
  extern __shared__ uint4 shared[];
  Level* levels = reinterpret_cast<Level*>(shared);
  read_levels(p, levels);
  const WarpPlace place(p);
  if (!place.exists) return;
  Points<C, A, Fused> points(p, place.image, place.query, place.pair);
  points.prepare(static_cast<int>(p.levels * p.points));
  const int64_t stride = p.heads * p.channels;
  for (int channel = place.lane; channel < p.channels; channel += kWarp) {
    const T* value = rows(static_cast<const T*>(p.value), p, place.image, place.head) + channel;
    A total = 0;
    for (int l = 0, k = 0; l < p.levels; ++l) {
      for (int i = 0; i < p.points; ++i, ++k) {
        const Sample<A> sample(points, k, levels[l]);
        A weight[4];
        corner_weights(sample.x, sample.y, sample.attention, weight);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          const int row = sample.row[corner];
          total += weight[corner] * (row >= 0 ? A(to_float(value[row * stride])) : A(0));
        }
      }
    }
    static_cast<T*>(p.output)[place.pair * p.channels + channel] = From<T>::number(total);
  }
}

// The gradient of a point, all channels of the warp; with `scatter`, also of value.
template <typename T, typename A>
__device__ __forceinline__ PointGradient<A> point_backward(const Problem& p, const WarpPlace& place, const Sample<A>& sample,
                                                           bool scatter) {
  const int64_t stride = p.heads * p.channels;
  const T* value = rows(static_cast<const T*>(p.value), p, place.image, place.head);
  A* grad_value = rows(static_cast<A*>(p.grad_value), p, place.image, place.head);
  A weight[4], dot[4] = {};
  corner_weights(sample.x, sample.y, sample.attention, weight);
  for (int channel = place.lane; channel < p.channels; channel += kWarp) {
    const A gradient = to_float(static_cast<const T*>(p.grad_output)[place.pair * p.channels + channel]);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if (sample.row[corner] < 0) continue;
      const int64_t at = sample.row[corner] * stride + channel;
      dot[corner] += gradient * A(to_float(value[at]));
      if (scatter) atomicAdd(grad_value + at, weight[corner] * gradient);
    }
  }
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) dot[corner] = group_sum(dot[corner], kWarp);
  return point_gradient(sample.x, sample.y, sample.attention, dot);
}

// Gradients of locations and weights, and with `scatter` of value by atomic addition.
template <typename T, typename C, bool Fused>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    general_backward_kernel(const __grid_constant__ Problem p, bool scatter) {
  using A = AccumulationOf<T>;
  extern __shared__ uint4 shared[];
  Level* levels = reinterpret_cast<Level*>(shared);
  read_levels(p, levels);
  const WarpPlace place(p);
  if (!place.exists) return;
  const int count = static_cast<int>(p.levels * p.points);
  Points<C, A, Fused> points(p, place.image, place.query, place.pair);
  points.prepare(count);
  C* grad_locations = static_cast<C*>(p.grad_locations) + 2 * place.pair * count;
  A* grad_weights = static_cast<A*>(p.grad_weights) + place.pair * count;

  A mean = 0;  // of the gradients of the weights, which the derivative of the softmax subtracts
  for (int l = 0, k = 0; l < p.levels; ++l) {
    const Level level = levels[l];
    for (int i = 0; i < p.points; ++i, ++k) {
      const Sample<A> sample(points, k, level);
      const PointGradient<A> gradient = point_backward<T, A>(p, place, sample, scatter);
      mean += sample.attention * gradient.weight;
      if (place.lane != k % kWarp) continue;
      const A location[2] = {gradient.x * (Fused ? A(1) : A(level.width)), gradient.y * (Fused ? A(1) : A(level.height))};
      store<C, 2>(grad_locations + 2 * k, location);
      grad_weights[k] = gradient.weight;
    }
  }
  if constexpr (Fused) {
    for (int k = place.lane; k < count; k += kWarp)  // those that this lane wrote
      grad_weights[k] = points.attention(k) * (grad_weights[k] - mean);
  }
}

}  // namespace
}  // namespace msda
