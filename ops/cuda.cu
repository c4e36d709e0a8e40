// CUDA kernels of the operator. A group of neighbouring threads serves one query and head; each of its threads owns
// 16 bytes of the channels (one channel on the general path), and sums over levels and points in registers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "problem.h"
#include "sampling.h"

namespace msda {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kBlocksPerMultiprocessor = 2;  // leaves each thread 128 registers, enough for every kernel to do without spills
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

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// V neighbouring numbers, moved by one instruction.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T number[V];
};

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> zeros() {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.number[v] = From<T>::number(AccumulationOf<T>(0));
  return pack;
}

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* source) {
  return *reinterpret_cast<const Pack<T, V>*>(source);
}

// The same where `inside`, else zeros. The 16-byte load is predicated, not jumped over, so that several are in flight.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_or_zeros(const T* source, bool inside) {
  Pack<T, V> pack = zeros<T, V>();
  if constexpr (sizeof pack == 16) {
    uint4& bits = reinterpret_cast<uint4&>(pack);
    asm("{\n\t.reg .pred inside;\n\t"
        "setp.ne.s32 inside, %5, 0;\n\t"
        "@inside ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
        : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)
        : "l"(__cvta_generic_to_global(source)), "r"(static_cast<int>(inside)));
  } else if (inside) {
    pack = load<T, V>(source);
  }
  return pack;
}

template <typename A, int V>
__device__ __forceinline__ void add_one_by_one(A* target, const A (&sums)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) atomicAdd(target + v, sums[v]);
}

// Adds V sums to a row of the gradient, which other threads add to as well.
template <int V>
__device__ __forceinline__ void add(double* target, const double (&sums)[V]) {
  add_one_by_one(target, sums);
}

template <int V>
__device__ __forceinline__ void add(float* target, const float (&sums)[V]) {
#if __CUDA_ARCH__ >= 900
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int v = 0; v < V; v += 4)
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                   :
                   : "l"(__cvta_generic_to_global(target + v)), "f"(sums[v]), "f"(sums[v + 1]), "f"(sums[v + 2]),
                     "f"(sums[v + 3])
                   : "memory");
  } else {
    add_one_by_one(target, sums);
  }
#else
  add_one_by_one(target, sums);
#endif
}

struct Level {
  int height, width, start;
};

// Copies the levels to shared memory. A level that reaches beyond value would read foreign memory: it ends the kernel, which
// CUDA reports as a failed launch (an assertion would cost registers).
__device__ __forceinline__ void read_levels(const Problem& p, Level* levels) {
  for (int l = threadIdx.x; l < p.levels; l += blockDim.x) {
    const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1], start = p.starts[l];
    const bool level_fits_value = height >= 0 && width >= 0 && height <= p.keys && width <= p.keys && start >= 0 &&
                                  start + height * width <= p.keys;
    if (!level_fits_value) __trap();
    levels[l] = {static_cast<int>(height), static_cast<int>(width), static_cast<int>(start)};
  }
  __syncthreads();
}

// The sampling points of one query and head: C is their type in memory, A the accumulation type.
template <typename C, typename A, bool Fused>
struct Points {
  const C *locations, *weights, *reference;
  int64_t reference_stride;
  A largest, scale;  // of the softmax

