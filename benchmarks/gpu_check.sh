#!/usr/bin/env bash
# Builds the operator, checks and times it on an NVIDIA GPU. Needs nvcc, a C++ compiler and PyTorch; no network.
#
#   benchmarks/gpu_check.sh [arguments of msda.py, such as --peer NAME for another build of the operator]
#
# Where pytest and hypothesis are installed, the operator's tests run; the comparison with float64 runs in any case.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/ops:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"

failed=""
check() {  # runs a command; a failure is remembered, so that the rest still runs
  "$@" || failed="$failed${failed:+; }$*"
}
find_sanitizer() {  # where ops/build.py looks for nvcc
  PATH="${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin" command -v compute-sanitizer
}
step() { printf '\n== %s\n' "$*"; }

step "Build"
SIM_M2F_OPERATOR=cuda python ops/build.py
python -c 'import torch, MultiScaleDeformableAttention as m; print(m.LOAD_ERROR or torch.ops.msda.build_info())
assert torch.cuda.is_available() and m.has_kernel(torch.device("cuda")), "no GPU, or no kernel for it"'

step "Comparison with float64 on the GPU"
check python benchmarks/msda.py --device cuda --check-only

if python -c 'import pytest, hypothesis' 2>/dev/null; then
  step "Tests"
  check python -m pytest -q --noconftest -p no:cacheprovider tests/test_ops_operator.py tests/test_ops_registration.py \
    tests/test_ops_random_shapes.py
else
  step "Tests left out: pytest and hypothesis are not installed"
fi

if sanitizer=$(find_sanitizer); then
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool"
    check "$sanitizer" --tool "$tool" --error-exitcode 1 python benchmarks/msda.py --device cuda --check-only
  done
else
  step "compute-sanitizer is not installed"
fi

step "Benchmark"
check python benchmarks/msda.py --device cuda --dtype float32 bfloat16 float16 float64 --compile "$@"

if [ -n "$failed" ]; then
  step "Failed: $failed"
  exit 1
fi
