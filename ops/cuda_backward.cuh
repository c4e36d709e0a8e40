// The backward of the vector kernels. Points of neighbouring queries fall on the same rows of value, so a block sorts the
// corners of its points by row and adds one sum for each run of equal rows, instead of one number for each corner.
#pragma once

#include "cuda_points.cuh"

namespace msda {
namespace {

constexpr int kLogBins = 11, kBins = 1 << kLogBins;  // of the sort; at least four for each thread

// What the derivatives need of a point besides its corners.
struct Fractions {
  float x, y, attention;
};

// Shared memory of a block from the groups on: points, gradients of the output, bins, their total, sorted corners.
struct BackwardMemory {
  char* groups;
  int points, number_of_groups, channels;  // the channels of a group's lanes

  __host__ __device__ __forceinline__ int group_bytes() const {
    return SharedMemory::group_bytes(points * static_cast<int>(sizeof(Corners) + sizeof(Fractions)));
  }
  __host__ __device__ __forceinline__ int corners_in_all() const { return number_of_groups * points * 4; }
  __host__ __device__ __forceinline__ int gradients_at() const { return number_of_groups * group_bytes(); }
  __host__ __device__ __forceinline__ int gradient_bytes() const { return channels * static_cast<int>(sizeof(float)); }
  __host__ __device__ __forceinline__ int bins_at() const { return gradients_at() + number_of_groups * gradient_bytes(); }
  __host__ __device__ __forceinline__ int sorted_at() const { return bins_at() + (kBins + 4) * static_cast<int>(sizeof(int)); }
  __host__ __device__ __forceinline__ int bytes() const {
    return sorted_at() + corners_in_all() * static_cast<int>(sizeof(unsigned));
  }

  __device__ __forceinline__ Corners* corners(int group) const {
    return reinterpret_cast<Corners*>(groups + group * group_bytes());
  }
  __device__ __forceinline__ Fractions* fractions(int group) const {
    return reinterpret_cast<Fractions*>(corners(group) + points);
  }
  __device__ __forceinline__ float* gradient(int group) const {
    return reinterpret_cast<float*>(groups + gradients_at() + group * gradient_bytes());
  }
  __device__ __forceinline__ int* bins() const { return reinterpret_cast<int*>(groups + bins_at()); }
  __device__ __forceinline__ int& placed() const { return bins()[kBins + 1]; }
  __device__ __forceinline__ unsigned* sorted() const { return reinterpret_cast<unsigned*>(groups + sorted_at()); }
};

// A hash (Knuth's, by the golden ratio): rows that share a bin cost a few more additions to memory, nothing else. The last
// bin is that of the corners outside.
__device__ __forceinline__ unsigned bin_of(int pack) {
  return pack < 0 ? kBins : static_cast<unsigned>(pack) * 2654435769u >> (32 - kLogBins);
}

__device__ __forceinline__ void clear_bins(const BackwardMemory& memory) {
  int4* bins = reinterpret_cast<int4*>(memory.bins());
  for (int i = threadIdx.x; i <= kBins / 4; i += blockDim.x) bins[i] = make_int4(0, 0, 0, 0);
}

// Numbers of corners in the bins become places where the bins begin; their order is that in which warps arrive.
__device__ __forceinline__ void place_bins(const BackwardMemory& memory) {
  int4* bins = reinterpret_cast<int4*>(memory.bins());
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int i = threadIdx.x; i < kBins / 4; i += blockDim.x) {
    const int4 number = bins[i];
    const int own = number.x + number.y + number.z + number.w;
    int up_to_here = own;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, up_to_here, step);
      if (lane >= step) up_to_here += before;
    }
    int begin = 0;
    if (lane == kWarp - 1) begin = atomicAdd(&memory.placed(), up_to_here);
    begin = __shfl_sync(kAllLanes, begin, kWarp - 1) + up_to_here - own;
    bins[i] = make_int4(begin, begin + number.x, begin + number.x + number.y, begin + own - number.w);
  }
  if (threadIdx.x == 0) memory.bins()[kBins] = memory.corners_in_all() - memory.bins()[kBins];
}

