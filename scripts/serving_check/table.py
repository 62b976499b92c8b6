"""This script prints what servers have answered beside transformers, and writes the table of docs/serving.md.

python -m serving_check.table FOLDER [CASE ...]             in this package's environment; exit code 1 for a fault of the package
python -m serving_check.table FOLDER --page PAGE VERSION ...    of all cases, into the page
"""

import sys
from pathlib import Path

from transformers import AutoConfig

from modeling_moe import MoEConfig
from modeling_moe.conversion import verdicts

from .answers import Answers, compare
from .cases import CASES, EXPORTS, REFUSED, Case
from .page import write_section


# the name of an answers' file -> column, and the server's name in `modeling_moe.conversion.verdicts`
COLUMNS = {
    "llama": ("llama.cpp", "llama.cpp"),
    "vllm": ("vLLM, its own class", "vLLM"),
    "own": ("vLLM, our code", None),
}


def refusal(folder: Path, server: str | None) -> str | None:
    """Returns why this package does not name a server for an export, or None if it names the server."""
    if server is None:
        return None
    config = AutoConfig.from_pretrained(folder / "export")
    found = [verdict for verdict in verdicts(config) if verdict.server.name == server]
    return "; ".join(found[0].faults) if found and found[0].faults else None


def cell(case: Case, folder: Path, column: str) -> tuple[str, bool]:
    """Returns what a server did with a model, and whether that is a fault of this package."""
    path = folder / f"{column}.json"
    refused = folder / "refused.txt"
    if column != "own" and refused.exists():
        return "refused by us: " + refused.read_text(encoding="utf-8").split(";")[0], case in EXPORTS
    if not path.exists():
        return ("**not asked**", True) if column == "own" or case.target is not None else ("", False)
    answers = Answers.load(path)
    # vLLM takes the sinks of its own class of gpt-oss alone
    must_refuse = column == "own" and (case in REFUSED or "attention_sinks" in case.fields)
    reason = refusal(folder, COLUMNS[column][1])
    if answers.error is not None:
        if "would change the text, because" in answers.error:
            return "refused by us: " + answers.error.split("because ")[1].split(":")[0], not must_refuse
        # a model card that names the server would be wrong, and so would the plugin be
        return ("refused by the server, not named by us", False) if reason else ("**refused by the server**", True)
    found = compare(Answers.load(folder / "transformers.json"), answers)
    if must_refuse:
        return "**not refused**", True
    if found.exact:
        return f"exact, {found.difference:.0e}" + (f" (not named by us: {reason})" if reason else ""), False
    figures = f"{found.same} of {found.tokens} tokens" + (f", {found.difference:.0e}" if found.same else "")
    if reason is None:
        return f"**wrong**, {figures}", True
    return f"wrong, {figures}; not named by us: {reason}", False


def row(root: Path, case: Case) -> tuple[str, bool]:
    """Returns the line of a case, and whether it shows a fault of this package."""
    cells = [cell(case, root / case.folder, column) for column in COLUMNS]
    line = f"| {case.name} | {' | '.join(text for text, _ in cells)} |".replace("  |", " |")
    return line, any(wrong for _, wrong in cells)


def main() -> None:
    """Prints the table of the chosen cases, or writes the page with all, and fails for a fault of this package."""
    root, chosen = Path(sys.argv[1]), sys.argv[2:]
    page, versions = None, []
    if "--page" in chosen:
        place = chosen.index("--page")
        page, versions, chosen = Path(chosen[place + 1]), chosen[place + 2 :], chosen[:place]
    MoEConfig()  # registers the auto classes
    rows = [row(root, case) for case in CASES if not chosen or case.folder in chosen]
    heads = [title for title, _ in COLUMNS.values()]
    table = [f"| Model | {' | '.join(heads)} |", "|---|---|---|---|", *(line for line, _ in rows)]
    if page is not None:
        write_section(page, "measured", versions, table)
    print("\n".join(table))
    sys.exit(any(wrong for _, wrong in rows))


if __name__ == "__main__":
    main()
