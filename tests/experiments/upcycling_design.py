"""This module provides a design of the upcycling experiments that runs in seconds."""

from pathlib import Path
from typing import Any

import yaml


GROUPS = {"num_experts": 8, "granularity": 4, "num_experts_per_tok": 4}
TINY: dict[str, Any] = {
    "model": {
        "vocab_size": 256,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "training": {
        "length": 16,
        "batch_size": 2,
        "dense_steps": 3,
        "dense_rate": 1e-2,
        "steps": 4,
        "warmup": 0.1,
        "last_rate": 0.1,
        "rate_rows": 3,
        "test_rows": 4,
        "seed": 0,
    },
    "arms": {
        "dense": None,
        "exact": GROUPS,
        "Megatron": GROUPS | {"scaling": "megatron"},
        "drop": GROUPS | {"method": "drop", "drop_ratio": 0.5},
        "shared": {"num_experts": 16, "granularity": 8, "num_experts_per_tok": 2, "shared_expert": True},
        "E=2": {"num_experts": 2, "granularity": 2, "num_experts_per_tok": 2},
        "E=4": {"num_experts": 4, "granularity": 2, "num_experts_per_tok": 2},
        "E=8": {"num_experts": 8, "granularity": 2, "num_experts_per_tok": 2},
        "E=16": {"num_experts": 16, "granularity": 2, "num_experts_per_tok": 2},
    },
    "search": {"rates": [1e-3, 1e-2, 1e-1], "factor": 10.0, "most": 9, "seeds": [101]},
    "comparison": {
        "arms": ["dense", "exact", "Megatron"],
        "pairs": [["exact", "dense"], ["exact", "Megatron"]],
        "pilot_seeds": [101, 102],
        "smallest_difference": 0.01,
        "power": 0.8,
        "alpha": 0.05,
        "least_seeds": 2,
        "most_seeds": 2,
    },
    "growth": {"dense": "dense", "arms": ["E=2", "E=4", "E=8", "E=16"], "seeds": 2, "cost_steps": 1},
}


def write_design(folder: Path, **changes: Any) -> Path:
    """Writes the tiny design with changed sections, and returns the path."""
    path = folder / "design.yaml"
    path.write_text(yaml.safe_dump(TINY | changes, sort_keys=False))
    return path
