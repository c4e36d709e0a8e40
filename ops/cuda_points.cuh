// What the vector kernels share: a block serves one head and a tile of 8 x 8 queries, a group of LANES neighbouring threads
// one of them. Each point is prepared once per group, in shared memory; then every lane sums over all points what
// belongs to its 16 bytes of the channels.
#pragma once

#include "cuda_levels.cuh"
#include "cuda_numbers.cuh"
#include "problem.h"
#include "sampling.h"

namespace msda {
namespace {

constexpr int kTileWidth = 8, kTileHeight = 8, kMostThreads = 512;

// The corners of a point: where their rows of value begin, counted in packs of 16 bytes from row 0 of the head (-1: outside);
// their weights, times attention before the softmax's division.
struct alignas(16) Corners {
  int pack[4];
  float weight[4];
};

// The tile: its corner (x, y) in the grid of queries, of which `first` is the first one.
struct Tile {
  int first, height, width, y, x;
};

// Shared memory of a block: the tile, the level of every point, the points of every group. Groups begin at odd multiples of
// 16 bytes, so that they lie in different banks.
struct SharedMemory {
  char* start;
  int points;  // of a query and head

  static constexpr int kTileBytes = 32;
  static __host__ __device__ __forceinline__ int bytes_before_groups(int points) {
    return kTileBytes + points * static_cast<int>(sizeof(Level));
  }
  static __host__ __device__ __forceinline__ int group_bytes(int bytes) { return ((bytes + 15) / 16 | 1) * 16; }

  __device__ __forceinline__ Tile& tile() const { return *reinterpret_cast<Tile*>(start); }
  __device__ __forceinline__ Level* level_of_point() const { return reinterpret_cast<Level*>(start + kTileBytes); }
  __device__ __forceinline__ char* groups() const { return start + bytes_before_groups(points); }
};

// Tile number `tile` of the queries. Where these are the pixels of the levels, one after the other, tiles are squares of
// pixels, whose points share rows of value; otherwise they are runs of consecutive queries, a grid of 8 columns.
__device__ __forceinline__ Tile find_tile(const Problem& p, const Level* level_of_point, unsigned tile, unsigned tiles,
                                          int rows) {
  const int queries = static_cast<int>(p.queries), points = static_cast<int>(p.points);
  const int levels = static_cast<int>(p.levels);
  Tile found{0, 0, 0, 0, 0};  // of a spare block
  unsigned covered = 0, numbered = 0;
  bool pixels = p.queries == p.keys;
  for (int l = 0; l < levels; ++l) {
    const Level level = level_of_point[l * points];
    const unsigned columns = (level.width + kTileWidth - 1) / kTileWidth, lines = (level.height + rows - 1) / rows;
    const unsigned own = tile - numbered;
    if (own < columns * lines) {
      const int y = own / columns * rows, x = own % columns * kTileWidth;
      found = {level.start, level.height, level.width, y, x};
    }
    pixels &= static_cast<unsigned>(level.start) == covered;
    covered += level.height * level.width;
    numbered += columns * lines;
  }
  if (pixels && covered == static_cast<unsigned>(queries) && numbered <= tiles) return found;
  return {0, (queries + kTileWidth - 1) / kTileWidth, kTileWidth, static_cast<int>(tile) * rows, 0};
}

// The first warp fills the block's part of shared memory; ends with a barrier.
__device__ __forceinline__ void prepare_block(const Problem& p, const SharedMemory& memory, int rows) {
  if (threadIdx.x < kWarp) {
    const int points = static_cast<int>(p.points);
    for (int k = threadIdx.x; k < memory.points; k += kWarp) memory.level_of_point()[k] = read_level(p, k / points);
    __syncwarp();
    if (threadIdx.x == 0) memory.tile() = find_tile(p, memory.level_of_point(), blockIdx.y, gridDim.y, rows);
  }
  __syncthreads();
}

// The query and head of a group. Groups beyond the tile's edge work as if they had its first query, and keep silent.
template <int LANES>
struct Place {
  int image, query, pair;
  int head, group, lane;
  bool exists;

