"""This script runs under another release of transformers and saves what it computes for each model folder in a folder."""

import json
import sys
from pathlib import Path

import torch
import transformers


def read(folder: Path) -> None:
    """Writes `theirs.pt` beside `ids.pt`: logits, and the token ids of text.txt if that file exists."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model.eval()(torch.load(folder / "ids.pt")).logits
    result = {"version": transformers.__version__, "logits": logits}
    if (text := folder / "text.txt").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        result["tokens"] = tokenizer(text.read_text("utf-8")).input_ids
        result["specials"] = json.dumps(tokenizer.special_tokens_map)
        result["chat"] = tokenizer.chat_template
    torch.save(result, folder / "theirs.pt")


for path in sorted(Path(sys.argv[1]).iterdir()):
    read(path)