// Corners sorted by row: in 16 bits each, how far the corner and the gradient of its query lie from the groups' memory.
template <int LANES>
__device__ __forceinline__ void sort_corners(const BackwardMemory& memory, const Place<LANES>& place) {
  const Corners* own = memory.corners(place.group);
  const unsigned gradient_at = memory.gradients_at() + place.group * memory.gradient_bytes();
#pragma unroll 1
  for (int k = place.lane; k < memory.points; k += LANES) {
    const unsigned corners_at = place.group * memory.group_bytes() + k * static_cast<unsigned>(sizeof(Corners));
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const unsigned corner_at = corners_at + corner * static_cast<unsigned>(sizeof(int));
      const int position = atomicAdd(&memory.bins()[bin_of(own[k].pack[corner])], 1);
      memory.sorted()[position] = gradient_at << 16 | corner_at;
    }
  }
}

// Every group adds up an equal share of the sorted corners. `grad_value` is the lane's part of row 0.
template <int V, int LANES>
__device__ __forceinline__ void add_sorted(const BackwardMemory& memory, const Place<LANES>& place, float* grad_value) {
  const int total = memory.placed(), log_groups = __ffs(memory.number_of_groups) - 1;  // a power of two
  const int share = (total + memory.number_of_groups - 1) >> log_groups;
  const int begin = place.group * share, end = min(begin + share, total);
  if (begin >= end) return;
  const unsigned* sorted = memory.sorted();
  grad_value = computed_here(grad_value);
  const char* gradients = memory.groups + place.lane * (V * sizeof(float));
  int pack = *reinterpret_cast<const int*>(memory.groups + sorted[begin] % 65536);
  float sums[V] = {};
#pragma unroll 2
  for (int i = begin; i < end; ++i) {
    const unsigned packed = sorted[i];
    const char* corner = memory.groups + packed % 65536;
    const int next_pack = *reinterpret_cast<const int*>(corner);
    const float weight = *reinterpret_cast<const float*>(corner + offsetof(Corners, weight));
    const Pack<float, V> gradient = load<float, V>(reinterpret_cast<const float*>(gradients + packed / 65536));
    const bool complete = next_pack != pack;
    if (complete) add_to_pack<V>(grad_value, pack, sums);
    pack = next_pack;
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] = (complete ? 0 : sums[v]) + weight * gradient.number[v];
  }
  add_to_pack<V>(grad_value, pack, sums);
}

// Sums of dot[0] to dot[3] over a group: those of corner lane / (LANES / 4). Lanes exchange what they will not sum themselves.
template <int LANES>
__device__ __forceinline__ float sum_of_a_corner(const float (&dot)[4], int lane) {
  const bool lower = lane & (LANES / 2), right = lane & (LANES / 4);
  float left_sum = lower ? dot[2] : dot[0], right_sum = lower ? dot[3] : dot[1];
  left_sum += __shfl_xor_sync(kAllLanes, lower ? dot[0] : dot[2], LANES / 2);
  right_sum += __shfl_xor_sync(kAllLanes, lower ? dot[1] : dot[3], LANES / 2);
  const float sum = (right ? right_sum : left_sum) + __shfl_xor_sync(kAllLanes, right ? left_sum : right_sum, LANES / 4);
  return group_sum(sum, LANES / 4);
}

// The weights of the group's corners give way to the dot products of the gradient of the output with their rows of value.
template <typename T, int V, int LANES>
__device__ __forceinline__ void find_dots(const Problem& p, Corners* own, int count, const Place<LANES>& place,
                                          const float (&gradient)[V]) {
  const int channel = place.lane * V < static_cast<int>(p.channels) ? place.lane * V : 0;  // idle lanes have no gradient
  const T* value = head_rows(static_cast<const T*>(p.value), p, place) + channel;
  constexpr int kLanesPerCorner = LANES / 4;
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    const int4 packed = *reinterpret_cast<const int4*>(own[k].pack);
    const int pack[4] = {packed.x, packed.y, packed.z, packed.w};
    Pack<T, V> numbers[4];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner)
      numbers[corner] = load_pack<T, V>(value, pack[corner]);
    float dot[4] = {};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      float number[V];
      unpack(numbers[corner], number);
#pragma unroll
      for (int v = 0; v < V; ++v) dot[corner] += gradient[v] * number[v];
    }
    const float sum = sum_of_a_corner<LANES>(dot, place.lane);
    if (place.lane % kLanesPerCorner == 0) own[k].weight[place.lane / kLanesPerCorner] = sum;
  }
}

