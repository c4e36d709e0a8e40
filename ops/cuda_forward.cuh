// The forward of the vector kernels.
#pragma once

#include "cuda_points.cuh"

namespace msda {
namespace {

// Shared memory of a group: its points, an even number of them.
__host__ __device__ __forceinline__ int forward_group_bytes(int points) {
  return SharedMemory::group_bytes((points + 1) / 2 * 2 * static_cast<int>(sizeof(Corners)));
}

template <typename T, typename C, int LANES, bool Fused>
__global__ void __launch_bounds__(kMostThreads, 2) forward_kernel(const __grid_constant__ Problem p) {
  constexpr int V = 16 / sizeof(T);
  extern __shared__ uint4 shared[];
  const SharedMemory memory{reinterpret_cast<char*>(shared), static_cast<int>(p.levels) * static_cast<int>(p.points)};
  prepare_block(p, memory, blockDim.x / (LANES * kTileWidth));
  const Tile tile = memory.tile();
  if (tile.y >= tile.height) return;
  const Place<LANES> place(p, tile);
  const int count = memory.points, channels = static_cast<int>(p.channels), channel = place.lane * V;
  Corners* own = reinterpret_cast<Corners*>(memory.groups() + place.group * forward_group_bytes(count));
  const auto keep = [&](int k, const Point& point) { own[k] = point.corners; };
  const int row_packs = static_cast<int>(p.heads) * (channels / V);
  const float scale = prepare_points<C, LANES, Fused>(p, memory, place, row_packs, keep);
  if (place.lane == 0 && count % 2 == 1) own[count] = {{-1, -1, -1, -1}, {0, 0, 0, 0}};
  __syncwarp();
  if (!place.exists || channel >= channels) return;

  const T* value = head_rows(static_cast<const T*>(p.value), p, place) + channel;
  float total[V] = {};
#pragma unroll 1
  for (int k = 0; k < count; k += 2) {  // two points, eight loads in flight
    Corners point[2];
    Pack<T, V> numbers[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      point[i] = own[k + i];
#pragma unroll
      for (int corner = 0; corner < 4; ++corner)
        numbers[i][corner] = load_pack<T, V>(value, point[i].pack[corner]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        float number[V];
        unpack(numbers[i][corner], number);
#pragma unroll
        for (int v = 0; v < V; ++v) total[v] += point[i].weight[corner] * number[v];
      }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) total[v] *= scale;
  store<T, V>(static_cast<T*>(p.output) + static_cast<int64_t>(place.pair) * channels + channel, total);
}

}  // namespace
}  // namespace msda