  __device__ Points(const Problem& p, int64_t image, int64_t query, int64_t pair) {
    const int count = static_cast<int>(p.levels * p.points);
    locations = static_cast<const C*>(p.locations) + pair * count * 2;
    weights = static_cast<const C*>(p.weights) + pair * count;
    if constexpr (Fused) {
      const int64_t* stride = p.reference_strides;
      reference = static_cast<const C*>(p.reference) + image * stride[0] + query * stride[1];
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

  __device__ __forceinline__ void locate_point(int k, int l, const Level& level, AxisPoint<A>& x, AxisPoint<A>& y) const {
    const Pack<C, 2> pair = load<C, 2>(locations + 2 * k);
    const A px = to_float(pair.number[0]), py = to_float(pair.number[1]);
    if constexpr (Fused) {
      const C* centre = reference + l * reference_stride;
      x = locate<A>(to_float(centre[0]), px - A(0.5), level.width);
      y = locate<A>(to_float(centre[1]), py - A(0.5), level.height);
    } else {
      x = locate<A>(px, A(-0.5), level.width);
      y = locate<A>(py, A(-0.5), level.height);
    }
  }
};

// One point as a thread sees it: its corners' rows of value, and the numbers there, zero outside the level.
template <typename T, typename A, int V>
struct Sample {
  AxisPoint<A> x, y;
  A attention;
  int row[4];  // -1: outside
  Pack<T, V> value[4];

  template <typename C, bool Fused>
  __device__ __forceinline__ void find(const Points<C, A, Fused>& points, int k, int l, const Level& level) {
    points.locate_point(k, l, level, x, y);
    attention = points.attention(k);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int cx = x.low + corner % 2, cy = y.low + corner / 2;
      row[corner] = in_level(cx, cy, level.width, level.height) ? level.start + cy * level.width + cx : -1;
    }
  }

  __device__ __forceinline__ void fetch(const T* source, int stride, bool active) {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const T* corner_row = source + static_cast<int64_t>(row[corner]) * stride;
      value[corner] = load_or_zeros<T, V>(corner_row, active && row[corner] >= 0);
    }
  }

  __device__ __forceinline__ void add_to(A (&total)[V]) const {
    A weight[4];
    corner_weights(x, y, attention, weight);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner)
#pragma unroll
      for (int v = 0; v < V; ++v) total[v] += weight[corner] * static_cast<A>(to_float(value[corner].number[v]));
  }
};

// Where a thread works: which query and head, which of the group's lanes.
struct Place {
  int64_t pair, image, query;
  int head, lane;
  bool exists;

  __device__ Place(const Problem& p, int lanes) {
    pair = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
    lane = threadIdx.x % lanes;
    const int64_t line = pair / p.heads;
    head = static_cast<int>(pair - line * p.heads);
    image = line / p.queries;
    query = line - image * p.queries;
    exists = image < p.batch;
  }
};

// Rows of one head of one image: row r begins at rows(...) + r * heads * channels.
template <typename T>
__device__ __forceinline__ T* rows(T* tensor, const Problem& p, int64_t image, int head) {
  return tensor + (image * p.keys * p.heads + head) * p.channels;
}

// V > 1: the group's lanes cover all channels at once. V = 1: a warp walks over the channels.
template <typename T, typename C, int V, bool Fused>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) forward_kernel(const __grid_constant__ Problem p, int lanes) {
  using A = AccumulationOf<T>;
  extern __shared__ Level levels[];
  read_levels(p, levels);
  const Place place(p, lanes);
  if (!place.exists) return;
  Points<C, A, Fused> points(p, place.image, place.query, place.pair);
  points.prepare(static_cast<int>(p.levels * p.points));
  const int channels = static_cast<int>(p.channels), stride = static_cast<int>(p.heads) * channels;
  for (int channel = place.lane * V; channel < channels; channel += lanes * V) {
    const T* value = rows(static_cast<const T*>(p.value), p, place.image, place.head) + channel;
    A total[V] = {};
    for (int l = 0, k = 0; l < p.levels; ++l) {
      const Level level = levels[l];
      const int end = k + static_cast<int>(p.points);
      for (; k + 1 < end; k += 2) {  // two points in flight
        Sample<T, A, V> first, second;
        first.find(points, k, l, level);
        second.find(points, k + 1, l, level);
        first.fetch(value, stride, true);
        second.fetch(value, stride, true);
        first.add_to(total);
        second.add_to(total);
      }
      if (k < end) {
        Sample<T, A, V> last;
        last.find(points, k, l, level);
        last.fetch(value, stride, true);
        last.add_to(total);
        ++k;
      }
    }
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) result.number[v] = From<T>::number(total[v]);
    *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(p.output) + place.pair * channels + channel) = result;
  }
}

template <typename A>
__device__ __forceinline__ A sum_over_group(A number, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) number += __shfl_xor_sync(kAllLanes, number, step);
  return number;
}

