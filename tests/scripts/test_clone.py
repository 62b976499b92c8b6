"""Every script starts in a clone in which the package is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPTS = Path(__file__).parents[2] / "scripts"
# runs each script as `python scripts/NAME.py --help` does, with the script's folder first on the path
DRIVER = """
import importlib.util, runpy, sys
from pathlib import Path
folder = sys.argv[1]
assert sys.path.pop(0) != folder
assert importlib.util.find_spec("modeling_moe") is None, "the package is installed"
sys.path.insert(0, folder)
for script in sorted(Path(folder).glob("*.py")):
    sys.argv = [script.name, "--help"]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        print(f"{script.name} ended with {stop.code}")
"""


def test_every_script_starts_without_installation(tmp_path):
    """With -S Python reads no `.pth` file, so an editable installation is not found."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    packages = [path for path in sys.path if path.endswith("-packages")]
    if any((Path(path) / "modeling_moe").exists() for path in packages):
        pytest.skip("the package is copied into site-packages")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(packages), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-S", str(driver), str(SCRIPTS)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in SCRIPTS.glob("*.py"))
    assert len(names) >= 11
    assert [line for line in result.stdout.splitlines() if " ended with " in line] == [
        f"{name} ended with 0" for name in names
    ]
    assert (SCRIPTS / "modeling_moe").readlink() == Path("../modeling_moe")
