"""`build_ext` of setup.py: compiles the operator, or says in one line why plain PyTorch will serve."""

import os
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from build import BuildError, build, find_toolchain

EXTENSION = Extension("MultiScaleDeformableAttention._C", sources=[], optional=True)


class BuildOperator(build_ext):
    """Installs `_C.so` without a Python version in its name, as it serves them all."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            tools = find_toolchain()
        except BuildError as error:
            if os.environ.get("SIM_M2F_OPERATOR", "auto") != "auto":
                raise SystemExit(str(error)) from None
            print(f"MultiScaleDeformableAttention is not compiled, plain PyTorch serves: {error}")
            return
        if tools is not None:
            library = Path(self.get_ext_fullpath(ext.name))
            print(f"MultiScaleDeformableAttention: {build(tools, folder, library)}")
