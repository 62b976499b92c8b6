#!/usr/bin/env python
"""Let a saved model write, as anybody would load it: through the auto classes, with the code beside its weights.

python scripts/generate.py --model_name_or_path outputs/demo/model --prompt "The import statement"
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM

from modeling_moe.cli import parse, run
from modeling_moe.files import load_tokenizer


@dataclass
class Arguments:
    """What to load and what to continue."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name"})
    prompt: list[str] = field(metadata={"help": "texts to continue"})
    max_new_tokens: int = field(default=32, metadata={"help": "tokens to write"})


def main() -> None:
    """Prints each prompt with its greedy continuation."""
    (args,) = parse([Arguments], __doc__)
    tokenizer = load_tokenizer(args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, trust_remote_code=True).eval()
    print(f"{type(model).__name__}, {model.config._experts_implementation}")
    for prompt in args.prompt:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        print(f"> {tokenizer.decode(ids[0], skip_special_tokens=True)}\n")


if __name__ == "__main__":
    run(main)
