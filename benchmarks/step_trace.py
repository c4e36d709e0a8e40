"""Counts what a profiler's trace holds: operator calls, kernel launches, synchronisations, copies."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel")  # and ...ExC, ...Ex
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaEventSynchronize")  # those of the device are the profiler's
OPERATORS = ("aten::", "msda::", "torchvision::")
TOP = 15

Event = dict[str, Any]


def profiled(work: Callable[[], object]) -> dict[str, Any]:
    """The counts of a piece of work, run once."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return counts(events)


def counts(events: Sequence[Event]) -> dict[str, Any]:
    """The counts of a Chrome trace.

    "operator_calls" are those made by Python or by autograd, "all_operator_calls" also those that operators
    make; "item_calls" read a number from a tensor; times are milliseconds.
    """
    kernels = [event for event in events if event.get("cat") == "kernel"]
    runtime = [event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    copies = Counter(direction(event["name"]) for event in events if event.get("cat") == "gpu_memcpy")
    operators = [
        event
        for event in events
        if event.get("cat") == "cpu_op" and event["name"].startswith(OPERATORS) and "dur" in event
    ]
    waits = Counter(name for name in runtime if name.startswith(SYNCHRONISATIONS))
    return {
        "operator_calls": len(outermost(operators)),
        "all_operator_calls": len(operators),
        "item_calls": sum(event["name"] == "aten::_local_scalar_dense" for event in operators),
        "casts": sum(event["name"] == "aten::_to_copy" for event in operators),
        "launches": sum(name.startswith(LAUNCHES) for name in runtime),
        "synchronisations": dict(waits),
        "copies": dict(copies),
        "kernel_ms": sum(event["dur"] for event in kernels) / 1e3,
        "top_kernels": top(kernels),
        "top_operators": top(outermost(operators)),
    }


def direction(name: str) -> str:
    """ "DtoH" of "Memcpy DtoH (Device -> Pageable)"."""
    return name.split()[1] if len(name.split()) > 1 else name


def outermost(operators: Iterable[Event]) -> list[Event]:
    """Those that no other one of the same thread contains."""
    found: list[Event] = []
    end: dict[Any, float] = {}
    for event in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        thread = event.get("tid")
        if event["ts"] >= end.get(thread, float("-inf")):
            found.append(event)
            end[thread] = event["ts"] + event["dur"]
    return found


def top(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The names that take most time, with milliseconds and calls."""
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        times[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    return [
        {"name": name[:160], "ms": round(time / 1e3, 3), "calls": calls[name]}
        for name, time in times.most_common(TOP)
    ]
