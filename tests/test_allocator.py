"""Kept memory: large tensors after the first ones cost no page faults any more."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from sim_m2f import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(page_faults() for _ in range(10)))
"""


def page_faults(keep: bool) -> int:
    """The fewest page faults of one of ten tensors of 64 MiB, in a process of their own."""
    command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own setting")
@pytest.mark.slow
def test_freed_memory_is_used_again():
    assert page_faults(keep=False) > 2**26 / 2**21 / 2  # even where pages are of 2 MiB
    assert page_faults(keep=True) < 10
