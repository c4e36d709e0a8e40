"""What is installed: configurations, templates and types, found without the source tree."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT

import sim_m2f
from sim_m2f.config.shipped import find_config
from sim_m2f.errors import UserError

LOAD = """
import sys
import sim_m2f
from sim_m2f.commands.ablate import find_rows
cfg = sim_m2f.get_cfg()
cfg.merge_from_file("configs/nuclei/sim.yaml")
print(sim_m2f.__file__, sim_m2f.__version__, *(row.name for row in find_rows([])), sep="\\n")
print(cfg.dump(), file=sys.stderr)
"""


def python(*arguments, cwd, **environment):
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, check=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel without the operator, built from the sdist alone."""
    folder = tmp_path_factory.mktemp("dist")
    python("setup.py", "-q", "egg_info", "-e", str(folder), "sdist", "-d", str(folder), cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    python("setup.py", "-q", "bdist_wheel", "-d", str(folder), cwd=source, SIM_M2F_OPERATOR="none")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_one_wheel_serves_every_python_from_3_10_on(wheel):
    assert wheel.name.startswith(f"sim_m2f-{sim_m2f.__version__}-cp310-abi3-")


@pytest.mark.slow
def test_a_wheel_has_every_file_of_the_packages(wheel):
    packages = [ROOT / "sim_m2f", ROOT / "ops/MultiScaleDeformableAttention"]
    files = [file for package in packages for file in package.rglob("*") if file.is_file()]
    expected = {
        file.relative_to(ROOT / "ops" if ROOT / "ops" in file.parents else ROOT).as_posix()
        for file in files
        if file.suffix not in {".pyc", ".so"}
    }
    expected |= {f"sim_m2f/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.yaml")}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_every_package_that_is_imported_is_declared(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    declared = {name.lower() for name in re.findall(r"^Requires-Dist: ([\w.-]+)", text, re.MULTILINE)}
    modules = set()
    for file in (ROOT / "sim_m2f").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules |= {name.partition(".")[0] for name in names}
    own = {"sim_m2f", "MultiScaleDeformableAttention"}
    elsewhere = {"detectron2"}  # is not on PyPI
    providers = packages_distributions()
    for module in modules - own - elsewhere - set(sys.stdlib_module_names):
        names = {name.lower().replace("_", "-") for name in providers.get(module, [module])}
        assert names & declared, module


@pytest.mark.slow
@pytest.mark.slow
def test_an_installed_package_finds_its_configurations_from_anywhere(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    run = python("-c", LOAD, cwd=tmp_path / "elsewhere", PYTHONPATH=str(tmp_path / "site"))
    file, version, *rows = run.stdout.splitlines()
    assert Path(file) == tmp_path / "site/sim_m2f/__init__.py"
    assert version == sim_m2f.__version__
    assert rows == sorted(row.stem for row in (ROOT / "configs/ablation").glob("*.yaml"))
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(ROOT / "configs/nuclei/sim.yaml")
    assert run.stderr.strip() == cfg.dump().strip()


def test_a_path_that_exists_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "configs/shapes/sim_R18.yaml"
    assert find_config(name) == ROOT / name
    (tmp_path / "configs/shapes").mkdir(parents=True)
    (tmp_path / name).write_text("SEED: 7\n")
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(name)
    assert cfg.SEED == 7


@pytest.mark.parametrize("name", ["configs/shapes/no.yaml", "README.md", "configs"])
def test_what_is_not_shipped_is_named_as_it_was_written(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{name}: "):
        sim_m2f.get_cfg().merge_from_file(name)
