// CPU kernels. Compiled once per instruction set: MSDA_KERNELS names the table of kernels, MSDA_NAME the instruction set
// and MSDA_VECTOR_BYTES the width of its vectors. Nothing here is visible outside but the table: a function with external
// linkage could be the copy that the linker keeps for all instruction sets.
#include "cpu_kernels.h"

#include <cstring>
#include <initializer_list>

#include "cpu_numbers.h"
#include "sampling.h"

namespace msda {
namespace {

template <typename A, int Bytes = MSDA_VECTOR_BYTES>
struct VectorOf {
  typedef A type __attribute__((vector_size(Bytes), may_alias));
  static constexpr int64_t lanes = Bytes / sizeof(A);
};

template <typename A>
using Vector = typename VectorOf<A>::type;

// Sum of the lanes: halves are added until 16 bytes are left.
template <typename A, int Bytes = MSDA_VECTOR_BYTES>
inline A sum(const typename VectorOf<A, Bytes>::type& vector) {
  if constexpr (Bytes > 16) {
    typename VectorOf<A, Bytes / 2>::type low, high;
    std::memcpy(&low, &vector, Bytes / 2);
    std::memcpy(&high, reinterpret_cast<const char*>(&vector) + Bytes / 2, Bytes / 2);
    return sum<A, Bytes / 2>(low + high);
  } else if constexpr (VectorOf<A, Bytes>::lanes == 4) {
    return (vector[0] + vector[2]) + (vector[1] + vector[3]);
  } else {
    return vector[0] + vector[1];
  }
}

int64_t round_up(int64_t number, int64_t unit) { return (number + unit - 1) / unit * unit; }

template <typename A>
int64_t row_width(const Problem& p) {
  return round_up(p.channels, VectorOf<A>::lanes);
}

// exp(x) for x <= 0, the numerator of a softmax: 2^n times the series of e^r for |r| <= log(2) / 2, to the rounding of float.
inline float exponential(float x) {
  const float bounded = x > -87.0f ? x : -87.0f;
  const int32_t n = static_cast<int32_t>(bounded * 1.44269504f - 0.5f);
  const float r = (x - static_cast<float>(n) * 0.693359375f) + static_cast<float>(n) * 2.12194440e-4f;
  float series = 1.0f / 5040;
  for (const float inverse : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * r + inverse;
  return x < -87.0f ? 0.0f : series * as_float(static_cast<uint32_t>(n + 127) << 23);
}

inline double exponential(double x) { return __builtin_exp(x); }

// The sampling points of one query and head, as columns. `count` is levels x points.
template <typename A>
struct Points {
  int64_t count;
  int64_t padded;  // whole vectors; the points beyond `count` have no weight on a level without pixels
  const int32_t *width, *height, *start;  // of the point's level
  const int32_t *band_begin, *band_end;   // the lines of that level that belong to the band
  A *pair;                                // 2 x count numbers as they lie in memory
  A *x, *y, *shift_x, *shift_y;           // see sampling.h
  A *attention;
  int32_t *x_low, *y_low;
  A *x_fraction, *y_fraction;
  int32_t* row[4];  // of every corner; `keys`, the row of zeros, when it lies outside
  A* weight[4];     // bilinear times attention
  A* dot[4];
  A *channel, *grad_channel;  // one row of the output, its gradient

  static int64_t bytes(const Problem& p) {
    const int64_t column = round_up(p.samples() * sizeof(A), kAlignment), row = row_width<A>(p) * sizeof(A);
    return 28 * column + 2 * round_up(row, kAlignment);  // what the constructor takes
  }

  Points(const Problem& p, void* scratch, int64_t band = 0, int64_t bands = 1)
      : count(p.samples()), padded(round_up(count, VectorOf<A>::lanes)) {
    char* next = static_cast<char*>(scratch);
    const int64_t column_bytes = round_up(count * sizeof(A), kAlignment);
    const auto take = [&](int64_t size) {
      char* taken = next;
      next += round_up(size, kAlignment);
      return taken;
    };
    const auto numbers = [&] { return reinterpret_cast<A*>(take(column_bytes)); };
    const auto integers = [&] { return reinterpret_cast<int32_t*>(take(column_bytes)); };
    pair = reinterpret_cast<A*>(take(2 * column_bytes));
    x = numbers(), y = numbers(), shift_x = numbers(), shift_y = numbers(), attention = numbers();
    x_low = integers(), y_low = integers(), x_fraction = numbers(), y_fraction = numbers();
    for (int i = 0; i < 4; ++i) row[i] = integers(), weight[i] = numbers(), dot[i] = numbers();
    channel = reinterpret_cast<A*>(take(row_width<A>(p) * sizeof(A)));
    grad_channel = reinterpret_cast<A*>(take(row_width<A>(p) * sizeof(A)));
    int32_t* const column[5] = {integers(), integers(), integers(), integers(), integers()};
    for (int64_t k = count; k < padded; ++k) {
      x[k] = y[k] = shift_x[k] = shift_y[k] = attention[k] = 0;
      for (int32_t* numbers : column) numbers[k] = 0;
    }
    for (int64_t k = 0; k < count; ++k) {
      const int64_t level = k / p.points, lines = p.shapes[2 * level];
      column[0][k] = static_cast<int32_t>(p.shapes[2 * level + 1]);
      column[1][k] = static_cast<int32_t>(lines);
      column[2][k] = static_cast<int32_t>(p.starts[level]);
      column[3][k] = static_cast<int32_t>(band * lines / bands);
      column[4][k] = static_cast<int32_t>((band + 1) * lines / bands);
      shift_x[k] = shift_y[k] = A(-0.5);
    }
    width = column[0], height = column[1], start = column[2], band_begin = column[3], band_end = column[4];
  }
};

// Softmax of the first `count` logits in `numbers`, in place. Up to `padded` the numbers are zero, before and after.
template <typename A>
void softmax(A* numbers, int64_t count, int64_t padded) {
  A largest = numbers[0];
  for (int64_t k = 1; k < count; ++k) largest = numbers[k] > largest ? numbers[k] : largest;
  for (int64_t k = count; k < padded; ++k) numbers[k] = largest;
  for (int64_t k = 0; k < padded; ++k) numbers[k] = exponential(numbers[k] - largest);
  for (int64_t k = count; k < padded; ++k) numbers[k] = 0;
  A total = 0;
  for (int64_t k = 0; k < count; ++k) total += numbers[k];
  for (int64_t k = 0; k < padded; ++k) numbers[k] /= total;
}

// Reads locations and weights of a query: the columns x, y, shift_x, shift_y and attention.
template <typename A>
void read_points(const Problem& p, int64_t image, int64_t query, int64_t head, Points<A>& s) {
  const int64_t first = ((image * p.queries + query) * p.heads + head) * s.count;
  load(p.locations, p.point_type, 2 * first, 2 * s.count, s.pair);
  load(p.weights, p.point_type, first, s.count, s.attention);
  if (p.reference == nullptr) {
    for (int64_t k = 0; k < s.count; ++k) s.x[k] = s.pair[2 * k], s.y[k] = s.pair[2 * k + 1];
    return;
  }
  for (int64_t k = 0; k < s.count; ++k)
    s.shift_x[k] = s.pair[2 * k] - A(0.5), s.shift_y[k] = s.pair[2 * k + 1] - A(0.5);
  for (int64_t level = 0; level < p.levels; ++level) {
    const int64_t* stride = p.reference_strides;
    const A* centre = static_cast<const A*>(p.reference) + image * stride[0] + query * stride[1] + level * stride[2];
    for (int64_t k = level * p.points; k < (level + 1) * p.points; ++k) s.x[k] = centre[0], s.y[k] = centre[1];
  }
  softmax(s.attention, s.count, s.padded);
}

// Finds the corners: the columns low, fraction, row and weight.
template <typename A>
void find_corners(const Problem& p, Points<A>& s) {
  const int32_t outside = static_cast<int32_t>(p.keys);
#pragma GCC ivdep
  for (int64_t k = 0; k < s.padded; ++k) {
    const AxisPoint<A> x = locate(s.x[k], s.shift_x[k], s.width[k]), y = locate(s.y[k], s.shift_y[k], s.height[k]);
    A weight[4];
    corner_weights(x, y, s.attention[k], weight);
    s.x_low[k] = x.low, s.y_low[k] = y.low, s.x_fraction[k] = x.fraction, s.y_fraction[k] = y.fraction;
    const int32_t first = s.start[k] + y.low * s.width[k] + x.low;
    s.row[0][k] = in_level(x.low, y.low, s.width[k], s.height[k]) ? first : outside;
    s.row[1][k] = in_level(x.low + 1, y.low, s.width[k], s.height[k]) ? first + 1 : outside;
    s.row[2][k] = in_level(x.low, y.low + 1, s.width[k], s.height[k]) ? first + s.width[k] : outside;
    s.row[3][k] = in_level(x.low + 1, y.low + 1, s.width[k], s.height[k]) ? first + s.width[k] + 1 : outside;
    s.weight[0][k] = weight[0], s.weight[1][k] = weight[1], s.weight[2][k] = weight[2], s.weight[3][k] = weight[3];
  }
}

// Calls step(first channel, number of vectors) for blocks of 4, 2 and 1 vectors; the number is a compile-time constant.
template <int V>
struct Count {
  static constexpr int value = V;
};

template <typename A, typename Step>
inline void for_channel_blocks(int64_t width, const Step& step) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  int64_t channel = 0;
  for (; width - channel >= 4 * lanes; channel += 4 * lanes) step(channel, Count<4>());
  if (width - channel >= 2 * lanes) step(channel, Count<2>()), channel += 2 * lanes;
  if (width - channel >= lanes) step(channel, Count<1>());
}

template <typename A>
inline const Vector<A>* vectors(const A* rows, int64_t row, int64_t width, int64_t channel) {
  return reinterpret_cast<const Vector<A>*>(rows + row * width + channel);
}

template <typename A>
inline Vector<A>* vectors(A* rows, int64_t row, int64_t width, int64_t channel) {
  return reinterpret_cast<Vector<A>*>(rows + row * width + channel);
}

template <typename A, int V>
inline void gather(const Points<A>& s, const A* rows, int64_t width, int64_t channel) {
  Vector<A> total[2][V] = {};  // of both lines, so that an addition need not wait for the one before
  for (int64_t k = 0; k < s.count; ++k) {
    for (int corner = 0; corner < 4; ++corner) {
      const Vector<A>* value = vectors(rows, s.row[corner][k], width, channel);
      for (int v = 0; v < V; ++v) total[corner / 2][v] += s.weight[corner][k] * value[v];
    }
  }
  for (int v = 0; v < V; ++v) vectors(s.channel, 0, width, channel)[v] = total[0][v] + total[1][v];
}

template <typename A>
void forward(const Problem& p, int64_t slice, int64_t begin, int64_t end, const void* rows, void* scratch) {
  const int64_t image = slice / p.heads, head = slice % p.heads, width = row_width<A>(p);
  Points<A> s(p, scratch);
  for (int64_t query = begin; query < end; ++query) {
    read_points(p, image, query, head, s);
    find_corners(p, s);
    for_channel_blocks<A>(width, [&](int64_t channel, auto vectors) {
      gather<A, decltype(vectors)::value>(s, static_cast<const A*>(rows), width, channel);
    });
    store(s.channel, p.channels, p.output, p.value_type, ((image * p.queries + query) * p.heads + head) * p.channels);
  }
}

// Dot products with the value and additions to its gradient, for one point. `grad_row` are rows of the gradient.
template <typename A, int V>
inline void scatter(Points<A>& s, int64_t k, const int32_t grad_row[4], const A* rows, A* grad_rows, int64_t width,
                    int64_t channel) {
  const Vector<A>* gradient = vectors(static_cast<const A*>(s.grad_channel), 0, width, channel);
  for (int corner = 0; corner < 4; ++corner) {
    const Vector<A>* value = vectors(rows, s.row[corner][k], width, channel);
    Vector<A>* grad_value = vectors(grad_rows, grad_row[corner], width, channel);
    Vector<A> product = {};
    for (int v = 0; v < V; ++v) {
      product += gradient[v] * value[v];
      grad_value[v] += s.weight[corner][k] * gradient[v];
    }
    s.dot[corner][k] += sum<A>(product);
  }
}

// The gradients of the value rows (in grad_rows) and of the dot products of point k, as far as the band is concerned.
// Returns whether the point is the band's own, that is, whether it reports the gradients of its location and weight.
template <typename A>
inline bool scatter_point(const Problem& p, Points<A>& s, int64_t k, int64_t band, const A* rows, A* grad_rows) {
  const int32_t line = s.y_low[k] < 0 ? 0 : s.y_low[k];
  const bool own = s.height[k] > 0 ? line >= s.band_begin[k] && line < s.band_end[k] : band == 0;
  const int32_t nowhere = static_cast<int32_t>(p.keys), trash = static_cast<int32_t>(p.keys + band);
  int32_t grad_row[4];
  bool needed = own;
  for (int corner = 0; corner < 4; ++corner) {
    const int32_t y = s.y_low[k] + corner / 2;
    const bool here = s.row[corner][k] != nowhere && y >= s.band_begin[k] && y < s.band_end[k];
    grad_row[corner] = here ? s.row[corner][k] : trash;
    needed |= here;
  }
  const int64_t width = row_width<A>(p);
  if (needed) {
    for_channel_blocks<A>(width, [&](int64_t channel, auto vectors) {
      scatter<A, decltype(vectors)::value>(s, k, grad_row, rows, grad_rows, width, channel);
    });
  }
  return own;
}

// Writes the gradients of locations and attention weights of the points [begin, end) of a query and head, from their dot products.
template <typename A>
void store_point_gradients(const Problem& p, Points<A>& s, int64_t first, int64_t begin, int64_t end) {
  const bool fused = p.reference != nullptr;
  A* grad_weights = static_cast<A*>(p.grad_weights) + first;
#pragma GCC ivdep
  for (int64_t k = begin; k < end; ++k) {
    const A dot[4] = {s.dot[0][k], s.dot[1][k], s.dot[2][k], s.dot[3][k]};
    const AxisPoint<A> x{s.x_low[k], s.x_fraction[k]}, y{s.y_low[k], s.y_fraction[k]};
    const PointGradient<A> gradient = point_gradient(x, y, s.attention[k], dot);
    s.pair[2 * k] = gradient.x * (fused ? A(1) : A(s.width[k]));
    s.pair[2 * k + 1] = gradient.y * (fused ? A(1) : A(s.height[k]));
    grad_weights[k] = gradient.weight;
  }
  store(s.pair + 2 * begin, 2 * (end - begin), p.grad_locations, p.point_type, 2 * (first + begin));
}

template <typename A>
void backward(const Problem& p, int64_t slice, int64_t band, int64_t bands, const void* rows, void* grad_rows, void* scratch) {
  const int64_t image = slice / p.heads, head = slice % p.heads;
  Points<A> s(p, scratch, band, bands);
  for (int64_t c = 0; c < row_width<A>(p); ++c) s.grad_channel[c] = 0;
  for (int64_t query = 0; query < p.queries; ++query) {
    const int64_t pair = (image * p.queries + query) * p.heads + head;
    load(p.grad_output, p.value_type, pair * p.channels, p.channels, s.grad_channel);
    read_points(p, image, query, head, s);
    find_corners(p, s);
    for (int corner = 0; corner < 4; ++corner)
      for (int64_t k = 0; k < s.count; ++k) s.dot[corner][k] = 0;
    int64_t begin = 0;  // of the run of own points that has not been written yet
    for (int64_t k = 0; k < s.count; ++k) {
      if (scatter_point(p, s, k, band, static_cast<const A*>(rows), static_cast<A*>(grad_rows))) continue;
      store_point_gradients(p, s, pair * s.count, begin, k);
      begin = k + 1;
    }
    store_point_gradients(p, s, pair * s.count, begin, s.count);
  }
}

template <typename A>
void softmax_backward(const Problem& p, int64_t slice, int64_t begin, int64_t end, void* scratch) {
  const int64_t image = slice / p.heads, head = slice % p.heads;
  Points<A> s(p, scratch);
  for (int64_t query = begin; query < end; ++query) {
    const int64_t first = ((image * p.queries + query) * p.heads + head) * s.count;
    A* gradient = static_cast<A*>(p.grad_weights) + first;
    load(p.weights, p.point_type, first, s.count, s.attention);
    softmax(s.attention, s.count, s.padded);
    A mean = 0;
    for (int64_t k = 0; k < s.count; ++k) mean += s.attention[k] * gradient[k];
    for (int64_t k = 0; k < s.count; ++k) gradient[k] = s.attention[k] * (gradient[k] - mean);
  }
}

template <typename A>
void pack(const Problem& p, int64_t slice, int64_t begin, int64_t end, void* rows) {
  const int64_t image = slice / p.heads, head = slice % p.heads, width = row_width<A>(p);
  A* row = static_cast<A*>(rows) + begin * width;
  for (int64_t key = begin; key < end; ++key, row += width) {
    load(p.value, p.value_type, ((image * p.keys + key) * p.heads + head) * p.channels, p.channels, row);
    for (int64_t c = p.channels; c < width; ++c) row[c] = 0;
  }
}

template <typename A>
void unpack(const Problem& p, int64_t slice, int64_t begin, int64_t end, const void* grad_rows) {
  const int64_t image = slice / p.heads, head = slice % p.heads, width = row_width<A>(p);
  const A* row = static_cast<const A*>(grad_rows) + begin * width;
  for (int64_t key = begin; key < end; ++key, row += width)
    store(row, p.channels, p.grad_value, p.value_type, ((image * p.keys + key) * p.heads + head) * p.channels);
}

template <typename A>
constexpr Kernels kTable = {MSDA_NAME, sizeof(A),  row_width<A>, Points<A>::bytes,   pack<A>,
                            unpack<A>, forward<A>, backward<A>,  softmax_backward<A>};

}  // namespace

const Kernels& MSDA_KERNELS(bool f64) { return f64 ? kTable<double> : kTable<float>; }

}  // namespace msda