// The gradient of a point as far as the channels of this thread contribute; with `scatter`, also of value.
template <typename T, typename A, int V>
__device__ __forceinline__ PointGradient<A> point_backward(const Sample<T, A, V>& sample, const A (&gradient)[V],
                                                           A* grad_value, int stride, bool scatter) {
  A weight[4], dot[4] = {};
  corner_weights(sample.x, sample.y, sample.attention, weight);
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    A share[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      dot[corner] += gradient[v] * static_cast<A>(to_float(sample.value[corner].number[v]));
      share[v] = weight[corner] * gradient[v];
    }
    if (scatter && sample.row[corner] >= 0) add<V>(grad_value + static_cast<int64_t>(sample.row[corner]) * stride, share);
  }
  return point_gradient(sample.x, sample.y, sample.attention, dot);
}

// Gradients of locations and weights, and with `scatter` of value by atomic addition. Lane i of a group keeps the
// gradients of the points i, i + lanes, ... until it can write them side by side with its neighbours.
template <typename T, typename C, int V, bool Fused>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) backward_kernel(const __grid_constant__ Problem p, int lanes, bool scatter) {
  using A = AccumulationOf<T>;
  extern __shared__ Level levels[];
  read_levels(p, levels);
  const Place place(p, lanes);
  const int channels = static_cast<int>(p.channels), stride = static_cast<int>(p.heads) * channels;
  const int count = static_cast<int>(p.levels * p.points), blocks = (channels + lanes * V - 1) / (lanes * V);
  const int64_t pair = place.exists ? place.pair : 0;  // idle groups follow, because shuffles need the whole warp
  const int64_t image = place.exists ? place.image : 0, query = place.exists ? place.query : 0;
  const int head = place.exists ? place.head : 0;
  const T* value = rows(static_cast<const T*>(p.value), p, image, head);
  A* grad_value = rows(static_cast<A*>(p.grad_value), p, image, head);
  const T* grad_output = static_cast<const T*>(p.grad_output) + pair * channels;
  Points<C, A, Fused> points(p, image, query, pair);
  points.prepare(count);

  A* grad_weights = static_cast<A*>(p.grad_weights) + pair * count;

  A gradient[V] = {};
  const auto read_gradient = [&](int channel) {
    const Pack<T, V> pack = load<T, V>(grad_output + channel);
#pragma unroll
    for (int v = 0; v < V; ++v) gradient[v] = to_float(pack.number[v]);
  };
  if constexpr (V > 1) {
    if (place.lane * V < channels && place.exists) read_gradient(place.lane * V);
  }

  A mean = 0;  // of the gradients of the weights, which the derivative of the softmax subtracts
  PointGradient<A> kept{};
  for (int k = 0, l = 0, next_level = static_cast<int>(p.points); k < count; ++k) {
    if (k == next_level) ++l, next_level += static_cast<int>(p.points);
    const Level level = levels[l];
    Sample<T, A, V> sample;
    sample.find(points, k, l, level);
    PointGradient<A> sum{};
    for (int block = 0; block < blocks; ++block) {
      const int channel = (block * lanes + place.lane) * V;
      const bool active = channel < channels && place.exists;
      if constexpr (V == 1) {
        if (active) read_gradient(channel);
      }
      sample.fetch(value + channel, stride, active);
      const PointGradient<A> part = point_backward<T, A, V>(sample, gradient, grad_value + channel, stride, scatter && active);
      sum.weight += active ? part.weight : A(0), sum.x += active ? part.x : A(0), sum.y += active ? part.y : A(0);
    }
    sum.weight = sum_over_group(sum.weight, lanes);
    sum.x = sum_over_group(sum.x, lanes) * (Fused ? A(1) : A(level.width));
    sum.y = sum_over_group(sum.y, lanes) * (Fused ? A(1) : A(level.height));
    mean += sample.attention * sum.weight;
    const int turn = k & (lanes - 1);
    if (turn == place.lane) kept = sum;
    if ((turn == lanes - 1 || k == count - 1) && place.lane <= turn && place.exists) {
      const int own = k - turn + place.lane;
      Pack<C, 2> location;
      location.number[0] = From<C>::number(kept.x), location.number[1] = From<C>::number(kept.y);
      *reinterpret_cast<Pack<C, 2>*>(static_cast<C*>(p.grad_locations) + 2 * (pair * count + own)) = location;
      grad_weights[own] = kept.weight;
    }
  }
  if constexpr (Fused) {
    if (!place.exists) return;
    for (int k = place.lane; k < count; k += lanes)  // those that this thread wrote
      grad_weights[k] = points.attention(k) * (grad_weights[k] - mean);
  }
}

