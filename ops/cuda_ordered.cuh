// The gradient of value in a fixed order of additions, for the deterministic mode.
#pragma once

#include "cuda_general.cuh"

namespace msda {
namespace {

// The gradient of value in a fixed order of additions. A warp owns one line of one level of one head and image at a time:
// its lanes look at 32 points of the level, then add those that touch the line one after the other, a lane per channel.
template <typename T, typename C, bool Fused>
struct OrderedLine {
  using A = AccumulationOf<T>;
  const Problem& p;
  int64_t image;
  int head, line;
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
    points.locate_point(k, level, x, y);
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
      if (candidate < candidates) own = look_at(query, static_cast<int>(level.number * points + candidate % points));
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
  extern __shared__ uint4 shared[];
  Level* levels = reinterpret_cast<Level*>(shared);
  read_levels(p, levels);
  const int64_t slice = blockIdx.x / kBlocksPerSlice, image = slice / p.heads;
  const int warp = (blockIdx.x % kBlocksPerSlice) * (kThreads / kWarp) + threadIdx.x / kWarp;
  int64_t first_line = 0;  // of the level, among the lines of all levels
  for (int l = 0; l < p.levels; first_line += levels[l].height, ++l) {
    constexpr int kStep = kBlocksPerSlice * (kThreads / kWarp);
    const int past = static_cast<int>(first_line % kStep), start = warp >= past ? warp - past : warp - past + kStep;
    for (int line = start; line < levels[l].height; line += kStep)
      OrderedLine<T, C, Fused>{p, image, static_cast<int>(slice - image * p.heads), line, levels[l]}.add_up(
          threadIdx.x % kWarp);
  }
}

}  // namespace
}  // namespace msda
