"""Quantised checkpoints are read as what their format defines, with the published layouts, in every family."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models import deepseek_v3, llama, mixtral, olmoe, qwen2_moe, qwen3_moe

from modeling_moe.checkpoints import LazyTensor
from modeling_moe.conversion import load_state, open_checkpoint
from modeling_moe.conversion.families.quantized import dequantised, from_fp8_blocks, from_nvfp4
from modeling_moe.utils.errors import UserError
from tests import builders


SIZE = builders.SIZE | {"num_hidden_layers": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
QWEN = SIZE | EXPERTS | {"moe_intermediate_size": 16}
CONFIGS = {
    "llama": llama.LlamaConfig(**SIZE | {"intermediate_size": 48}),
    "mixtral": mixtral.MixtralConfig(**SIZE | {"intermediate_size": 16}, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": olmoe.OlmoeConfig(**SIZE | {"intermediate_size": 16}, **EXPERTS),
    "qwen2_moe": qwen2_moe.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=32),
    "qwen3_moe": qwen3_moe.Qwen3MoeConfig(**QWEN),
    "deepseek_v3": deepseek_v3.DeepseekV3Config(
        **SIZE | {"num_key_value_heads": 4, "intermediate_size": 32},
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
}
MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "producer": {"name": "modelopt", "version": "0.35.0"},
    "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
    },
    "ignore": ["lm_head", "model.layers.*.self_attn*"],
}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
    },
    "ignore": ["lm_head"],
}


def fp8_settings(*block: int) -> dict:
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": list(block) or None,
    }


def floats(settings: dict, strategy: str, **more) -> dict:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy} | more
    return settings | {"format": "float-quantized", "config_groups": {"group_0": {"weights": weights}}}


def e4m3(byte: int) -> float:
    """Decodes e4m3fn from the definition of the format: a sign, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return math.nan if byte & 127 == 127 else sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e2m1(nibble: int) -> float:
    """Decodes e2m1 from the definition of the format: a sign, 2 bits of exponent with bias 1, 1 bit of mantissa."""
    sign, exponent, mantissa = -1.0 if nibble & 8 else 1.0, nibble >> 1 & 3, nibble & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def numpy_nvfp4(packed: np.ndarray, scale: np.ndarray, factor: float) -> np.ndarray:
    """Dequantises bytes (N, M / 2) with the bytes of e4m3 scales (N, M / 16), value by value, in fp64."""
    result = np.zeros((packed.shape[0], 2 * packed.shape[1]))
    for row, column in np.ndindex(result.shape):
        byte = int(packed[row, column // 2])
        value = e2m1(byte >> 4 if column % 2 else byte & 15)
        result[row, column] = value * e4m3(int(scale[row, column // 16])) * factor
    return result


def random_nvfp4(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    return packed, (torch.rand(rows, columns // 16) * 40).to(torch.float8_e4m3fn)


def quantised(name: str, weight: torch.Tensor, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns tensors as published for a linear layer `name`, and the weight that they stand for, in bf16."""
    rows, columns = weight.shape
    if kind.startswith("nvfp4"):
        packed, scale = random_nvfp4(rows, columns)
        second = torch.tensor(0.0011)
        exact = torch.from_numpy(numpy_nvfp4(packed.numpy(), scale.view(torch.uint8).numpy(), second.item()))
        tensors = {f"{name}.weight": packed, f"{name}.weight_scale": scale, f"{name}.weight_scale_2": second}
        tensors[f"{name}.input_scale"] = torch.tensor(0.5)
        if kind == "nvfp4-pack":
            tensors = {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale}
            tensors |= {
                f"{name}.weight_global_scale": 1 / second[None],
                f"{name}.input_global_scale": torch.tensor([2.0]),
            }
        return tensors, exact.to(torch.bfloat16)
    eight = weight.to(torch.float8_e4m3fn)
    shapes = {"block": (math.ceil(rows / 24), math.ceil(columns / 20)), "channel": (rows, 1), "tensor": ()}
    scale = torch.rand(shapes[kind.removesuffix("-inv")]) + 0.5
    whole = scale
    if kind.startswith("block"):
        whole = torch.empty(rows, columns)
        for row, column in np.ndindex(rows, columns):
            whole[row, column] = scale[row // 24, column // 20]
    ending = "_scale_inv" if kind.endswith("-inv") else "_scale"
    return {f"{name}.weight": eight, f"{name}.weight{ending}": scale}, (eight.float() * whole).to(torch.bfloat16)


KINDS = {
    "nvfp4": MODELOPT,
    "nvfp4-pack": COMPRESSED,
    "block-inv": fp8_settings(24, 20),
    "tensor-inv": fp8_settings(),
    "channel": floats(COMPRESSED, "channel"),
    "block": floats(COMPRESSED, "block", block_structure=[24, 20]),
    "tensor": {"quant_method": "modelopt", "quant_algo": "FP8"},
}


def save_quantised(folder, name: str, kind: str, settings: dict | None) -> torch.nn.Module:
    """Saves a checkpoint with quantised experts and bf16 attention; returns transformers' model of the same weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(torch.bfloat16)
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    written, plain = dict(stored), dict(stored)
    experts = [key for key in stored if ".experts." in key] or [key for key in stored if ".mlp." in key]
    assert len(experts) >= 6
    for key in experts:
        del written[key]
        tensors, plain[key] = quantised(key.removesuffix(".weight"), stored[key], kind)
        written |= tensors
    if kind == "nvfp4":
        written["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    if settings is not None:
        set_quantization(folder, settings)
    return expected


def set_quantization(folder, settings: dict) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))


def assert_same(folder, expected) -> None:
    checkpoint = open_checkpoint(str(folder))
    model = load_state(checkpoint.config, checkpoint.state)
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    got, wanted = model.float()(ids).logits, expected.float()(ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_every_layout(name, kind, tmp_path):
    assert_same(tmp_path, save_quantised(tmp_path, name, kind, KINDS[kind]))


@pytest.mark.parametrize("name", ["llama", "mixtral", "olmoe", "qwen2_moe"])
@pytest.mark.parametrize("kind", ["nvfp4", "block-inv"])
def test_every_family(name, kind, tmp_path):
    if name == "llama" and kind == "nvfp4":
        kind = "nvfp4-pack"
    assert_same(tmp_path, save_quantised(tmp_path, name, kind, KINDS[kind]))


def test_hf_quant_config_alone_describes_the_quantisation(tmp_path):
    expected = save_quantised(tmp_path, "qwen3_moe", "nvfp4", None)
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    text = {"producer": {"name": "modelopt"}, "quantization": quantization}
    with pytest.raises(UserError):
        open_checkpoint(str(tmp_path))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(text))
    assert_same(tmp_path, expected)
    text["quantization"]["quant_algo"] = "W4A8_AWQ"
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match=r"format 'W4A8_AWQ', which cannot be read: only fp8, compressed-tensors"):
        open_checkpoint(str(tmp_path))


def test_nvfp4_is_the_format_by_definition():
    packed, scale = random_nvfp4(3, 64)
    packed[0, :16] = torch.arange(0, 256, 17)
    expected = numpy_nvfp4(packed.numpy(), scale.view(torch.uint8).numpy(), 0.25)
    got = from_nvfp4(packed, scale.float() * 0.25)
    assert got.dtype == torch.float32
    assert np.array_equal(got.double().numpy(), expected)


def test_fp8_blocks():
    """Blocks of 128 by 128 do not divide the matrix evenly, as in DeepSeek-V3's kv_a_proj_with_mqa."""
    weight, scale = torch.randn(192, 300).to(torch.float8_e4m3fn), torch.rand(2, 3)
    got = from_fp8_blocks(weight, scale, (128, 128))
    for row, column in ((0, 0), (127, 128), (128, 127), (191, 299)):
        assert got[row, column] == weight[row, column].float() * scale[row // 128, column // 128]


def test_fused_experts_are_dequantised_one_by_one():
    weight, scale = torch.randn(3, 30, 20).to(torch.float8_e4m3fn), torch.rand(3, 2, 1)
    read = []

    def load(index):
        read.append(len(range(3)[index[0]]))
        return weight[index]

    state = {
        "experts.gate_up_proj": LazyTensor((3, 30, 20), weight.dtype, load),
        "experts.gate_up_proj_scale_inv": LazyTensor.of(scale),
    }
    result = dequantised(state, fp8_settings(24, 20))
    assert list(result) == ["experts.gate_up_proj"]
    expected = torch.stack([from_fp8_blocks(weight[e], scale[e], (24, 20)) for e in range(3)]).to(torch.bfloat16)
    assert torch.equal(result["experts.gate_up_proj"][1, 3:7].read(), expected[1, 3:7])
    assert read == [1]
    assert torch.equal(result["experts.gate_up_proj"].read(), expected)
    assert torch.equal(torch.cat(list(result["experts.gate_up_proj"].chunks())).reshape(expected.shape), expected)


REFUSED = {
    "scales of another shape": (lambda t: t.update(scale=torch.ones(3, 1)), fp8_settings(24, 20), "scales of shape"),
    "no scale": (lambda t: t.pop("scale"), fp8_settings(24, 20), "is float8_e4m3fn, so this is a quantised source"),
    "bad block": (lambda t: None, fp8_settings(0, 20), "block size in quantization_config is"),
    "rotation": (
        lambda t: None,
        COMPRESSED | {"transform_config": {"config_groups": {"R1": {}}}},
        "without rotations",
    ),
    "sparsity": (lambda t: None, COMPRESSED | {"sparsity_config": {"format": "sparse-24"}}, "without rotations"),
    "integers": (lambda t: None, COMPRESSED | {"format": "pack-quantized"}, "format 'pack-quantized'"),
    "awq": (lambda t: None, {"quant_method": "awq", "bits": 4}, "quant_method 'awq'"),
    "a zero point": (
        lambda t: t.update(weight_zero_point=torch.ones(1)),
        fp8_settings(24, 20),
        "weight_zero_point that its config.json does not account for",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused(name, tmp_path):
    change, settings, message = REFUSED[name]
    save_quantised(tmp_path, "qwen3_moe", "block-inv", settings)
    tensors, prefix = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.experts.0.gate_proj."
    parts = {"scale": tensors.pop(f"{prefix}weight_scale_inv")}
    change(parts)
    names = {"scale": "weight_scale_inv"}
    tensors |= {f"{prefix}{names.get(key, key)}": tensor for key, tensor in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(tmp_path))
