"""Random numbers of the images of a batch: each image's depend on its own seed alone.

An image's seed is (SEED, step, slot of the global batch), so neither ranks nor the images beside it change
what is drawn for it.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch

Seed = tuple[int, ...] | None  # None: drawn anew from torch's global random state of the CPU


def generator(seed: Seed, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of an image's numbers for one purpose; those of other purposes are independent of them."""
    words = seed or (int(torch.randint(2**31, ())),)
    mixed = np.random.SeedSequence([*words, zlib.crc32(purpose.encode())]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed[0]))


def uniform(
    seeds: Sequence[Seed], purpose: str, *shape: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(B, *shape), from 0 to 1: what each of B images draws for a purpose."""
    drawn = [torch.rand(*shape, generator=generator(seed, purpose, device), device=device) for seed in seeds]
    return torch.stack(drawn)
