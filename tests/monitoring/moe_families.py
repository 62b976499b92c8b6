"""This module builds a tiny model of every family of Mixtures of Experts in the installed transformers."""

import contextlib
import importlib
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from modeling_moe.monitoring import UnreachableRouting, experts_modules, sparse_layers, watch
from tests.training.families import ALSO as ALSO_CAUSAL
from tests.training.families import SMALL


MODELS = Path(transformers.__file__).parent / "models"
# a larger model has a part that stayed at its default size
LIMIT = 8_000_000
# fields of the transformers' configurations that only some families have
SIZES = SMALL | {
    "moe_num_experts": 12,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "enable_moe_block": True,
    "moe_shared_expert_intermediate_size": 16,
    "vocab_size_per_layer_input": 64,
    "n_shared_experts": 1,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4}
# family -> further fields that its tiny model needs
ALSO: dict[str, dict] = ALSO_CAUSAL | {
    "gemma4": ALSO_CAUSAL["gemma4_text"],
    "inkling2": ALSO_CAUSAL["inkling2_text"],
    "inkling2_loop": ALSO_CAUSAL["inkling2_loop_text"],
    "deepseek_ocr2": {"topk_method": "greedy", "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v4": {"num_hidden_layers": 3, "num_hash_layers": 1},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [16, 16], "rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}},
    "glm4v_moe": {"rope_parameters": MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}},
    "glm5_next": {"qk_rope_head_dim": 0, "mlp_layer_types": ["dense", "sparse"]},
    "doge": {"is_moe": True},
    "vitpose_backbone": {"num_experts": 6},
    "hy_v4_vl": {"rope_parameters": MROPE | {"mrope_section": [2, 1, 1]}},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 16},
}


def experts_families() -> list[str]:
    """Returns the folders of transformers' models in which a class follows the experts interface."""
    files = sorted(MODELS.glob("*/modeling_*.py"))
    return sorted({file.parent.name for file in files if "@use_experts_implementation" in file.read_text("utf-8")})


def other_families() -> list[str]:
    """Returns the folders of transformers' models with experts, of which no class follows the experts interface."""
    experts = re.compile(r"^class \w*(?:Experts|SparseMoe\w*|MoE|MoeLayer|MoeMLP|SparseMLP)\(nn\.Module", re.MULTILINE)
    files = sorted(MODELS.glob("*/modeling_*.py"))
    found = {file.parent.name for file in files if experts.search(file.read_text("utf-8"))}
    return sorted(found - set(experts_families()))


def _size(model_class: type[PreTrainedModel]) -> tuple[bool, bool, bool, int]:
    name = model_class.__name__
    return not name.endswith("ForCausalLM"), not name.endswith("TextModel"), not name.endswith("Model"), len(name)


def model_classes(family: str) -> list[type[PreTrainedModel]]:
    """Returns the model classes of a family: causal language models first, then text models, then others."""
    found = []
    for file in sorted((MODELS / family).glob("modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{family}.{file.stem}")
        found += [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, PreTrainedModel)
            and value.__module__ == module.__name__
            and not value.__name__.endswith("PreTrainedModel")
            and getattr(value, "config_class", None) is not None
        ]
    return sorted(found, key=_size)


def unreachable(family: str) -> str:
    """Returns the sentence about a family whose experts do not follow the interface."""
    failures = []
    for model_class in model_classes(family):
        # in its default size, without memory
        with torch.device("meta"), contextlib.suppress(AttributeError):
            try:
                sparse_layers(model_class(model_class.config_class(**ALSO.get(family, {}))))
            except UnreachableRouting as error:
                failures.append(str(error))
    named = [failure for failure in failures if "is a dense model" not in failure]
    return (named or failures or [f"{family} does not follow transformers' experts interface."])[0]


class FamilyRow(NamedTuple):
    """What a watch records of a family.

    Attributes:
        family: folder of the family in transformers.
        model: class of the tiny model.
        load: whether load, co-activation and what follows from them are recorded.
        scoring: how router logits become probabilities; "-" if entropies and gate margin are not recorded.
        why: sentence that says why something is not recorded.
    """

    family: str
    model: str
    load: str
    scoring: str
    why: str


