"""This module runs the code cells of docs/notebook.ipynb in one namespace, without Jupyter.

python -m tests.docs.notebook    stores what the cells print in the notebook
"""

import contextlib
import io
import json
import re
from typing import Any

from tests.docs.blocks import ROOT


NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
PROGRESS = re.compile(r"^.*[━█╸╺].*\n", flags=re.MULTILINE)


def read() -> dict[str, Any]:
    """Returns the notebook."""
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def run_cells(notebook: dict[str, Any]) -> list[str]:
    """Returns what each code cell prints, without progress bars."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), namespace)
            printed.append(PROGRESS.sub("", output.getvalue()))
    return printed


def stored_outputs(notebook: dict[str, Any]) -> list[str]:
    """Returns what the notebook says that each code cell prints."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join("".join(output["text"]) for output in cell["outputs"]) for cell in cells]


def main() -> None:
    """Runs the notebook and stores the outputs."""
    notebook = read()
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, text) in enumerate(zip(cells, run_cells(notebook), strict=True), start=1):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell |= {"execution_count": number, "outputs": [stream] if text else []}
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
