"""Builds the package; its metadata are in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent / "ops"))
from extension import EXTENSION, BuildOperator

setup(
    packages=[*find_packages(include=["sim_m2f*"]), *find_packages("ops"), "sim_m2f.configs"],
    package_dir={
        "MultiScaleDeformableAttention": "ops/MultiScaleDeformableAttention",
        "sim_m2f.configs": "configs",
    },
    package_data={
        "sim_m2f": ["py.typed", "*/*.yaml", "*/*.j2", "*/*.js", "*/*.mplstyle"],
        "sim_m2f.configs": ["*/*.yaml"],
    },
    ext_modules=[EXTENSION],
    cmdclass={"build_ext": BuildOperator},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