# how the page names what a watch found
NAMES = {"given": "as the router returns them", "sqrtsoftplus": "sqrt(softplus)"}


def family_row(family: str) -> FamilyRow:
    """Watches a tiny model of a family and says what was recorded."""
    model = tiny_family(family)
    with watch(model) as routing, torch.no_grad():
        model(input_ids=torch.arange(3, 39).view(2, 18), use_cache=False)
    figures = routing.read()
    known = {NAMES.get(layer.scoring, layer.scoring) for layer in figures.layers if layer.scoring is not None}
    seen = any(layer.tokens for layer in figures.layers)
    why: dict[str, list[str]] = {}
    for layer in figures.layers:
        for note in layer.notes:
            why.setdefault(re.sub(r" \([\d.e-]+ off\)", "", note), []).append(layer.label)
    reasons = [note if len(labels) == len(figures.layers) else f"{labels[0]}: {note}" for note, labels in why.items()]
    return FamilyRow(
        family, type(model).__name__, "yes" if seen else "no", ", ".join(sorted(known)) or "-", "; ".join(reasons)
    )


def rows() -> list[FamilyRow]:
    """Returns a row for each family, those whose experts follow the interface first."""
    others = [FamilyRow(family, "", "no", "-", unreachable(family)) for family in other_families()]
    return [family_row(family) for family in experts_families()] + others


HEADER = """# What is recorded of each family

<!-- python -m tests.monitoring.moe_families writes this page -->

[`modeling_moe.watch`](monitoring.md) finds experts and routers by the interfaces of transformers, not by the names of
families. The table is made from tiny random models of every folder of transformers {release} that has routed experts.

- **Load** stands for load, MaxVio, dead experts, mean number of experts, dropped share and co-activation.
- **Probabilities** says how router logits become the probabilities of the entropies, the gate margin and the balance; it is
  inferred from the combine weights. A dash means that these figures are not recorded.

| family | load | probabilities | what is not recorded, and why |
|---|---|---|---|
"""


def page(table: list[FamilyRow]) -> str:
    """Returns the text of docs/routing-families.md."""
    lines = [f"| {row.family} | {row.load} | {row.scoring} | {row.why} |" for row in table]
    return HEADER.format(release=transformers.__version__) + "\n".join(lines) + "\n"


def tiny_family(family: str) -> PreTrainedModel:
    """Returns a tiny fp32 model of a family in evaluation mode, whose routers tell experts apart.

    Raises:
        ValueError: if no class of the family gives a tiny model that runs on token ids.
    """
    failures = []
    for model_class in model_classes(family):
        try:
            model = _tiny(model_class, ALSO.get(family, {}))
            with torch.no_grad():
                model(input_ids=torch.arange(3, 9)[None], use_cache=False)
            return model
        except Exception as error:  # noqa: PERF203
            failures.append(f"{model_class.__name__}: {type(error).__name__}: {error}")
    raise ValueError(f"no class of {family} runs: {failures}")


def _tiny(model_class: type[PreTrainedModel], also: dict) -> PreTrainedModel:
    config_class = model_class.config_class
    known = {*config_class().to_dict(), *config_class.attribute_map}
    fields = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    config = config_class(**fields | also)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if parameters > LIMIT:
        raise ValueError(f"{parameters} parameters")
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    sharpen(model)
    return model


@torch.no_grad()
def sharpen(model: nn.Module) -> None:
    """Gives random weights to the matrices beside the experts, so that router logits differ by about 1."""
    holders = {
        name.rpartition(".")[0] for name, module in model.named_modules() if module in set(experts_modules(model))
    }
    for holder in sorted(holders):
        for name, parameter in model.get_submodule(holder).named_parameters():
            if not name.startswith("experts") and parameter.dim() == 2 and parameter.is_floating_point():
                parameter.normal_(std=0.3)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    (Path(__file__).parents[2] / "docs" / "routing-families.md").write_text(page(rows()), "utf-8")
