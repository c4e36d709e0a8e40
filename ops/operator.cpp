// The operators `msda::*` on PyTorch's stable ABI: argument checks, result tensors, dispatch to CPU and CUDA kernels.
// Autograd, fake tensors and autocast are registered in Python (MultiScaleDeformableAttention/operators.py).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "problem.h"

// Of libtorch_cuda, which is absent from a CPU build of PyTorch: hence weak.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace msda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "ms_deform_attn: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string text(const Sizes& sizes) {
  std::string list = "(";
  for (size_t i = 0; i < sizes.size(); ++i) list += (i ? ", " : "") + std::to_string(sizes[i]);
  return list + ")";
}

Sizes sizes_of(const Tensor& tensor) { return Sizes(tensor.sizes().begin(), tensor.sizes().end()); }

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    default: return "another type";
  }
}

Type number_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::Half: return Type::f16;
    default: return Type::bf16;
  }
}

ScalarType accumulation_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks one argument against value: device, shape (where one is known) and type.
void check(const char* name, const Tensor& argument, const Tensor& value, const Sizes& shape) {
  if (argument.is_cuda() != value.is_cuda() || argument.get_device_index() != value.get_device_index())
    fail(name, ": is on another device than value");
  if (sizes_of(argument) != shape) fail(name, ": expected shape ", text(shape), ", got ", text(sizes_of(argument)));
}

void check_index(const char* name, const Tensor& argument, const Tensor& value, const Sizes& shape) {
  if (argument.scalar_type() != ScalarType::Long) fail(name, ": expected int64, got ", name_of(argument.scalar_type()));
  check(name, argument, value, shape);
}

void check_number(const char* name, const Tensor& argument, const Tensor& value, const Sizes& shape) {
  const ScalarType type = argument.scalar_type(), other = value.scalar_type();
  const bool mixed = type == ScalarType::Float && other != ScalarType::Double;
  const char* alternative = other == ScalarType::Half || other == ScalarType::BFloat16 ? " or float32" : "";
  if (type != other && !mixed) fail(name, ": expected ", name_of(other), alternative, ", got ", name_of(type));
  check(name, argument, value, shape);
}

// On the CPU the levels can be read without waiting for a device; the CUDA kernels check them themselves.
void check_levels(const Tensor& shapes, const Tensor& starts, int64_t keys) {
  const int64_t* shape = shapes.const_data_ptr<int64_t>();
  const int64_t* start = starts.const_data_ptr<int64_t>();
  for (int64_t level = 0; level < shapes.size(0); ++level) {
    const int64_t height = shape[2 * level], width = shape[2 * level + 1];
    if (height < 0 || width < 0 || height > keys || width > keys)
      fail("spatial_shapes: level ", level, " of ", height, " x ", width, " does not fit value of length ", keys);
    if (start[level] < 0 || start[level] > keys - height * width)
      fail("level_start_index: level ", level, " of ", height, " x ", width, " from ", start[level],
           " on exceeds value of length ", keys);
  }
}

// Contiguous, and at a multiple of 16 bytes, as vector loads need it (a slice of a larger tensor may begin anywhere).
Tensor dense(const Tensor& tensor) {
  const Tensor contiguous = torch::stable::contiguous(tensor);
  const bool aligned = reinterpret_cast<uintptr_t>(contiguous.const_data_ptr()) % 16 == 0;
  return aligned ? contiguous : torch::stable::clone(contiguous);
}

// The arguments, checked, dense and in the types that the kernels take.
struct Arguments {
  Tensor value, shapes, starts, locations, weights;
  std::optional<Tensor> reference;
  Problem problem{};

