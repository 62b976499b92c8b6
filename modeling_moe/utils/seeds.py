# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Random numbers that do not depend on the order of the work."""

import hashlib

import torch


def generator_for(seed: int, *path: object) -> torch.Generator:
    """A generator of its own for each (layer, expert), so that none depends on the order of the work."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
