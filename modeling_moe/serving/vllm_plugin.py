# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module is vLLM's plugin: by it `vllm serve` runs this package's checkpoints without a flag and without remote code.

vLLM calls `register` in each of its processes, because pyproject.toml names the function under `vllm.general_plugins`.
"""

# class in vllm_model.py, named as text because vLLM imports it when a checkpoint needs it, in a process of its own
SERVED_MODEL = "modeling_moe.serving.vllm_model:VllmMoEForCausalLM"


def register() -> None:
    """Registers configuration and models with transformers' auto classes, and the served model with vLLM.

    Raises:
        ImportError: if vLLM is not installed; only vLLM calls this function.
    """
    # not at the top: vLLM is no dependency of this package
    from vllm import ModelRegistry
    from vllm.model_executor.models import registry

    # the import of the package registers the auto classes
    import modeling_moe

    name = modeling_moe.MoEForCausalLM.__name__
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, SERVED_MODEL)
    # with `--model-impl transformers` vLLM takes a class of its own, which knows neither other activations nor empty
    # assignments, except for the architectures in this dictionary, whose registered class it takes
    registry._TRANSFORMERS_BACKEND_MODELS[name] = tuple(SERVED_MODEL.split(":"))
