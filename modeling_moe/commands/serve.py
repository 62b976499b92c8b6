# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command serves a causal LM by `transformers serve`, to clients of the OpenAI API.

    moe serve --model_name_or_path outputs/demo/model
    moe serve --model_name_or_path ./moe --continuous_batching true --port 8080
    curl localhost:8000/v1/completions -d '{"model": "outputs/demo/model", "prompt": "The import statement"}'

`transformers serve` alone does not find the classes of this package. The server answers POST /v1/chat/completions and
/v1/completions, whole or streamed, and GET /v1/models and /health, for the one model that it has loaded. A chat needs a
tokenizer with a chat template. Ctrl-C stops the server. A MoE checkpoint runs by this package, not by the code that is saved
beside the weights.
"""

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.utils.import_utils import is_serve_available

from ..configuration_moe import MoEConfig
from ..modeling_moe import MoEForCausalLM
from ..utils.command_line import parse
from ..utils.errors import UserError
from ..utils.loading import DtypeName, load_config, load_tokenizer
from ..utils.locations import folder_and_gguf
from ..utils.twins import twin_of


@dataclass
class ServeArguments:
    """Which model to serve, and where."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a causal LM"})
    host: str = field(default="localhost", metadata={"help": "address that the server listens on"})
    port: int = field(default=8000, metadata={"help": "port that the server listens on"})
    continuous_batching: bool = field(
        default=False, metadata={"help": "compute several requests in one batch, with keys and values in pages"}
    )
    dtype: DtypeName = field(default="auto", metadata={"help": "dtype of the model; auto: the checkpoint's dtype"})
    device: str = field(default="auto", metadata={"help": "device of torch; auto: the accelerators if there are any"})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention implementation of transformers, such as sdpa or flash_attention_2"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})

    def __post_init__(self):
        if not 0 < self.port < 2**16:
            raise UserError(f"port is {self.port}: it must be from 1 to 65535")


def check(args: ServeArguments) -> None:
    """Refuses what would fail at the first request, or answer wrongly.

    Raises:
        UserError: if the folder holds no model and tokenizer of transformers, config.json has a model type that only
            this package opens, a token's output would depend on other requests in the batch, packages of the server are
            missing, or another process listens on the port.
    """
    name = args.model_name_or_path
    if (Path(name) / "adapter_config.json").is_file():
        raise UserError(f"{name} is an adapter: merge it first by moe merge_adapter")
    tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    config = load_config(name, trust_remote_code=args.trust_remote_code)
    _refuse_twin(name)
    if args.continuous_batching and isinstance(config, MoEConfig):
        try:
            config.refuse_continuous_batching()
        except ValueError as error:
            raise UserError(f"model_name_or_path {name}: {error}") from error
    if not is_serve_available():
        raise UserError("the server needs fastapi, uvicorn and openai: pip install 'modeling-moe[serving]'")
    _refuse_taken_port(args)
    if tokenizer.chat_template is None:
        print(
            "The tokenizer has no chat template, so the server answers /v1/completions alone, and a chat ends in an error."
        )


def _refuse_twin(name: str) -> None:
    """Refuses a model type that this package opens by another name, which `transformers serve` does not know."""
    folder, gguf_file = folder_and_gguf(name, None)
    values = {} if gguf_file else PreTrainedConfig.get_config_dict(folder)[0]
    if (family := twin_of(values)) is not None:
        raise UserError(
            f"transformers serves no model_type {values['model_type']!r}: write {family!r} into config.json of {name}, which "
            "is the name of the family that computes it"
        )


def _refuse_taken_port(args: ServeArguments) -> None:
    """Refuses an address that cannot be listened on, which the server would notice only after it has loaded the model."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # as the server does: a port that a stopped server has left a moment ago is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"host {args.host}, port {args.port}: {error.strerror}; choose another --host or --port"
        ) from error


def serve(args: ServeArguments) -> None:
    """Starts the server and returns when it is stopped.

    Raises:
        UserError: for what `check` refuses.
    """
    check(args)
    # the server looks the class up by the name that config.json gives, in transformers alone
    setattr(transformers, MoEForCausalLM.__name__, MoEForCausalLM)
    # here, since the module needs the packages of the server
    from transformers.cli.serve import Serve

    device = args.device
    if device == "auto" and not torch.accelerator.is_available():
        device = "cpu"
    # Ctrl-C is how a server ends; uvicorn raises it again after it has stopped
    with contextlib.suppress(KeyboardInterrupt):
        Serve(
            force_model=args.model_name_or_path,
            host=args.host,
            port=args.port,
            continuous_batching=args.continuous_batching,
            dtype=args.dtype,
            device=device,
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Serves until Ctrl-C."""
    (args,) = parse([ServeArguments], __doc__, argv)
    serve(args)
