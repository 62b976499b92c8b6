# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a user chooses of an upcycling."""

from dataclasses import dataclass, field


@dataclass
class UpcyclingOptions:
    """How a dense model becomes sparse."""

    num_experts: int = field(default=8, metadata={"help": "experts of each layer"})
    num_experts_per_tok: int = field(default=2, metadata={"help": "experts that a token is sent to"})
    method: str = field(default="copy", metadata={"help": "copy: each expert starts as the dense network"})
    shared_expert: bool = field(
        default=False,
        metadata={"help": "keep the dense network as a shared expert; the routed experts then start with output 0"},
    )
    noise: float = field(
        default=0.0, metadata={"help": "noise on each expert's weights, in standard deviations of the weight tensor"}
    )
    norm_topk_prob: bool = field(default=True, metadata={"help": "a token's weights sum to 1; exactness needs it"})
    router_std: float = field(default=0.02, metadata={"help": "standard deviation of the new routers' weights"})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "weight of the load-balancing loss"})
    router_z_loss_coef: float = field(default=0.001, metadata={"help": "weight of the router's z-loss"})
    seed: int = field(default=0, metadata={"help": "seed of routers and noise"})

    def inexactness(self) -> str:
        """Why the result will not compute the dense model's function; empty if it will."""
        if self.shared_expert:
            # the routed experts' zero output projection stays zero under noise of its own size
            return ""
        if self.noise:
            return "noise moves every expert away from the dense network"
        if not self.norm_topk_prob:
            return "norm_topk_prob=False: a token's weights do not sum to 1"
        return ""
