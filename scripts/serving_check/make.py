"""This script makes the checkpoints of all cases, exports them, and asks transformers for the answers in fp32.

python -m serving_check.make FOLDER SMOLLM2 [CASE ...]    in this package's environment; SMOLLM2 is a folder with its GGUF file
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.conversion import convert_checkpoint
from modeling_moe.upcycling import UpcyclingOptions, upcycle_checkpoint
from modeling_moe.utils.errors import UserError

from .answers import NEW_TOKENS, PROMPTS, Answers, ends_inside_character
from .cases import CASES, SIZE, Case


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def inside_characters(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Returns for each token whether the text up to it ends inside a character."""
    byte = {character: value for value, character in bytes_to_unicode().items()}
    text, inside = b"", []
    for token in ids:
        # llama.cpp's server writes no text for a special token
        if token not in tokenizer.added_tokens_decoder:
            text += bytes(byte[character] for character in str(tokenizer.convert_ids_to_tokens(token)))
        inside.append(ends_inside_character(text))
    return inside


def answers(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Answers:
    """Returns the greedy answers of the model in `folder`, computed by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, logprobs = [], []
    for prompt in PROMPTS:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = output.sequences[0, len(prompt) :]
        ids.append(new.tolist())
        scores = torch.cat(output.logits).log_softmax(dim=-1)
        logprobs.append(scores.gather(1, new[:, None])[:, 0].tolist())
    return Answers(ids, logprobs, inside=[inside_characters(each, tokenizer) for each in ids])


def make_random(case: Case, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Saves a random model in which experts differ in size and each buffer of a router differs from the initial value."""
    torch.manual_seed(0)
    fields: dict[str, Any] = SIZE | case.fields
    model = MoEForCausalLM(MoEConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif ".experts." in name:
                parameter.mul_(torch.linspace(0.5, 1.5, len(parameter)).view(-1, *[1] * (parameter.dim() - 1)))
        for name, buffer in model.named_buffers():
            if ".gate." in name and buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand_like(buffer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_upcycled(case: Case, folder: Path, smollm2: Path) -> None:
    """Saves SmolLM2-135M, upcycled with noise between the experts."""
    options = UpcyclingOptions(**case.fields)
    upcycle_checkpoint(str(smollm2), folder, options, gguf_file=GGUF, dtype="float32", overwrite=True)


def export(target: str, folder: Path) -> None:
    """Exports a case's model, or writes why the package refuses to."""
    try:
        convert_checkpoint(str(folder / "moe"), folder / "export", target=target, overwrite=True)
    except UserError as error:
        shutil.rmtree(folder / "export", ignore_errors=True)
        (folder / "refused.txt").write_text(str(error), encoding="utf-8")


def main() -> None:
    """Makes the cases that the command line names, or all."""
    root, smollm2, chosen = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    if unknown := set(chosen).difference(case.folder for case in CASES):
        sys.exit(
            f"unknown cases: {', '.join(sorted(unknown))}; the cases are {', '.join(case.folder for case in CASES)}"
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2, gguf_file=GGUF)
    for case in CASES:
        if chosen and case.folder not in chosen:
            continue
        folder = root / case.folder
        # answers of an earlier run, perhaps by other releases, must not pass for answers of this one
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if case.upcycled:
            make_upcycled(case, folder / "moe", smollm2)
        else:
            make_random(case, folder / "moe", tokenizer)
        answers(folder / "moe", tokenizer).save(folder / "transformers.json")
        if case.target is not None:
            export(case.target, folder)
        print(f"=== {case.name}", flush=True)


if __name__ == "__main__":
    main()
