# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package describes the fields and tensors of each model family in transformers that can be imported.

There is one module for each lineage: `softmax` (Mixtral, Qwen, OLMoE, FlexOlmo, Mellum, Flint, ERNIE-4.5), `deepseek`
(DeepSeek-MoE, V2, V3), `bias_routed` (routed as DeepSeek-V3: dots.llm1, GLM, Sarvam, Solar, K-EXAONE, Hunyuan 3, MiniMax-M2),
`attention_variants` (A.X-K1, Mistral 4, Hunyuan-A13B, AFMoE), `granite`, `gpt_oss`, `jetmoe`, `cohere` (Cohere2-MoE, DBRX), `kolibri`,
`phimoe`, `text_models` (of multimodal models) and `dense`.

What they share: `base` (the record of fields that were read), `sparse_parts`, `quantized` (dequantisation), `wrappers`
(takes the text model out of a multimodal one), `reading` (whether a model's code reads a field), `catalogue` (all families in
one dictionary) and `unread` (why the other families have no conversion).
"""