// The gradient of value in a fixed order of additions. A warp owns one line of one level of one head and image at a time:
// its lanes look at 32 points of the level, then add those that touch the line one after the other, a lane per channel.
template <typename T, typename C, bool Fused>
struct OrderedLine {
  using A = AccumulationOf<T>;
  const Problem& p;
  int64_t image;
  int head, l, line;
  Level level;

  // What a point adds to the line: `left` at column x, `right` at x + 1; nothing when neither is in the level.
  struct Contribution {
    int x = -2;
    A left = 0, right = 0;
  };

  __device__ __forceinline__ int64_t pair(unsigned query) const { return (image * p.queries + query) * p.heads + head; }

  __device__ __forceinline__ Contribution look_at(unsigned query, int k) const {
    Points<C, A, Fused> points(p, image, query, pair(query));
    AxisPoint<A> x, y;
    points.locate_point(k, l, level, x, y);
    Contribution contribution;
    if ((y.low != line && y.low + 1 != line) || x.low < -1) return contribution;
    points.prepare(static_cast<int>(p.levels * p.points));
    A weight[4];
    corner_weights(x, y, points.attention(k), weight);
    contribution.x = x.low;
    contribution.left = y.low == line ? weight[0] : weight[2];
    contribution.right = y.low == line ? weight[1] : weight[3];
    return contribution;
  }

  __device__ __forceinline__ void add_up(int lane) const {
    const int channels = static_cast<int>(p.channels), stride = static_cast<int>(p.heads) * channels;
    const unsigned points = static_cast<unsigned>(p.points), candidates = static_cast<unsigned>(p.queries) * points;
    A* target = rows(static_cast<A*>(p.grad_value), p, image, head) +
                (static_cast<int64_t>(level.start) + static_cast<int64_t>(line) * level.width) * stride;
    for (unsigned first = 0; first < candidates; first += kWarp) {
      const unsigned candidate = first + lane, query = candidate / points;
      Contribution own;
      if (candidate < candidates) own = look_at(query, l * static_cast<int>(points) + static_cast<int>(candidate % points));
      for (unsigned waiting = __ballot_sync(kAllLanes, own.x > -2); waiting != 0; waiting &= waiting - 1) {
        const int source = __ffs(waiting) - 1, x = __shfl_sync(kAllLanes, own.x, source);
        const A left = __shfl_sync(kAllLanes, own.left, source), right = __shfl_sync(kAllLanes, own.right, source);
        const int64_t from = pair(__shfl_sync(kAllLanes, query, source));
        const T* gradient = static_cast<const T*>(p.grad_output) + from * channels;
        for (int channel = lane; channel < channels; channel += kWarp) {
          const A number = to_float(gradient[channel]);
          if (x >= 0) target[static_cast<int64_t>(x) * stride + channel] += left * number;
          if (x + 1 < level.width) target[static_cast<int64_t>(x + 1) * stride + channel] += right * number;
        }
      }
    }
  }
};

constexpr int kBlocksPerSlice = 32;

template <typename T, typename C, bool Fused>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) ordered_kernel(const __grid_constant__ Problem p) {
  extern __shared__ Level levels[];
  read_levels(p, levels);
  const int64_t slice = blockIdx.x / kBlocksPerSlice, image = slice / p.heads;
  const int warp = (blockIdx.x % kBlocksPerSlice) * (kThreads / kWarp) + threadIdx.x / kWarp;
  int first_line = 0;  // of the level, among the lines of all levels
  for (int l = 0; l < p.levels; first_line += levels[l].height, ++l) {
    constexpr int kStep = kBlocksPerSlice * (kThreads / kWarp);
    const int past = first_line % kStep, start = warp >= past ? warp - past : warp - past + kStep;
    for (int line = start; line < levels[l].height; line += kStep)
      OrderedLine<T, C, Fused>{p, image, static_cast<int>(slice - image * p.heads), l, line, levels[l]}.add_up(
          threadIdx.x % kWarp);
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("ms_deform_attn: CUDA: ") + cudaGetErrorString(error));
}

