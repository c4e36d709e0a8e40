"""Builds the package; its metadata are in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "ops"))
from extension import EXTENSION, BuildOperator

setup(
    ext_modules=[EXTENSION],
    cmdclass={"build_ext": BuildOperator},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