  Arguments(const Tensor& value_, const Tensor& shapes_, const Tensor& starts_, const Tensor& locations_,
            const Tensor& weights_, const std::optional<Tensor>& reference_) {
    check_all(value_, shapes_, starts_, locations_, weights_, reference_);
    const bool same = locations_.scalar_type() == value_.scalar_type() && weights_.scalar_type() == value_.scalar_type();
    const ScalarType point_type = same ? value_.scalar_type() : ScalarType::Float;
    value = dense(value_);
    shapes = dense(shapes_);
    starts = dense(starts_);
    locations = dense(torch::stable::to(locations_, point_type));
    weights = dense(torch::stable::to(weights_, point_type));
    problem.batch = value.size(0), problem.keys = value.size(1);
    problem.heads = value.size(2), problem.channels = value.size(3);
    problem.queries = locations.size(1), problem.levels = shapes.size(0), problem.points = locations.size(4);
    problem.value_type = number_type(value.scalar_type());
    problem.point_type = number_type(point_type);
    problem.value = value.const_data_ptr();
    problem.shapes = shapes.const_data_ptr<int64_t>();
    problem.starts = starts.const_data_ptr<int64_t>();
    problem.locations = locations.const_data_ptr();
    problem.weights = weights.const_data_ptr();
    if (reference_) set_reference(torch::stable::to(*reference_, accumulation_type(value)));
    if (!value.is_cuda()) check_levels(shapes, starts, problem.keys);
  }

 private:
  static void check_all(const Tensor& value, const Tensor& shapes, const Tensor& starts, const Tensor& locations,
                        const Tensor& weights, const std::optional<Tensor>& reference) {
    const ScalarType type = value.scalar_type();
    if (type != ScalarType::Float && type != ScalarType::Double && type != ScalarType::Half && type != ScalarType::BFloat16)
      fail("value: expected float32, float64, float16 or bfloat16, got ", name_of(type));
    if (value.dim() != 4) fail("value: expected shape (N, S, M, D), got ", text(sizes_of(value)));
    if (value.size(1) > kMostKeys) fail("value: more than ", kMostKeys, " positions");
    if (shapes.dim() != 2) fail("spatial_shapes: expected shape (L, 2), got ", text(sizes_of(shapes)));
    const char* name = reference ? "sampling_offsets" : "sampling_locations";
    if (locations.dim() != 6) fail(name, ": expected shape (N, Q, M, L, P, 2), got ", text(sizes_of(locations)));
    const int64_t batch = value.size(0), heads = value.size(2), levels = shapes.size(0);
    const int64_t queries = locations.size(1), points = locations.size(4);
    check_index("spatial_shapes", shapes, value, {levels, 2});
    check_index("level_start_index", starts, value, {levels});
    check_number(name, locations, value, {batch, queries, heads, levels, points, 2});
    check_number(reference ? "attention_logits" : "attention_weights", weights, value, {batch, queries, heads, levels, points});
    if (reference) check_number("reference_points", *reference, value, {batch, queries, levels, 2});
  }

  void set_reference(const Tensor& points) {
    reference = points.stride(3) == 1 ? points : dense(points);
    problem.reference = reference->const_data_ptr();
    for (int i = 0; i < 3; ++i) problem.reference_strides[i] = reference->stride(i);
  }

  static constexpr int64_t kMostKeys = (1LL << 31) - 1024;  // kernels number them in 32 bits, and a few beyond
};