  __device__ __forceinline__ Place(const Problem& p, const Tile& tile)
      : image(blockIdx.z), head(blockIdx.x), group(threadIdx.x / LANES), lane(threadIdx.x % LANES) {
    const int x = tile.x + group % kTileWidth, y = tile.y + group / kTileWidth;
    const int own = tile.first + y * tile.width + x;
    exists = x < tile.width && y < tile.height && own < static_cast<int>(p.queries);
    query = exists ? own : tile.first + tile.y * tile.width + tile.x;
    pair = (image * static_cast<int>(p.queries) + query) * static_cast<int>(p.heads) + head;
  }
};

// Where row 0 of the place's head begins.
template <typename T, int LANES>
__device__ __forceinline__ T* head_rows(T* tensor, const Problem& p, const Place<LANES>& place) {
  const int row = place.image * static_cast<int>(p.keys) * static_cast<int>(p.heads) + place.head;
  return tensor + static_cast<int64_t>(row) * static_cast<int>(p.channels);
}

// One point of a group on its way to shared memory.
struct Point {
  AxisPoint<float> x, y;
  float attention;  // before the softmax's division
  Corners corners;
};

// Calls keep(k, point) for the points of the lane; returns what attention has to be multiplied by. C is the type of
// locations and weights in memory; a row of value has `row_packs` packs, of all heads.
template <typename C, int LANES, bool Fused, typename Keep>
__device__ __forceinline__ float prepare_points(const Problem& p, const SharedMemory& memory, const Place<LANES>& place,
                                                int row_packs, const Keep& keep) {
  const int count = memory.points;
  const int64_t first_point = static_cast<int64_t>(place.pair) * count;
  const C* locations = static_cast<const C*>(p.locations) + 2 * first_point;
  const C* weights = static_cast<const C*>(p.weights) + first_point;
  const float* reference = nullptr;
  int level_stride = 0;
  float largest = -INFINITY, total = 0;
  if constexpr (Fused) {
    const int64_t* stride = p.reference_strides;
    reference = static_cast<const float*>(p.reference) + place.image * stride[0] + place.query * stride[1];
    level_stride = static_cast<int>(stride[2]);
#pragma unroll 1
    for (int k = place.lane; k < count; k += LANES) largest = fmaxf(largest, to_float(weights[k]));
    largest = group_max(largest, LANES);
  }
#pragma unroll 1
  for (int k = place.lane; k < count; k += LANES) {
    const Level level = memory.level_of_point()[k];
    const Pack<C, 2> location = load<C, 2>(locations + 2 * k);
    const float px = to_float(location.number[0]), py = to_float(location.number[1]);
    Point point;
    point.attention = to_float(weights[k]);
    if constexpr (Fused) {
      point.attention = __expf(point.attention - largest);
      total += point.attention;
      const float* centre = reference + static_cast<int64_t>(level.number) * level_stride;
      point.x = locate(centre[0], px - 0.5f, level.width);
      point.y = locate(centre[1], py - 0.5f, level.height);
    } else {
      point.x = locate(px, -0.5f, level.width);
      point.y = locate(py, -0.5f, level.height);
    }
    if (!place.exists) point.x.low = -2;
    corner_weights(point.x, point.y, point.attention, point.corners.weight);
    const int first = (level.start + point.y.low * level.width + point.x.low) * row_packs;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int dx = corner % 2, dy = corner / 2;
      const bool inside = in_level(point.x.low + dx, point.y.low + dy, level.width, level.height);
      point.corners.pack[corner] = inside ? first + (dy * level.width + dx) * row_packs : -1;
    }
    keep(k, point);
  }
  return Fused ? __fdividef(1.0f, group_sum(total, LANES)) : 1.0f;
}

}  // namespace
}  // namespace msda
