# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Random generators are seeded by their purpose here, so results do not depend on the order of the work."""

import hashlib

import torch


def generator_for(seed: int, *path: object) -> torch.Generator:
    """Returns a CPU generator whose seed is a hash of `seed` and `path`, for example of layer and expert.

    Args:
        seed: seed of the run.
        *path: values that distinguish this use of random numbers from all others; their `repr` is hashed.
    """
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
