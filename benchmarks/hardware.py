"""The machine that a measurement was taken on, for the results files."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch


def describe() -> dict[str, str | int]:
    """Processor, cores, GPU, and the versions that matter; those of CUDA where there is a GPU."""
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if cpuinfo.exists()
        else []
    )
    has_gpu = torch.cuda.is_available()
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": os.cpu_count() or 0,
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"cuda": torch.version.cuda or "none", "driver": driver_version()} if has_gpu else {}),
    }


def driver_version() -> str:
    """Of the first NVIDIA GPU, "unknown" without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return answer[0] if answer else "unknown"
