"""Experts loaded straight into 4 bits equal those of `quantize_experts`, bit for bit, and come back from a file unchanged."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.core_model_loading import MergeModulelist
from transformers.quantizers import auto

from modeling_moe import MoEForCausalLM, lora
from modeling_moe.checkpoint_damage import CheckpointError
from modeling_moe.lora import Experts4bitConfig, holding, moe_lora_config, quantize_experts, trainable_parameters
from modeling_moe.lora.four_bits import FourBit, quantize_pieces
from modeling_moe.offload import from_pretrained_offloaded
from modeling_moe.utils import mapped_pages
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.loading import load_model
from tests.lora.checkpoints import IDS, fill
from tests.lora.test_peft import FAMILIES, model_of, results
from tests.lora.test_quantization import assert_equal, matrices_of
from tests.ranks import run_ranks


bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
FIELDS = {
    "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "n_routed_experts": 4, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def source_of(family: str):
    if family != "deepseek_v3":
        return model_of(family)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **FIELDS), dtype=torch.float32)
    fill(model, 0.3)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder of a family's 16-bit checkpoint."""
    made = {}

    def of(family: str):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            source_of(family).bfloat16().save_pretrained(made[family])
        return made[family]

    return of


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=Experts4bitConfig(**options))


def assert_same_state(got, expected):
    got, expected = got.state_dict(), expected.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].equal(tensor), name


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress_statistics", [False, True])
@pytest.mark.parametrize("shape", [(5, 24, 32), (300, 8, 16), (3, 10, 7), (2, 3, 3)])
def test_pieces_equal_the_whole(shape, quant_type, compress_statistics):
    """Blocks end inside experts in the last two shapes, and the second has several blocks of scales."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = quantize_pieces(iter(matrix), matrix.shape, quant_type, compress_statistics)
    packed, state = bitsandbytes.functional.quantize_4bit(
        matrix, quant_type=quant_type, compress_statistics=compress_statistics
    )
    assert got.packed.equal(packed)
    for (name, found), expected in zip(got.state.as_dict().items(), state.as_dict().values(), strict=True):
        assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected, name


def test_too_few_or_too_many_pieces():
    matrix = torch.randn(4, 8, 16)
    for number in (0, 3, 5):
        pieces = (matrix[0] for _ in range(number))
        with pytest.raises(ValueError, match="do not have the 512 numbers"):
            quantize_pieces(pieces, matrix.shape, "nf4", True)


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3"])
def test_equals_quantize_experts(family, folder, tmp_path):
    """Parameters, logits, gradients and what is saved equal those of the 16-bit model that was quantized afterwards."""
    model, reference = loaded(folder(family)), AutoModelForCausalLM.from_pretrained(folder(family))
    config = moe_lora_config(reference, r=2, lora_alpha=3)
    quantize_experts(reference)
    assert_same_state(model, reference)
    assert model(IDS).logits.equal(reference(IDS).logits)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert_same_state(again, model)
    assert again(IDS).logits.equal(model(IDS).logits)
    again.save_pretrained(tmp_path / "again")
    names = ("config.json", "model.safetensors")
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder(family)), config)
    fill(adapted, 0.2, only="lora_")
    quantize_experts(adapted)
    after = get_peft_model(again, moe_lora_config(again, r=2, lora_alpha=3))
    factors = {name: tensor for name, tensor in adapted.state_dict().items() if "lora_" in name}
    assert after.load_state_dict(factors, strict=False).unexpected_keys == []
    assert_equal(results(after), results(adapted))


def test_counts_and_adapters_of_4bit_models(folder, tmp_path):
    """An adapter's file does not depend on whether the experts are in 4 bits, and loads on both."""
    whole, model = AutoModelForCausalLM.from_pretrained(folder("mixtral")), loaded(folder("mixtral"))
    config = moe_lora_config(model, r=2)
    assert config.target_parameters == moe_lora_config(whole, r=2).target_parameters
    assert trainable_parameters(whole, config)["experts"] > 0
    assert all(parametrize.is_parametrized(module, name) for module, name in matrices_of(model))
    adapted = get_peft_model(model, config)
    fill(adapted, 0.2, only="lora_")
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(loaded(folder("mixtral")), tmp_path)
    assert again(IDS).logits.equal(adapted(IDS).logits)
    merged = PeftModel.from_pretrained(whole, tmp_path).merge_and_unload()
    assert not merged(IDS).logits.equal(adapted(IDS).logits)
    again.add_adapter("other", config)
    again.set_adapter("other")
    assert again(IDS).logits.isfinite().all()


