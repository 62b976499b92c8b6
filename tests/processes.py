"""A process in which this package is not installed, as that of somebody who loads a checkpoint by its own code."""

import subprocess
import sys
from pathlib import Path


BEFORE = """
try:
    import modeling_moe
    raise SystemExit("the package is installed here, the test shows nothing")
except ImportError:
    pass
"""


def run_without_package(script: str, folder: Path, *arguments: str | Path) -> str:
    """Runs a script in a new process with all that is installed here but this package; fails where the script fails.

    Args:
        script: its text.
        folder: an empty place for what the process needs.
        arguments: what the script finds in `sys.argv[1:]`.

    Returns:
        What the script printed.
    """
    # -S drops the installed package with all of site-packages; the others come back by name
    site = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    visible = folder / "site"
    visible.mkdir()
    for entry in site.iterdir():
        if "modeling_moe" not in entry.name and entry.suffix != ".pth":
            (visible / entry.name).symlink_to(entry)
    file = folder / "remote.py"
    file.write_text(BEFORE + script)
    environment = {"PYTHONPATH": str(visible), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, "-S", file, *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout
