"""Builds the package; its metadata are in pyproject.toml."""

from setuptools import setup

setup()