def test_loading_calls_enable(folder, tmp_path):
    """PEFT alone would leave out the adapters of experts, so a saved 4-bit model changes PEFT too when it is loaded."""
    loaded(folder("mixtral")).save_pretrained(tmp_path)
    lora.disable()
    load_model(str(tmp_path))
    assert lora.is_enabled()


def test_one_expert_at_a_time(folder, monkeypatch):
    """Where each expert has tensors of its own in the file, no more than one expert's are joined."""
    joined, convert = [], MergeModulelist.convert

    def spy(self, input_dict, *args, **kwargs):
        joined.extend(len(tensors) for tensors in input_dict.values())
        return convert(self, input_dict, *args, **kwargs)

    monkeypatch.setattr(MergeModulelist, "convert", spy)
    loaded(folder("mixtral"))
    # two layers, four experts, three matrices
    assert joined == [1] * 24


def test_linear_layers(folder, tmp_path):
    """Linear layers equal those of transformers' own quantizer; routers and the head stay as they are."""
    model = loaded(folder("qwen3_moe"), linear_layers=True)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "weight")}
    assert kinds["model.layers.0.self_attn.q_proj"] == "Linear4bit"
    assert kinds["lm_head"] == "Linear"
    stock = AutoModelForCausalLM.from_pretrained(
        folder("qwen3_moe"),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )  # fmt: skip
    # transformers alone leaves experts in 16 bits
    assert {getattr(module, name).dtype for module, name in matrices_of(stock)} == {torch.bfloat16}
    assert not any(parametrize.is_parametrized(module) for module, _ in matrices_of(stock))
    quantize_experts(stock)
    assert_same_state(model, stock)
    with pytest.raises(UserError, match="none beside other weights in 4 bits"):
        stock.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert_same_state(again, model)
    # outside training, bitsandbytes lays the weights out anew for the CPU, and refuses layers this narrow
    assert model.train()(IDS).logits.equal(stock.train()(IDS).logits)
    adapted = get_peft_model(again, moe_lora_config(again, r=2)).train()
    assert all(gradient.isfinite().all() for gradient in results(adapted).values())


def test_other_formats_and_dtypes(folder, tmp_path):
    options = {"quant_type": "fp4", "compress_statistics": False}
    model, reference = loaded(folder("moe"), **options), MoEForCausalLM.from_pretrained(folder("moe"))
    quantize_experts(reference, **options)
    assert_same_state(model, reference)
    model.save_pretrained(tmp_path)
    assert_same_state(load_model(str(tmp_path)), model)
    wide = load_model(str(tmp_path), dtype="float32")
    assert {getattr(module, name).dtype for module, name in matrices_of(wide)} == {torch.float32}
    assert wide(IDS).logits.isfinite().all()


