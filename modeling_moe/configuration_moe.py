# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines MoEConfig, the configuration of every model of this package."""

import json
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .attention import AttentionFields
from .attention_catalogue import ROUTED_ATTENTION, RoutedAttentionFields, check_attention_routing
from .attention_latent import LatentAttentionFields
from .attention_moh import MixtureOfHeadsFields
from .attention_rope import RopeFields, check_numbers, check_shape, entries_of_scaling
from .attention_routing_transformer import RoutingTransformerFields
from .attention_switch_head import SwitchHeadFields
from .compatibility import CACHE_NAMES, __version__, saved_by_earlier_version
from .configuration_checks import (
    check_choices,
    check_layers,
    check_model,
    check_routing,
    check_size,
    refuse_continuous_batching,
)
from .configuration_counts import count_active_params, count_params
from .configuration_derived import chosen_values, first_layers, follow, settle
from .configuration_fields import accept_none, plain_errors
from .configuration_inputs import (
    check_inherited,
    kinds_of_layers,
    refuse_misspelt,
    refuse_reserved,
    take_aliases,
    take_dense_layers,
)
from .configuration_model import ExpertFields, ModelFields
from .configuration_plans import expert_parallel_plan, tensor_parallel_plan
from .configuration_presets import preset_file
from .configuration_unread import drop_unread, refuse_unread
from .model_depth import DepthFields, check_depth, depth_view
from .model_embeddings import EmbeddingFields
from .model_norms import NormFields
from .router import RouterFields
from .router_assigned import AssignedFields
from .router_balancing import BalancingFields
from .router_capacity import CapacityFields
from .router_carried import CarriedFields
from .router_catalogue import CatalogueFields, current_value, divide_old_coefficient, router_class
from .router_kinds import KINDS
from .router_losses import LossFields
from .router_soft import SoftFields
from .router_topk import TopKFields
from .router_variable_k import VariableKFields


logger = logging.get_logger(__name__)