#ifdef MSDA_CUDA
void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr) fail("value: this PyTorch has no CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}
#endif

Tensor run_forward(Arguments& arguments) {
  Problem& p = arguments.problem;
  const Sizes shape = {p.batch, p.queries, p.heads * p.channels};
  if (p.samples() == 0) return torch::stable::new_zeros(arguments.value, shape);
  Tensor output = torch::stable::new_empty(arguments.value, shape);
  if (output.numel() == 0) return output;
  p.output = output.mutable_data_ptr();
#ifdef MSDA_CUDA
  if (output.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(output.get_device_index());
    cuda_forward(p, current_stream(output));
    return output;
  }
#endif
  cpu_forward(p);
  return output;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // of value, locations, weights

// Atomic additions need zeros in the accumulation type; the CPU kernels write every number of the gradient themselves.
Tensor new_grad_value(const Tensor& value) {
  if (!value.is_cuda()) return torch::stable::new_empty(value, sizes_of(value));
  return torch::stable::new_zeros(value, sizes_of(value), accumulation_type(value));
}

Gradients run_backward(Arguments& arguments, const Tensor& grad_output_, bool deterministic) {
  Problem& p = arguments.problem;
  const Tensor& value = arguments.value;
  const Sizes shape = {p.batch, p.queries, p.heads * p.channels};
  check_number("grad_output", grad_output_, value, shape);
  const Tensor grad_output = dense(torch::stable::to(grad_output_, value.scalar_type()));
  if (grad_output.numel() == 0 || p.samples() == 0)
    return {torch::stable::new_zeros(value, sizes_of(value)),
            torch::stable::new_zeros(arguments.locations, sizes_of(arguments.locations)),
            torch::stable::new_zeros(arguments.weights, sizes_of(arguments.weights))};
  Tensor grad_value = new_grad_value(value);
  const Tensor grad_locations = torch::stable::new_empty(arguments.locations, sizes_of(arguments.locations));
  const Tensor grad_weights =
      torch::stable::new_empty(arguments.weights, sizes_of(arguments.weights), accumulation_type(value));
  p.grad_output = grad_output.const_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  p.grad_locations = grad_locations.mutable_data_ptr();
  p.grad_weights = grad_weights.mutable_data_ptr();
#ifdef MSDA_CUDA
  if (value.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
    cuda_backward(p, deterministic, current_stream(value));
    return {torch::stable::to(grad_value, value.scalar_type()), grad_locations, grad_weights};
  }
#endif
  static_cast<void>(deterministic);  // the CPU kernels always are
  cpu_backward(p);
  return {grad_value, grad_locations, grad_weights};
}

Tensor forward(Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights) {
  Arguments arguments(value, shapes, starts, locations, weights, std::nullopt);
  return run_forward(arguments);
}

Gradients backward(Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights, Tensor grad_output,
                   bool deterministic) {
  Arguments arguments(value, shapes, starts, locations, weights, std::nullopt);
  const auto [grad_value, grad_locations, grad_weights] = run_backward(arguments, grad_output, deterministic);
  return {grad_value, torch::stable::to(grad_locations, locations.scalar_type()),
          torch::stable::to(grad_weights, weights.scalar_type())};
}

Tensor fused_forward(Tensor value, Tensor shapes, Tensor starts, Tensor reference, Tensor offsets, Tensor logits) {
  Arguments arguments(value, shapes, starts, offsets, logits, reference);
  return run_forward(arguments);
}

Gradients fused_backward(Tensor value, Tensor shapes, Tensor starts, Tensor reference, Tensor offsets, Tensor logits,
                         Tensor grad_output, bool deterministic) {
  Arguments arguments(value, shapes, starts, offsets, logits, reference);
  const auto [grad_value, grad_offsets, grad_logits] = run_backward(arguments, grad_output, deterministic);
  return {grad_value, torch::stable::to(grad_offsets, offsets.scalar_type()),
          torch::stable::to(grad_logits, logits.scalar_type())};
}

// "CPU: <instruction set>; CUDA: <compute capabilities>" for `sim-m2f doctor`.
std::string build_info() {
  std::string info = std::string("CPU ") + cpu_instructions();
#ifdef MSDA_CUDA
  info += std::string("; CUDA ") + MSDA_CUDA;
#endif
  return info;
}

}  // namespace
}  // namespace msda

STABLE_TORCH_LIBRARY(msda, library) {
  library.def(
      "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  library.def(
      "ms_deform_attn_backward(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
      "Tensor attention_weights, Tensor grad_output, bool deterministic) -> (Tensor, Tensor, Tensor)");
  library.def(
      "ms_deform_attn_fused(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor reference_points, "
      "Tensor sampling_offsets, Tensor attention_logits) -> Tensor");
  library.def(
      "ms_deform_attn_fused_backward(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, Tensor grad_output, "
      "bool deterministic) -> (Tensor, Tensor, Tensor)");
  library.def("build_info() -> str");
}

#define MSDA_IMPLEMENT(library)                                                       \
  library.impl("ms_deform_attn", TORCH_BOX(&msda::forward));                          \
  library.impl("ms_deform_attn_backward", TORCH_BOX(&msda::backward));                \
  library.impl("ms_deform_attn_fused", TORCH_BOX(&msda::fused_forward));              \
  library.impl("ms_deform_attn_fused_backward", TORCH_BOX(&msda::fused_backward))

STABLE_TORCH_LIBRARY_IMPL(msda, CPU, library) { MSDA_IMPLEMENT(library); }

#ifdef MSDA_CUDA
STABLE_TORCH_LIBRARY_IMPL(msda, CUDA, library) { MSDA_IMPLEMENT(library); }
#endif

STABLE_TORCH_LIBRARY_IMPL(msda, CompositeExplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&msda::build_info));
}
