#!/usr/bin/env python
"""Let a saved model write: continue texts, or answer in a chat.

    python scripts/generate.py --model_name_or_path outputs/demo/model --prompt "The import statement"
    python scripts/generate.py --model_name_or_path ./moe --chat true --prompt "Who are you?" "And what can you do?"
    python scripts/generate.py --model_name_or_path ./moe --chat true --system "Be brief." --do_sample true --top_p 0.9
    python scripts/generate.py --model_name_or_path ./dense --gguf_file model.gguf --prompt "Once upon a time"

It writes the likeliest token each time, the same text always, or draws with --do_sample true. A chat without --prompt reads
the user's turns from the terminal, until Ctrl-D. The checkpoint's generation_config.json holds for what no flag says. A MoE
checkpoint runs by the package, whose code takes the place of the code beside the weights.
"""

from modeling_moe.utils.command_line import parse, run
from modeling_moe.utils.generation import GenerationArguments, generate


def main() -> None:
    """Prints what the model writes, as it writes."""
    (args,) = parse([GenerationArguments], __doc__)
    generate(args)


if __name__ == "__main__":
    run(main)
