#!/usr/bin/env python
"""Let a saved model write, as anybody would load it: through the auto classes, with the code beside its weights.

    python scripts/generate.py --model_name_or_path outputs/demo/model --prompt "The import statement"

It imports the package only for a checkpoint of version 0.1.0, whose code decodes wrongly on transformers 5.24; any other
MoE checkpoint runs the code that it was saved with.
"""

import json
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file


@dataclass
class Arguments:
    """What to load and what to continue."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name"})
    prompt: list[str] = field(metadata={"help": "texts to continue"})
    max_new_tokens: int = field(default=32, metadata={"help": "tokens to write"})


def has_old_code(name_or_path: str) -> bool:
    """Whether a checkpoint, or the base of an adapter, carries code of version 0.1.0."""
    if (file := find_adapter_config_file(name_or_path)) is not None:
        return has_old_code(json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"])
    config, _ = PreTrainedConfig.get_config_dict(name_or_path)
    folder = Path(name_or_path)
    if (folder / "modeling_moe.py").is_file():
        return not (folder / "compatibility.py").is_file()
    return config.get("model_type") == "moe" and "auto_map" in config and "code_version" not in config


def main() -> None:
    """Prints each prompt with its greedy continuation."""
    parser = HfArgumentParser(
        Arguments, description=__doc__, formatter_class=RawDescriptionHelpFormatter, usage=SUPPRESS
    )
    (args,) = parser.parse_args_into_dataclasses()
    try:
        if has_old_code(args.model_name_or_path):
            import modeling_moe  # noqa: F401, its classes then take the place of the checkpoint's
        tokenizer: Any = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, trust_remote_code=True).eval()
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        parser.exit(2, f"{parser.prog}: model_name_or_path {args.model_name_or_path} cannot be loaded: {cause}\n")
    print(f"{type(model).__module__}.{type(model).__name__}, experts by {model.config._experts_implementation}")
    for prompt in args.prompt:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        print(f"> {tokenizer.decode(ids[0], skip_special_tokens=True)}\n")


if __name__ == "__main__":
    main()
