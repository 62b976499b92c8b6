# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the shapes of the GPU check, the most important first: at full size, and tiny without a GPU."""

from typing import Any, NamedTuple

from ..compilation import Experts


class Shape(NamedTuple):
    """Describes one pass through the experts of one layer.

    Attributes:
        preset: key of [`~moe_benchmark.presets.PRESETS`].
        tokens: number of tokens T.
        dtype: `"bfloat16"`, `"float16"`, `"float32"`, or `"tf32"`: float32 whose products may be rounded to TF32.
        scenario: `"train"`, forward and backward with all gradients; `"infer"`, forward; `"lora"`, forward and
            backward of low-rank updates of frozen matrices; or `"decode"`.
    """

    preset: str
    tokens: int
    dtype: str = "bfloat16"
    scenario: str = "train"


class Comparison(NamedTuple):
    """Describes a case that is compared with other implementations, see [`~moe_benchmark.cases.Case`]."""

    preset: str
    tokens: int
    mode: str
    routing: str = "balanced"
    dtype: str = "bfloat16"


class Size(NamedTuple):
    """Describes what each part measures.

    Attributes:
        comparison: cases that are compared with other implementations.
        kernels: passes whose launches are timed one by one.
        swept: passes for which tiles are tried, with `changes` values of each field.
        crossover: passes for which tiles of different heights are compared.
        lora: passes in which full fine-tuning is compared with LoRA.
        memory: passes whose memory is compared.
        science: layers of part `science` with their tokens, which are compiled beforehand.
        matrix: number of rows of the square matrices that measure the rate of products.
        copied: bytes of the copy that measures the bandwidth.
        model: fields of the configuration of the checked model.
        half: 16-bit dtype in which the model is trained; Triton's interpreter is wrong in bfloat16.
        batch: number of sequences and their length in that model.
        new_tokens: number of tokens that the model generates.
        steps: number of steps of random numbers of tokens in which nothing may be compiled.
        tests: arguments of pytest.
        case_s: seconds of measuring for each case of `comparison`, and of `lora` in a model.
        case_rounds: number of rounds of these cases, which replaces `case_s`; None for no number.
        rounds: number of rounds of all other measurements.
    """

    comparison: tuple[Comparison, ...]
    kernels: tuple[Shape, ...]
    swept: tuple[Shape, ...]
    changes: int
    crossover: tuple[Shape, ...]
    lora: tuple[Shape, ...]
    memory: tuple[Shape, ...]
    science: tuple[tuple[Experts, int], ...]
    matrix: int
    copied: int
    model: dict[str, Any]
    half: str
    batch: tuple[int, int]
    new_tokens: int
    steps: int
    tests: tuple[str, ...]
    case_s: float
    case_rounds: int | None
    rounds: int


QWEN3, OTHERS = "qwen3_30b_a3b", ("mixtral_8x7b", "gpt_oss_20b", "olmoe", "deepseek_v3")
BOTH, FORWARD, DECODE = "forward_backward", "forward", "decode"
FULL = Size(
    comparison=(
        *(Comparison(QWEN3, tokens, mode) for tokens in (32768, 4096) for mode in (BOTH, FORWARD)),
        *(Comparison(QWEN3, tokens, DECODE) for tokens in (1, 16)),
        *(Comparison(preset, 32768, BOTH) for preset in OTHERS),
        *(Comparison(preset, 4096, mode) for preset in OTHERS for mode in (BOTH, FORWARD)),
        *(Comparison(QWEN3, 32768, BOTH, routing) for routing in ("zipf", "all_to_one")),
        *(Comparison(QWEN3, 128, mode) for mode in (FORWARD, BOTH)),
        *(Comparison(preset, 1, DECODE) for preset in OTHERS),
    ),
    kernels=(
        *(Shape(QWEN3, tokens) for tokens in (32768, 4096)),
        *(Shape(QWEN3, tokens, scenario="lora") for tokens in (32768, 4096)),
        *(Shape(QWEN3, tokens, scenario="decode") for tokens in (1, 16)),
        *(Shape(preset, tokens) for tokens in (32768, 4096) for preset in OTHERS),
        *(Shape(QWEN3, 4096, dtype) for dtype in ("tf32", "float32", "float16")),
        *(Shape(preset, 128) for preset in (QWEN3, *OTHERS)),
    ),
    swept=(
        *(Shape(QWEN3, tokens) for tokens in (32768, 2048)),
        Shape(QWEN3, 32768, scenario="lora"),
        *(Shape(QWEN3, tokens, scenario="decode") for tokens in (1, 16)),
    ),
    changes=8,
    crossover=tuple(Shape(QWEN3, tokens) for tokens in (1024, 1536, 2048, 3072, 4096, 6144, 8192)),
    lora=(Shape(QWEN3, 32768), Shape(QWEN3, 4096)),
    memory=(*(Shape(QWEN3, tokens) for tokens in (32768, 4096)), Shape("mixtral_8x7b", 32768), Shape("olmoe", 32768)),
    # SmolLM2's layers after the upcycling of part `science`
    science=((Experts(576, 192, 64, 8), 16384), (Experts(576, 1536, 8, 2), 16384)),
    matrix=8192,
    copied=1 << 32,
    model={
        "vocab_size": 512,
        "hidden_size": 512,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
    half="bfloat16",
    batch=(4, 256),
    new_tokens=24,
    steps=50,
    tests=(
        "-q",
        "-n",
        "auto",
        "-m",
        "gpu and not slow",
        "tests/dispatch",
        "tests/lora",
        "tests/core",
        "tests/training",
    ),
    case_s=1.0,
    case_rounds=None,
    rounds=12,
)
TINY = Size(
    comparison=(Comparison("tiny", 9, BOTH, dtype="float32"), Comparison("tiny", 2, DECODE, dtype="float32")),
    kernels=(Shape("tiny", 9, "float32"), Shape("tiny", 9, "float32", "lora"), Shape("tiny", 2, "float32", "decode")),
    swept=(Shape("tiny", 9, "float32"), Shape("tiny", 9, "float32", "lora"), Shape("tiny", 2, "float32", "decode")),
    changes=1,
    crossover=(Shape("tiny", 9, "float32"),),
    lora=(Shape("tiny", 9, "float32"),),
    memory=(Shape("tiny", 9, "float32"),),
    science=((Experts(32, 16, 4, 2), 9),),
    matrix=64,
    copied=1 << 16,
    model=FULL.model
    | {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_experts": 4}
    | {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2},
    half="float16",
    batch=(2, 9),
    new_tokens=3,
    steps=2,
    tests=(
        "-q",
        "-n",
        "0",
        "-m",
        "gpu and not slow",
        "tests/dispatch/test_triton.py",
        "-k",
        "no_tokens or idle_expert",
    ),
    case_s=0.05,
    case_rounds=1,
    rounds=1,
)
SIZES = {"full": FULL, "tiny": TINY}
