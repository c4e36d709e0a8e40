"""`sim-m2f doctor`: what is installed, what is missing, which kernels run; packages are hidden for real."""

import importlib.metadata
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from sim_m2f.commands import doctor

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
from sim_m2f.cli import main
sys.exit(main(sys.argv[2:]))
"""


def run(*arguments: str, hidden: str = "") -> subprocess.CompletedProcess[str]:
    """sim-m2f in a process of its own, where some packages cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", HIDE, hidden, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "ops")])},
    )


def requirement_of(name: str) -> str:
    return next(line for line in importlib.metadata.requires("sim-m2f") if line.startswith(name))


@pytest.mark.parametrize("name", ["timm", "fvcore"])
@pytest.mark.slow
def test_a_missing_package_is_named(name):
    done = run("doctor", hidden=name)
    assert done.returncode == 1
    missing = [line for line in done.stdout.splitlines() if re.match(r"[\w-]+ is missing", line)]
    assert missing == [f"{name} is missing; pip install '{requirement_of(name)}'"]
    assert "\noperator: " in done.stdout
    assert not done.stderr


@pytest.mark.slow
def test_without_pytorch_the_rest_is_still_told():
    done = run("doctor", hidden="torch")
    assert done.returncode == 1
    assert f"torch is missing; pip install '{requirement_of('torch')}'" in done.stdout
    assert f"\ntimm {importlib.metadata.version('timm')} cannot be imported (No module named" in done.stdout
    assert f"\nnumpy {importlib.metadata.version('numpy')}\n" in done.stdout
    assert "operator: cannot run without torch" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("name", ["timm", "torch", "fvcore"])
@pytest.mark.slow
def test_other_commands_name_it_too(name):
    done = run("train", "--config-file", str(ROOT / "configs/shapes/boxinst_R18.yaml"), hidden=name)
    assert done.returncode == 2
    assert done.stderr == f"error: the package {name} is missing; see 'sim-m2f doctor'\n"


@pytest.mark.slow
def test_a_package_that_a_command_misses_while_it_runs_is_named(tmp_path):
    done = run("export", str(tmp_path), "--format", "safetensors", "--output", "out", hidden="safetensors")
    assert done.returncode == 2
    assert done.stderr == "error: the package safetensors is missing; see 'sim-m2f doctor'\n"


def test_nobody_has_to_read_to_the_end():
    """The reader closes the pipe before the command has written anything."""
    command = [sys.executable, "-c", HIDE, "", "doctor"]
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "ops")])}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **path}
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


@pytest.fixture
def declared(monkeypatch):
    """Puts other requirements in the place of the project's own."""

    def declare(*lines: str) -> None:
        monkeypatch.setattr(doctor, "requires", lambda _: list(lines))

    return declare


def test_packages_that_are_too_old_or_not_there_at_all(declared, capsys):
    declared("numpy>=99.1", "no-such-package>=1", "timm", "pillow>=1,<99")
    assert doctor.run(None) == 1
    printed = capsys.readouterr().out.splitlines()
    installed = {name: importlib.metadata.version(name) for name in ("numpy", "timm", "pillow")}
    assert printed[1:5] == [
        f"numpy {installed['numpy']} is too old; pip install 'numpy>=99.1'",
        "no-such-package is missing; pip install 'no-such-package>=1'",
        f"timm {installed['timm']}",
        f"pillow {installed['pillow']}",
    ]


def test_a_missing_extra_is_named_and_no_error(declared, capsys):
    declared("timm", 'no-such-package>=1; extra == "some"', "numpy>=1; extra == 'some'")
    assert doctor.run(None) == 0
    version = importlib.metadata.version("numpy")
    expected = f"extra some: no-such-package is missing, numpy {version}; pip install 'sim-m2f[some]'"
    assert expected in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("installed", "least", "usable"),
    [
        ("2.10.0", "2.10", True),
        ("2.10", "2.10.0", True),
        ("2.9.1", "2.10", False),
        ("2.10.1+cu130", "2.10.1", True),
        ("2.10.0+cu130", "2.10.1", False),
        ("0.1.5.post20221221", "0.1.5.post20221221", True),
        ("0.1.5", "0.1.5.post20221221", False),
    ],
)
def test_versions_are_compared_as_numbers(monkeypatch, installed, least, usable):
    monkeypatch.setattr(doctor, "version", lambda _: installed)
    package = doctor.Package(f"numpy>={least}", "numpy", least, "")
    assert doctor.state_of(package)[1] == usable


@pytest.mark.parametrize("content", [None, "", "Name: odd\n", b"\xff\xfe"])
def test_a_package_with_damaged_metadata_has_no_known_version(
    declared, monkeypatch, tmp_path, capsys, content
):
    """Without the file, with an empty one, without its version, and with what is no text."""
    declared("odd>=1")
    folder = tmp_path / "odd-1.0.dist-info"
    folder.mkdir()
    if content is not None:
        (folder / "METADATA").write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "odd.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.run(None) == 1
    line = "odd of unknown version (its METADATA is damaged); pip install 'odd>=1'"
    assert line in capsys.readouterr().out.splitlines()


def test_every_declared_package_and_the_implementation_are_listed(capsys):
    assert doctor.run(None) == 0
    printed = capsys.readouterr().out
    for line in importlib.metadata.requires("sim-m2f"):
        name = re.match(r"[\w-]+", line)[0]
        assert f"\n{name} " in printed or f" {name} " in printed
    assert f"\ntorch {torch.__version__}".partition("+")[0] in printed
    assert "cpu: " in printed or "plain PyTorch everywhere" in printed


def test_it_knows_which_gpus_a_build_serves():
    built = "7.5 8.0 8.6 9.0+PTX"
    assert doctor.runs_on((8, 0), built)
    assert doctor.runs_on((8, 9), built)
    assert doctor.runs_on((9, 0), built)
    assert doctor.runs_on((12, 0), built)
    assert not doctor.runs_on((7, 0), built)
    assert not doctor.runs_on((12, 0), "8.0 9.0")
    assert not doctor.runs_on((10, 0), "9.0a")