def test_a_model_in_16_bits_is_saved_in_4(folder, tmp_path):
    """What `quantize_experts` made is saved as the streamed model is."""
    model = AutoModelForCausalLM.from_pretrained(folder("qwen3_moe"))
    quantize_experts(model)
    model.save_pretrained(tmp_path)
    loaded(folder("qwen3_moe")).save_pretrained(tmp_path / "streamed")
    names = ("config.json", "model.safetensors")
    assert all((tmp_path / "streamed" / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def damaged(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", ["moe", "qwen3_moe"])
@pytest.mark.parametrize(
    "change",
    [
        lambda state, name: state.pop(name),
        lambda state, name: state.pop(f"{name}.absmax"),
        lambda state, name: state.pop(f"{name}.nested_absmax"),
        lambda state, name: state.pop(f"{name}.quant_state.bitsandbytes__nf4"),
        lambda state, name: state.update({name: state[name][:-1].clone()}),
        lambda state, name: state.update({f"{name}.absmax": state[f"{name}.absmax"][:-1].clone()}),
        lambda state, name: state.update({name: state[name].float()}),
    ],
)
def test_damaged_files(family, change, folder, tmp_path):
    loaded(folder(family)).save_pretrained(tmp_path)
    name = next(key for key in load_file(tmp_path / "model.safetensors") if key.endswith("experts.down_proj"))
    damaged(tmp_path, lambda state: change(state, name))
    with pytest.raises(UserError, match="down_proj"):
        load_model(str(tmp_path))


def test_a_checkpoint_without_an_expert(folder, tmp_path):
    source_of("mixtral").bfloat16().save_pretrained(tmp_path)
    damaged(tmp_path, lambda state: state.pop(next(name for name in state if "experts.3." in name)))
    with pytest.raises((RuntimeError, CheckpointError, UserError)):
        loaded(tmp_path)


def test_a_transposed_matrix(folder, tmp_path):
    """As many numbers in another shape are refused as in 16 bits."""
    source_of("gpt_oss").bfloat16().save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    damaged(tmp_path, lambda state: state.update({name: state[name].reshape(4, 8, -1).clone()}))
    with pytest.raises(UserError, match="gate_up_proj"):
        load_model(str(tmp_path), quantization_config=Experts4bitConfig())


def test_transformers_alone_refuses_the_file(folder, tmp_path, monkeypatch):
    """A process without this package gets an error, and not a model with other weights."""
    loaded(folder("mixtral")).save_pretrained(tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "modeling_moe_4bit")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_mistakes(folder):
    with pytest.raises(UserError, match="quant_type is 'int4'"):
        Experts4bitConfig(quant_type="int4")
    with pytest.raises(UserError, match="lineer_layers: Experts4bitConfig has no such field"):
        Experts4bitConfig(lineer_layers=True)
    with pytest.raises(UserError, match=r"dtype is torch\.float64"):
        AutoModelForCausalLM.from_pretrained(
            folder("mixtral"), quantization_config=Experts4bitConfig(), dtype=torch.float64
        )
    with pytest.raises(UserError, match="is 'eager', load the model"):
        AutoModelForCausalLM.from_pretrained(
            folder("mixtral"), quantization_config=Experts4bitConfig(), experts_implementation="eager"
        )
    with pytest.raises(UserError, match="load the checkpoint in 16 bits"):
        loaded(folder("mixtral")).dequantize()
    with pytest.raises(UserError, match="is offloaded"):
        quantize_experts(from_pretrained_offloaded(str(folder("mixtral")), slots=2))
    assert json.loads(json.dumps(Experts4bitConfig().to_dict()))["quant_method"] == "modeling_moe_4bit"


def test_a_dense_model(tmp_path):
    config = AutoConfig.for_model("llama", **FIELDS)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the model has no experts"):
        loaded(tmp_path)


def _train(rank: int, folder: str, wrap: str) -> None:
    model = loaded(folder)
    model = get_peft_model(model, moe_lora_config(model, r=2, lora_alpha=3, router=False))
    fill(model, 0.2, only="lora_")
    expected = results(model)
    if wrap == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in model.base_model.model.model.layers:
            torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
        wrapped = torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    output = wrapped(input_ids=IDS, labels=IDS)
    assert output.logits.equal(expected.pop("logits"))
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            torch.testing.assert_close(gradient, expected.pop(name), atol=0, rtol=0)
    assert not expected


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_processes(wrap, folder):
    """Two processes with the batch of one train with the gradients of one; FSDP2 splits the 4-bit numbers too."""
    run_ranks(_train, 2, folder("mixtral"), wrap)


def test_pages_stay_where_the_kernel_does_not_tell_who_wrote_to_them(monkeypatch, tmp_path):
    monkeypatch.setattr(mapped_pages, "PAGES", tmp_path / "missing")
    assert mapped_pages._written(0, 8192)
    (tmp_path / "missing").write_bytes(bytes(8))
    assert mapped_pages._written(0, 8192)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(12, 48, 32), (12, 16, 160), (4, 8, 64), (3, 5, 7)])
def test_rows_that_are_no_multiple_of_a_block_are_dequantized_with_the_right_scales(shape, dtype):
    torch.manual_seed(0)
    matrix = torch.randn(shape).mul(torch.rand(*shape[:2], 1)).to(dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    module = torch.nn.Module()
    module.up_proj = torch.nn.Parameter(matrix.clone())
    holding.hold_experts(module, [("up_proj", FourBit(packed, state))])
    assert module.up_proj.shape == shape
    assert (module.up_proj - matrix).norm() < 0.12 * matrix.norm()
