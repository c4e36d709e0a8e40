"""The operator's benchmark: what it measures is what it says, and what it has measured is kept."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_msda", ROOT / "benchmarks/msda.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_case_is_compiled_anew(benchmark, monkeypatch):
    """A case takes two compilations, one for each direction, as many as are allowed here."""
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_function(function, backend="eager"))
    name = f"compiled {benchmark.GRID_SAMPLE}"
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for dtype in (torch.float32, torch.float64):
            inputs = benchmark.make_inputs("tiny", True, dtype, "cpu")
            assert "error" not in benchmark.measure([name], inputs, "cpu", 1)[name]


def test_finished_cases_are_written_at_once(benchmark, monkeypatch, tmp_path):
    finished = iter([{benchmark.OWN: {"error": "none"}}])
    monkeypatch.setattr(benchmark, "measure", lambda *arguments: next(finished))
    monkeypatch.setattr("msda_agreement.check", lambda device: None)
    monkeypatch.setattr(benchmark, "give_back_memory_at_once", lambda: None)
    command = ["msda.py", "--case", "tiny", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / "msda.json")])
    with pytest.raises(StopIteration):
        benchmark.main()
    assert len(json.loads((tmp_path / "msda.json").read_text())["cases"]) == 1


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs cuobjdump, which triton has")
@pytest.mark.slow
def test_the_counts_of_the_kernels_are_those_that_are_written_down(tmp_path):
    """Instructions may differ by a tenth between versions of nvcc; nothing may spill."""
    command = [sys.executable, str(ROOT / "benchmarks/msda_sass.py"), "--output", str(tmp_path / "sass.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "sass.json").read_text())
    told = json.loads((ROOT / "benchmarks/results/msda_sass.json").read_text())
    assert len(found) == len(told) == 12
    for row, same in zip(found, told, strict=True):
        assert abs(row["instructions"] - same["instructions"]) <= 0.1 * same["instructions"]
        assert row["shared_bytes"] == same["shared_bytes"]
        assert row["spilled_bytes"] == 0
        assert row["registers"] <= 64


def test_the_counts_in_the_document_are_those_of_their_file():
    text = (ROOT / "docs/OPERATOR.md").read_text()
    for row in json.loads((ROOT / "benchmarks/results/msda_sass.json").read_text()):
        cells = ("kernel", "dtype", "capability", "instructions", "registers", "shared_bytes")
        assert f"| {' | '.join(str(row[cell]) for cell in cells)} |" in text