@plain_errors
@strict
@accept_none
class MoEConfig(
    ModelFields,
    EmbeddingFields,
    RopeFields,
    NormFields,
    AttentionFields,
    LatentAttentionFields,
    RoutedAttentionFields,
    SwitchHeadFields,
    MixtureOfHeadsFields,
    RoutingTransformerFields,
    DepthFields,
    ExpertFields,
    CatalogueFields,
    RouterFields,
    TopKFields,
    AssignedFields,
    CarriedFields,
    VariableKFields,
    SoftFields,
    CapacityFields,
    BalancingFields,
    LossFields,
    PreTrainedConfig,
):
    """Configuration of a [`MoEModel`], a decoder whose feed-forward networks are dense or sparse, layer by layer.

    docs/config.md lists the fields. The module that reads a field declares it, in one of the base classes. The names are
    transformers' own. A field that differs from its default although nothing in the configuration reads it is refused.

    A derived field that is left None follows from other fields, and follows them when they are assigned later
    (`modeling_moe.configuration_derived.DERIVED`). Fields are checked together when a configuration or a model is made,
    and when a configuration is saved.

    Raises:
        ValueError: for a value that no model can have; the message names the field and the remedy.

    Example:
        >>> from modeling_moe import MoEConfig, MoEForCausalLM
        >>> config = MoEConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_experts=8)
        >>> config.num_params(), config.num_active_params()
        (86649088, 34744576)
        >>> MoEForCausalLM(config).num_parameters()
        86649088
    """

    model_type = "moe"
    _auto_class = "AutoConfig"
    keys_to_ignore_at_inference = [
        *(*CACHE_NAMES, "aux_loss", "dropped_share"),
        *(name for kind in KINDS.values() for name in (kind.logits, kind.load)),
    ]
    attribute_map = {
        "num_local_experts": "num_experts",
        "n_routed_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    # replaces names that earlier versions gave the values of fields
    _current_value = staticmethod(current_value)

    def __post_init__(self, **kwargs):
        refuse_misspelt(type(self), kwargs)
        refuse_reserved(type(self), kwargs)
        take_aliases(self, kwargs)
        take_dense_layers(self, kwargs)
        check_inherited(self, kwargs)
        if not self.use_sliding_window:
            self.sliding_window = None
        settle(self)
        if saved_by_earlier_version({"transformers_version": self.transformers_version} | kwargs):
            divide_old_coefficient(self)
            drop_unread(self)
        # transformers takes the fields to be right when it reads them below
        self.validate_layer_type()
        self.validate_moe()
        check_shape(self)
        super().__post_init__(**kwargs)
        if self.num_experts_per_tok == 1 and self.norm_topk_prob and "sparse" in self.mlp_layer_types:
            logger.warning_once(
                "num_experts_per_tok=1 with norm_topk_prob=True gives every expert the weight 1: the router gets no "
                "gradient from the task. Set norm_topk_prob=False unless the router is meant to stay as it is."
            )

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        if "_derived" in self.__dict__ and key in self.__dataclass_fields__:
            follow(self, key)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Makes a configuration as transformers does, and checks it again after `kwargs` have been assigned to its fields.

        Lists that name more layers than `num_hidden_layers` are cut to the first layers. Fields that nothing reads are set to
        their defaults, with a warning, if an earlier version of this package saved them.

        Raises:
            ValueError: for a value that no model can have; the message names the field and the remedy.
        """
        result = super().from_dict(config_dict | first_layers(config_dict), **kwargs)
        (result[0] if isinstance(result, tuple) else result).validate()
        return result

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "MoEConfig":
        """Makes the configuration of a published model that is shipped with the package.

        Args:
            name: such as "olmoe_1b_7b"; `python -m modeling_moe presets` lists the names.
            changes: fields that differ from the preset's.

        Raises:
            ValueError: for an unknown name, or changes that no model can have.
        """
        return cls.from_dict(json.loads(preset_file(name).read_text(encoding="utf-8"))).replace(**changes)

    def replace(self, **changes: Any) -> "MoEConfig":
        """Makes a new configuration with some fields changed, and checks it.

        Derived fields follow the changes. Lists that name more layers than a smaller `num_hidden_layers` are cut.

        Args:
            changes: fields or aliases by name.

        Raises:
            ValueError: for changes that no model can have, that would be ignored, or that leave a field of this
                configuration unread; the message names the field and the remedy.
        """
        changes = {self.attribute_map.get(name, name): value for name, value in changes.items()}
        values = chosen_values(self)
        if {"first_k_dense_replace", "mlp_only_layers"}.intersection(changes):
            values.pop("mlp_layer_types", None)
        values |= changes
        return type(self)(**(values | first_layers(values)))

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as transformers does, and the version of this package, by which a later one knows old values."""
        return super().to_dict() | {"code_version": __version__}

    def convert_rope_params_to_dict(self, **kwargs):
        """Completes `rope_parameters` as transformers does; 5.17 adds a theta beside parameters by attention type."""
        if not set(self.layer_types).intersection(self.rope_parameters or ()):
            return super().convert_rope_params_to_dict(**kwargs)
        self.standardize_rope_params()
        return kwargs

    # transformers declares both plans as class variables; here they depend on the fields
    @property
    def base_model_ep_plan(self) -> dict[str, str]:  # pyrefly: ignore[bad-override]
        """transformers' plan of expert parallelism."""
        return expert_parallel_plan(self)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # pyrefly: ignore[bad-override]
        """transformers' plan of tensor parallelism."""
        return tensor_parallel_plan(self) | self.__dict__.get("_added_to_plan", {})

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, value: dict[str, str]):
        # transformers 5.19 adds the embedding of a tied head
        own = tensor_parallel_plan(self)
        self.__dict__["_added_to_plan"] = {name: rule for name, rule in value.items() if own.get(name) != rule}

    def validate_layer_type(self):
        """Checks the lists that have an entry for each layer; `@strict` calls it in every check."""
        check_layers(self)

    def validate_moe(self):
        """Checks fields against each other; `@strict` calls it in every check."""
        check_choices(self)
        check_model(self)
        check_routing(self)
        check_attention_routing(self)
        check_depth(self)

    def validate_unread(self):
        """Refuses fields that differ from their defaults although nothing reads them; `@strict` calls it in every check."""
        refuse_unread(self)

    def validate_rope(self):
        """Checks the numbers of `rope_parameters`, then checks them as transformers does."""
        check_numbers(self)
        # transformers would warn of them
        self.ignore_keys_at_rope_validation = set(self.ignore_keys_at_rope_validation) | entries_of_scaling(self)
        super().validate_rope()

    def validate_size(self):
        """Refuses a model that no machine can hold."""
        check_size(self)

    def refuse_continuous_batching(self, training: bool = False) -> None:
        """Refuses continuous batching where it would change the output of a token.

        Args:
            training: whether the model is in training mode, in which other fields matter.

        Raises:
            ValueError: names the field that makes tokens depend on their neighbours in a row, or that pages cannot serve.
        """
        refuse_continuous_batching(self, training)

    def rotates(self, layer_idx: int) -> bool:
        """Returns whether a layer rotates queries and keys."""
        return self.position_embedding_type == "rope" and (
            self.no_rope_layers is None or bool(self.no_rope_layers[layer_idx])
        )

    @property
    def qk_head_dim(self) -> int | None:
        """The features of a query or key head in latent attention, else None; transformers compares it with values' width."""
        if self.qk_nope_head_dim is None or self.qk_rope_head_dim is None:
            return None
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_router_outputs(self) -> int:
        """The number of experts that a router chooses among, null and copy experts included."""
        return self.num_experts + self.num_null_experts + self.num_copy_experts

    @property
    def router_parts(self) -> int:
        """The number of equal parts of a router's outputs in each of which a token chooses by itself."""
        return 1

    def history_before(self, layer_idx: int) -> int:
        """Returns the number of routers before a layer's that have a place in the cache behind the keys of all layers."""
        return self.mlp_layer_types[:layer_idx].count("sparse")

    @property
    def attention_routing(self) -> Any:
        """The configuration as the routers of routed attention read it."""
        assert self.routed_attention is not None  # only routed attention has routers to read it
        return ROUTED_ATTENTION[self.routed_attention].view(self)

    @property
    def depth_routing(self) -> Any:
        """The configuration as the routers read it that choose the tokens of a layer."""
        return depth_view(self)

    def routes_depth(self, layer_idx: int) -> bool:
        """Returns whether a router chooses the tokens that a layer processes."""
        return self.depth_layers is not None and bool(self.depth_layers[layer_idx])

    @property
    def has_capacity(self) -> bool:
        """Whether an expert takes a limited number of tokens."""
        limits = (self.capacity_factor, self.eval_capacity_factor, self.expert_capacity)
        return any(limit is not None for limit in limits)

    @property
    def has_empty_slots(self) -> bool:
        """Whether a token can have fewer than num_experts_per_tok experts with weights."""
        return self.num_router_outputs > self.num_experts or self.has_capacity or router_class(self).variable_k

    @property
    def controller(self) -> str | None:
        """The key in `modeling_moe.router_balancing.CONTROLLERS` of the rule that moves the routers' buffers, or None."""
        return self.router_controller or router_class(self).default_controller

    @property
    def has_shared_experts(self) -> bool:
        """Whether a sparse layer also sends every token through shared experts."""
        return self.shared_expert_intermediate_size > 0

    @property
    def first_k_dense_replace(self) -> int:
        """The number of leading dense layers (DeepSeek's name for part of `mlp_layer_types`)."""
        return next((i for i, kind in enumerate(self.mlp_layer_types) if kind != "dense"), self.num_hidden_layers)

    @first_k_dense_replace.setter
    def first_k_dense_replace(self, value: int):
        self.mlp_layer_types = kinds_of_layers(self.num_hidden_layers, value, None)

    @property
    def mlp_only_layers(self) -> list[int]:
        """The indices of the dense layers (Qwen's name for part of `mlp_layer_types`)."""
        return [i for i, kind in enumerate(self.mlp_layer_types) if kind == "dense"]

    @mlp_only_layers.setter
    def mlp_only_layers(self, value: list[int]):
        self.mlp_layer_types = kinds_of_layers(self.num_hidden_layers, None, value)

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(d)
        for name in ("_derived", "_added_to_plan"):
            d.pop(name, None)

    def num_params(self) -> int:
        """Returns the number of parameters of `MoEForCausalLM`; a tied head counts once."""
        return count_params(self)

    def num_active_params(self) -> int:
        """Returns the number of parameters that one token uses: all but the routed experts that it is not sent to."""
        return count_active_params(self)


__all__ = ["MoEConfig"]