int64_t ceil_divide(int64_t number, int64_t unit) { return (number + unit - 1) / unit; }

template <typename T, typename C, bool Fused>
struct Launch {
  static constexpr int V = 16 / sizeof(T);
  const Problem& p;
  cudaStream_t stream;
  int lanes = kWarp;       // threads of a group
  bool vectors = false;    // whether each moves 16 bytes at a time
  size_t level_bytes = 0;  // of shared memory

  Launch(const Problem& problem, void* on) : p(problem), stream(static_cast<cudaStream_t>(on)) {
    constexpr int64_t kMostLevels = 4096, kMost = (int64_t(1) << 31) - 1;
    if (p.levels > kMostLevels) throw std::runtime_error("ms_deform_attn: spatial_shapes: more than 4096 levels");
    if (p.heads * p.channels > kMost || p.queries * p.points > kMost || p.levels * p.points > kMost)
      throw std::runtime_error("ms_deform_attn: more than 2^31 - 1 channels, points, or queries x points of a level");
    level_bytes = p.levels * sizeof(Level);
    vectors = p.channels % V == 0 && p.channels <= kWarp * V;
    for (lanes = vectors ? 1 : kWarp; lanes * V < p.channels && lanes < kWarp;) lanes *= 2;
  }

  unsigned blocks() const {
    const int64_t number = ceil_divide(p.batch * p.queries * p.heads, kThreads / lanes);
    if (number > (int64_t(1) << 31) - 1) throw std::runtime_error("ms_deform_attn: too many queries");
    return static_cast<unsigned>(number);
  }

  void forward() const {
    const auto kernel = vectors ? forward_kernel<T, C, V, Fused> : forward_kernel<T, C, 1, Fused>;
    kernel<<<blocks(), kThreads, level_bytes, stream>>>(p, lanes);
    check(cudaGetLastError());
  }

  void backward(bool deterministic) const {
    const auto kernel = vectors ? backward_kernel<T, C, V, Fused> : backward_kernel<T, C, 1, Fused>;
    kernel<<<blocks(), kThreads, level_bytes, stream>>>(p, lanes, !deterministic);
    check(cudaGetLastError());
    if (!deterministic) return;
    const unsigned ordered_blocks = static_cast<unsigned>(p.batch * p.heads * kBlocksPerSlice);
    ordered_kernel<T, C, Fused><<<ordered_blocks, kThreads, level_bytes, stream>>>(p);
    check(cudaGetLastError());
  }
};

// Calls run(launch) with the launch for the types of the problem.
template <typename T, typename C, typename Run>
void with_form(const Problem& p, void* stream, const Run& run) {
  if (p.reference != nullptr)
    run(Launch<T, C, true>(p, stream));
  else
    run(Launch<T, C, false>(p, stream));
}

template <typename Run>
void with_types(const Problem& p, void* stream, const Run& run) {
  const bool single = p.point_type == Type::f32;  // otherwise the points have the type of value
  switch (p.value_type) {
    case Type::f64: return with_form<double, double>(p, stream, run);
    case Type::f32: return with_form<float, float>(p, stream, run);
    case Type::f16:
      return single ? with_form<__half, float>(p, stream, run) : with_form<__half, __half>(p, stream, run);
    case Type::bf16:
      return single ? with_form<__nv_bfloat16, float>(p, stream, run)
                    : with_form<__nv_bfloat16, __nv_bfloat16>(p, stream, run);
  }
}

}  // namespace

void cuda_forward(const Problem& problem, void* stream) {
  with_types(problem, stream, [](const auto& launch) { launch.forward(); });
}

void cuda_backward(const Problem& problem, bool deterministic, void* stream) {
  with_types(problem, stream, [&](const auto& launch) { launch.backward(deterministic); });
}

}  // namespace msda
