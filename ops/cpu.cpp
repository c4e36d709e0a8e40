// The CPU side of the operator: picks the instruction set, shares the work among PyTorch's threads. Every number of every
// result is computed by one thread in a fixed order, so results depend neither on the number of threads nor on the run.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include "cpu_kernels.h"

namespace msda {
namespace {

using KernelsOf = const Kernels& (*)(bool f64);

// The best that the processor has, and not more than ATEN_CPU_CAPABILITY allows, PyTorch's own variable for its kernels.
KernelsOf choose_kernels() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = variable != nullptr ? variable : "avx512";
  __builtin_cpu_init();
  if (most == "default") return baseline_kernels;
  if (most != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw"))
    return avx512_kernels;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels;
#endif
  return baseline_kernels;
}

const Kernels& kernels(bool f64) {
  static const KernelsOf chosen = choose_kernels();
  return chosen(f64);
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

class Buffer {
 public:
  explicit Buffer(int64_t bytes) {
    const int64_t size = std::max<int64_t>(1, (bytes + kAlignment - 1) / kAlignment) * kAlignment;
    memory_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, size)));
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  char* at(int64_t offset = 0) const { return memory_.get() + offset; }

 private:
  std::unique_ptr<char, Free> memory_;
};

// Runs body(item, begin, end) over the rows [0, rows) of every item, in parallel over items and rows.
template <typename Body>
void for_rows(int64_t items, int64_t rows, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, items * rows, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t item = begin / rows, stop = std::min(end, (item + 1) * rows);
      body(item, begin - item * rows, stop - item * rows);
      begin = stop;
    }
  });
}

constexpr int64_t kKeyGrain = 1024, kQueryGrain = 16;  // rows that are worth a thread

// The packed rows of a group of slices. There are as many slices in a group as threads, so that memory stays small.
class Rows {
 public:
  Rows(const Problem& p, const Kernels& kernels, int64_t slices, int64_t spare_rows)
      : row_bytes_(kernels.width(p) * kernels.number_bytes), rows_(p.keys + spare_rows), buffer_(slices * rows_ * row_bytes_) {}

  char* slice(int64_t index, int64_t row = 0) const { return buffer_.at((index * rows_ + row) * row_bytes_); }
  void clear(int64_t index, int64_t begin, int64_t end) const {
    std::fill(slice(index, begin), slice(index, end), '\0');
  }

 private:
  int64_t row_bytes_, rows_;
  Buffer buffer_;
};

void pack(const Problem& p, const Kernels& k, const Rows& rows, int64_t first_slice, int64_t slices) {
  for (int64_t i = 0; i < slices; ++i) rows.clear(i, p.keys, p.keys + 1);
  for_rows(slices, p.keys, kKeyGrain,
           [&](int64_t i, int64_t begin, int64_t end) { k.pack(p, first_slice + i, begin, end, rows.slice(i)); });
}

// Into how many bands to cut each slice, so that `slices` x bands tasks keep the threads evenly busy. A band costs a little.
int64_t choose_bands(int64_t slices, int64_t threads) {
  constexpr int64_t kMost = 16;
  int64_t best = 1;
  double best_time = 0;
  for (int64_t bands = 1; bands <= kMost; ++bands) {
    const int64_t rounds = (slices * bands + threads - 1) / threads;
    const double time = rounds * (1.0 / bands + 0.02);
    if (bands == 1 || time < best_time) best = bands, best_time = time;
  }
  return best;
}

}  // namespace

const char* cpu_instructions() { return kernels(false).name; }

void cpu_forward(const Problem& p) {
  const Kernels& k = kernels(p.value_type == Type::f64);
  const int64_t slices = p.batch * p.heads, group = std::min<int64_t>(slices, torch::stable::get_num_threads());
  const Rows rows(p, k, group, 1);
  for (int64_t first = 0; first < slices; first += group) {
    const int64_t count = std::min(group, slices - first);
    pack(p, k, rows, first, count);
    for_rows(count, p.queries, kQueryGrain, [&](int64_t i, int64_t begin, int64_t end) {
      const Buffer scratch(k.scratch_bytes(p));
      k.forward(p, first + i, begin, end, rows.slice(i), scratch.at());
    });
  }
}

void cpu_backward(const Problem& p) {
  const Kernels& k = kernels(p.value_type == Type::f64);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t slices = p.batch * p.heads, group = std::min(slices, threads), bands = choose_bands(group, threads);
  const Rows rows(p, k, group, 1), grad_rows(p, k, group, bands);
  for (int64_t first = 0; first < slices; first += group) {
    const int64_t count = std::min(group, slices - first);
    pack(p, k, rows, first, count);
    for_rows(count, p.keys + bands, kKeyGrain,
             [&](int64_t i, int64_t begin, int64_t end) { grad_rows.clear(i, begin, end); });
    torch::stable::parallel_for(0, count * bands, 1, [&](int64_t begin, int64_t end) {
      const Buffer scratch(k.scratch_bytes(p));
      for (int64_t task = begin; task < end; ++task)
        k.backward(p, first + task / bands, task % bands, bands, rows.slice(task / bands), grad_rows.slice(task / bands),
                   scratch.at());
    });
    if (p.reference != nullptr)
      for_rows(count, p.queries, kQueryGrain, [&](int64_t i, int64_t begin, int64_t end) {
        const Buffer scratch(k.scratch_bytes(p));
        k.softmax_backward(p, first + i, begin, end, scratch.at());
      });
    for_rows(count, p.keys, kKeyGrain,
             [&](int64_t i, int64_t begin, int64_t end) { k.unpack(p, first + i, begin, end, grad_rows.slice(i)); });
  }
}

}  // namespace msda
