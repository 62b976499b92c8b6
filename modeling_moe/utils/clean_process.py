# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module runs Python code in a process that cannot import this package, as if it were not installed."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .errors import UserError


# None in sys.modules makes the import fail, as if the package were not installed
WITHOUT_PACKAGE = """
import sys
sys.modules["modeling_moe"] = None
"""


def tensor_from_clean_process(code: str, *arguments: str | Path, failure: str) -> torch.Tensor:
    """Runs code that computes a tensor in a process that cannot import this package.

    Args:
        code: Python code that saves the tensor by `torch.save` to the path in the last of `sys.argv[1:]`; the other entries
            are `arguments`.
        arguments: texts and absolute paths.
        failure: sentence that says what it means if the code fails; `{cause}` stands for the last line of its errors.

    Raises:
        UserError: with `failure`, if the code fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "tensor.pt"
        command = [sys.executable, "-c", WITHOUT_PACKAGE + code, *map(str, arguments), str(output)]
        # with an empty standard input, no question about remote code can be answered
        result = subprocess.run(command, cwd=temporary, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if result.returncode != 0:
            cause = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(failure.format(cause=cause))
        return torch.load(output)