// Writes the gradients of locations and weights from the dot products.
template <typename C, int LANES, bool Fused>
__device__ __forceinline__ void write_point_gradients(const Problem& p, const SharedMemory& memory, const Place<LANES>& place,
                                                      Corners* own, const Fractions* fractions, float scale) {
  const int count = memory.points;
  const int64_t first_point = static_cast<int64_t>(place.pair) * count;
  C* grad_locations = static_cast<C*>(p.grad_locations) + 2 * first_point;
  float* grad_weights = static_cast<float*>(p.grad_weights) + first_point;
  float mean = 0;  // of the gradients of the weights, which the derivative of the softmax subtracts
#pragma unroll 1
  for (int k = place.lane; k < count; k += LANES) {
    const Fractions point = fractions[k];
    const float attention = point.attention * scale;
    const PointGradient<float> gradient =
        point_gradient(AxisPoint<float>{0, point.x}, AxisPoint<float>{0, point.y}, attention, own[k].weight);
    const Level level = memory.level_of_point()[k];
    const float location[2] = {gradient.x * (Fused ? 1.0f : level.width), gradient.y * (Fused ? 1.0f : level.height)};
    if (place.exists) store<C, 2>(grad_locations + 2 * k, location);
    if (!Fused && place.exists) grad_weights[k] = gradient.weight;
    own[k].weight[0] = gradient.weight;
    mean += attention * gradient.weight;
  }
  if constexpr (Fused) {
    mean = group_sum(mean, LANES);
    if (!place.exists) return;
#pragma unroll 1
    for (int k = place.lane; k < count; k += LANES)
      grad_weights[k] = fractions[k].attention * scale * (own[k].weight[0] - mean);
  }
}

template <typename T, typename C, int LANES, bool Fused>
__global__ void __launch_bounds__(kMostThreads, 2) backward_kernel(const __grid_constant__ Problem p, bool scatter) {
  constexpr int V = 16 / sizeof(T);
  extern __shared__ uint4 shared[];
  const SharedMemory block{reinterpret_cast<char*>(shared), static_cast<int>(p.levels) * static_cast<int>(p.points)};
  const BackwardMemory memory{block.groups(), block.points, static_cast<int>(blockDim.x) / LANES, LANES * V};
  clear_bins(memory);
  prepare_block(p, block, blockDim.x / (LANES * kTileWidth));
  const Tile tile = block.tile();
  if (tile.y >= tile.height) return;
  const Place<LANES> place(p, tile);
  const int channels = static_cast<int>(p.channels), channel = place.lane * V;
  Corners* own = memory.corners(place.group);
  Fractions* fractions = memory.fractions(place.group);
  const auto keep = [&](int k, const Point& point) {
    own[k] = point.corners;
    fractions[k] = {point.x.fraction, point.y.fraction, point.attention};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) atomicAdd(&memory.bins()[bin_of(point.corners.pack[corner])], 1);
  };
  const int row_packs = static_cast<int>(p.heads) * (channels / V);
  const float scale = prepare_points<C, LANES, Fused>(p, block, place, row_packs, keep);

  float gradient[V] = {}, scaled[V];
  if (channel < channels && place.exists) {
    const int64_t first_channel = static_cast<int64_t>(place.pair) * channels;
    unpack(load<T, V>(static_cast<const T*>(p.grad_output) + first_channel + channel), gradient);
  }
  if (scatter) {
#pragma unroll
    for (int v = 0; v < V; ++v) scaled[v] = gradient[v] * scale;
    store<float, V>(memory.gradient(place.group) + channel, scaled);
    __syncthreads();
    place_bins(memory);
    __syncthreads();
    sort_corners<LANES>(memory, place);
    __syncthreads();
    float* grad_value = head_rows(static_cast<float*>(p.grad_value), p, place) + channel;
    if (channel < channels) add_sorted<V, LANES>(memory, place, grad_value);
    __syncthreads();
  } else {
    __syncwarp();
  }
  find_dots<T, V, LANES>(p, own, block.points, place, gradient);
  __syncwarp();
  write_point_gradients<C, LANES, Fused>(p, block, place, own, fractions, scale);
}

}  // namespace
}  // namespace msda
