# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The command `moe` starts here, outside modeling_moe.

Importing modeling_moe imports torch and transformers, which takes seconds, and `moe --help` needs neither.
"""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> None:
    """Runs [`modeling_moe.commands.main.main`], whose module is loaded by its path."""
    package = find_spec("modeling_moe")
    assert package is not None
    assert package.origin is not None
    spec = spec_from_file_location("moe_commands", Path(package.origin).with_name("commands") / "main.py")
    assert spec is not None
    assert spec.loader is not None
    commands = module_from_spec(spec)
    spec.loader.exec_module(commands)
    commands.main()
