"""This script writes the table of docs/serving.md from the answers that servers and transformers have given.

python -m serving_check.table FOLDER PAGE [VERSION ...]    in this package's environment; exit code 1 if a row is silently wrong
"""

import sys
from pathlib import Path

from transformers import AutoConfig

from modeling_moe import MoEConfig
from modeling_moe.conversion import verdicts

from .answers import Answers, compare
from .cases import CASES, Case


# the name of an answers' file -> column, and the server's name in `modeling_moe.conversion.verdicts`
COLUMNS = {
    "llama": ("llama.cpp", "llama.cpp"),
    "vllm": ("vLLM, its own class", "vLLM"),
    "own": ("vLLM, our code", None),
}
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def refusal(folder: Path, server: str | None) -> str | None:
    """Returns why this package does not name a server for an export, or None if it names the server."""
    if server is None:
        return None
    config = AutoConfig.from_pretrained(folder / "export")
    found = [verdict for verdict in verdicts(config) if verdict.server.name == server]
    return "; ".join(found[0].faults) if found and found[0].faults else None


def cell(folder: Path, column: str) -> tuple[str, bool]:
    """Returns what a server did with a model, and whether the package would have let it answer wrongly."""
    path = folder / f"{column}.json"
    refused = folder / "refused.txt"
    if column != "own" and refused.exists():
        return "refused by us: " + refused.read_text(encoding="utf-8").split(";")[0], False
    if not path.exists():
        return "", False
    answers = Answers.load(path)
    reason = refusal(folder, COLUMNS[column][1])
    if answers.error is not None:
        if "would change the text, because" in answers.error:
            return "refused by us: " + answers.error.split("because ")[1].split(":")[0], False
        return "refused by the server" + (", not named by us" if reason else ""), False
    found = compare(Answers.load(folder / "transformers.json"), answers)
    if found.exact:
        return f"exact, {found.difference:.0e}" + (f" (not named by us: {reason})" if reason else ""), False
    figures = f"{found.same} of {found.tokens} tokens, {found.difference:.0e}"
    if reason is None:
        return f"**wrong**, {figures}", True
    return f"wrong, {figures}; not named by us: {reason}", False


def row(root: Path, case: Case) -> tuple[str, bool]:
    """Returns the line of a case, and whether it is silently wrong anywhere."""
    cells = [cell(root / case.folder, column) for column in COLUMNS]
    line = f"| {case.name} | {' | '.join(text for text, _ in cells)} |".replace("  |", " |")
    return line, any(wrong for _, wrong in cells)


def main() -> None:
    """Writes the table between the page's markers, and fails for a row that is silently wrong."""
    root, page, versions = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    MoEConfig()  # registers the auto classes
    rows = [row(root, case) for case in CASES if (root / case.folder / "transformers.json").exists()]
    heads = [title for title, _ in COLUMNS.values()]
    table = [f"| Model | {' | '.join(heads)} |", "|---|---|---|---|", *(line for line, _ in rows)]
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    measured = "\n".join([BEGIN, "", f"Measured with {', '.join(versions)}.", "", *table, "", END])
    page.write_text(before + measured + after, encoding="utf-8")
    print("\n".join(table))
    sys.exit(any(wrong for _, wrong in rows))


if __name__ == "__main__":
    main()
