"""Says whether Triton's interpreter, in which the kernels are tested without a GPU, runs with the numpy installed."""

import importlib.metadata

import numpy
from packaging.version import Version


def interpreter_fault() -> str | None:
    """Returns why Triton cannot interpret a kernel here; None if it can, or without Triton. Triton is not imported for it."""
    try:
        triton = Version(importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        return None
    if triton < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        return f"triton {triton} cannot interpret kernels with numpy {numpy.__version__}: install numpy<2.4 or triton>=3.7"
    return None
