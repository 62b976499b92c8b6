# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package exports a MoE checkpoint to families of transformers, and knows which server computes each exactly.

`catalogue` has all targets, and chooses one; `base` describes a target, and names what it cannot hold. The targets: `softmax`
(Mixtral, Granite, Qwen-MoE, OLMoE), `sigmoid` (DeepSeek-V3, GLM-4, MiniMax-M2) and `gpt_oss`; `parts` is what they share.
`servers` says what vLLM, llama.cpp and transformers do with the checkpoints of a target.
"""
