// Launches the CUDA kernels: the vector kernels where lanes can own 16 bytes of the channels, the general ones elsewhere.
#include <cstddef>
#include <stdexcept>
#include <string>

#include "cuda_backward.cuh"
#include "cuda_forward.cuh"
#include "cuda_general.cuh"
#include "cuda_ordered.cuh"
#include "problem.h"

namespace msda {
namespace {

constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1, kMostBlocksAcross = 65535;  // along x; along y and z

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("ms_deform_attn: CUDA: ") + cudaGetErrorString(error));
}

int64_t ceil_divide(int64_t number, int64_t unit) { return (number + unit - 1) / unit; }

struct Grid {
  dim3 blocks;
  unsigned threads;
  int shared_bytes;
  cudaStream_t stream;
};

template <typename... Arguments>
void launch(void (*kernel)(Arguments...), const Grid& grid, const Arguments&... arguments) {
  constexpr int kWithoutAsking = 48 * 1024;
  if (grid.shared_bytes > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes));
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks, config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes, config.stream = grid.stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

Grid general_grid(const Problem& p, int64_t blocks, cudaStream_t stream) {
  constexpr int64_t kMostLevels = 4096;
  if (p.levels > kMostLevels) throw std::runtime_error("ms_deform_attn: spatial_shapes: more than 4096 levels");
  if (p.heads * p.channels > kMostBlocks || p.queries * p.points > kMostBlocks || p.levels * p.points > kMostBlocks)
    throw std::runtime_error("ms_deform_attn: more than 2^31 - 1 channels, points, or queries x points of a level");
  if (blocks > kMostBlocks) throw std::runtime_error("ms_deform_attn: too many queries or heads");
  const int shared_bytes = static_cast<int>(p.levels * sizeof(Level));
  return {dim3(static_cast<unsigned>(blocks)), kThreads, shared_bytes, stream};
}

Grid warp_per_pair(const Problem& p, cudaStream_t stream) {
  return general_grid(p, ceil_divide(p.batch * p.queries * p.heads, kThreads / kWarp), stream);
}

int forward_bytes(int groups, int points) {
  return SharedMemory::bytes_before_groups(points) + groups * forward_group_bytes(points);
}

int backward_bytes(int groups, int points, int channels) {
  return SharedMemory::bytes_before_groups(points) + BackwardMemory{nullptr, points, groups, channels}.bytes();
}

// The grid of a vector kernel whose groups have `lanes` threads of `numbers` channels: tiles as high as threads and memory
// allow, of which bytes(groups, points) are needed. None (no threads) where the kernel does not take the problem.
template <typename Bytes>
Grid tiled_grid(const Problem& p, int lanes, int numbers, const Bytes& bytes, cudaStream_t stream) {
  constexpr int kMostBytes = 64 * 1024;  // every card from compute capability 7.5 on has them; offsets fit 16 bits
  constexpr int64_t kMostPoints = 1024;  // far beyond what fits this memory
  Grid grid{dim3(), 0, 0, stream};
  constexpr int64_t kMost = int64_t(1) << 30;  // packs of value in an image, rows, pairs: numbers of 32 bits
  if (p.channels % numbers != 0 || p.channels > lanes * numbers) return grid;
  if (p.keys * p.heads * (p.channels / numbers) > kMost || p.batch * p.keys * p.heads > kMost) return grid;
  if (p.batch * p.queries * p.heads > kMost || p.samples() > kMostPoints) return grid;
  for (int rows = kTileHeight; rows > 0; rows /= 2) {
    const int groups = rows * kTileWidth, shared_bytes = bytes(groups, static_cast<int>(p.samples()));
    const int64_t full_tiles = ceil_divide(p.queries, groups);
    const int64_t tiles = full_tiles + full_tiles / 8 + p.levels;  // some for what is cut off at the levels' edges
    if (groups * lanes > kMostThreads || shared_bytes > kMostBytes) continue;
    if (tiles > kMostBlocksAcross || p.batch > kMostBlocksAcross) return grid;
    grid.blocks = dim3(static_cast<unsigned>(p.heads), static_cast<unsigned>(tiles), static_cast<unsigned>(p.batch));
    grid.threads = groups * lanes, grid.shared_bytes = shared_bytes;
    return grid;
  }
  return grid;
}

// Calls run(LANES) with the smallest number of lanes that hold the channels, as a compile-time constant.
template <int LANES>
struct Lanes {
  static constexpr int value = LANES;
};

template <typename Run>
void with_lanes(int64_t channels, int numbers, const Run& run) {
  if (channels <= 4 * numbers) return run(Lanes<4>());
  if (channels <= 8 * numbers) return run(Lanes<8>());
  run(Lanes<16>());
}

template <typename T, typename C, bool Fused>
struct Launch {
  static constexpr int V = 16 / sizeof(T);
  const Problem& p;
  cudaStream_t stream;

  // Whether it was done.
  bool vector_forward() const {
    bool done = false;
    if constexpr (V > 2) {
      with_lanes(p.channels, V, [&](auto lanes) {
        const Grid grid = tiled_grid(p, lanes.value, V, forward_bytes, stream);
        if ((done = grid.threads > 0)) launch(forward_kernel<T, C, lanes.value, Fused>, grid, p);
      });
    }
    return done;
  }

  bool vector_backward(bool scatter) const {
    bool done = false;
    if constexpr (V > 2) {
      with_lanes(p.channels, V, [&](auto lanes) {
        const auto bytes = [](int groups, int points) { return backward_bytes(groups, points, decltype(lanes)::value * V); };
        const Grid grid = tiled_grid(p, lanes.value, V, bytes, stream);
        if ((done = grid.threads > 0)) launch(backward_kernel<T, C, lanes.value, Fused>, grid, p, scatter);
      });
    }
    return done;
  }

  void forward() const {
    if (!vector_forward()) launch(general_forward_kernel<T, C, Fused>, warp_per_pair(p, stream), p);
  }

  void backward(bool deterministic) const {
    if (!vector_backward(!deterministic))
      launch(general_backward_kernel<T, C, Fused>, warp_per_pair(p, stream), p, !deterministic);
    if (deterministic)
      launch(ordered_kernel<T, C, Fused>, general_grid(p, p.batch * p.heads * kBlocksPerSlice, stream), p);
  }
};

// Calls run(launch) with the launch for the types of the problem.
template <typename T, typename C, typename Run>
void with_form(const Problem& p, void* stream, const Run& run) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.reference != nullptr)
    run(Launch<T, C, true>{p, on});
  else
    run(Launch<T, C, false>{p, on});
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
