"""Finds one-line faults that no test notices: it changes one expression at a time and runs the tests of that file.

Examples:
    python scripts/mutate.py --file modeling_moe/router_losses.py
    python scripts/mutate.py --file modeling_moe/router_capacity.py --tests tests/core/test_router_capacity.py --most 40
    python scripts/mutate.py --file modeling_moe/data/packing.py --tests tests/data tests/training/test_trl.py --lines 40 90

The work is done in a copy of the repository, so the files here are never changed. Each fault is printed with its line, and
the survivors are listed last: a survivor is a missing test, or a change that makes no difference (a tuning constant).
The exit code is 1 if a fault survived.
"""

import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from modeling_moe.utils.command_line import parse, run
from modeling_moe.utils.errors import UserError


ROOT = Path(__file__).parents[1]
COPIED = ("modeling_moe", "scripts", "tests", "configuration", "docs", "model_cards", "pyproject.toml", "README.md")
SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass
class MutationArguments:
    """Which file to change, and which tests must notice."""

    file: str = field(metadata={"help": "the Python file to change, relative to the repository"})
    tests: list[str] = field(
        default_factory=list, metadata={"help": "test files or folders; the file's mirror in tests/ if not given"}
    )
    most: int = field(default=30, metadata={"help": "number of faults to try, drawn at random from all"})
    lines: list[int] = field(
        default_factory=list, metadata={"help": "first and last line to change; all if not given"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the draw"})
    timeout: int = field(default=300, metadata={"help": "seconds after which a test run counts as having noticed"})

    def __post_init__(self):
        if not (ROOT / self.file).is_file() or not self.file.endswith(".py"):
            raise UserError(
                f"file {self.file} is no Python file of this repository: name one, like modeling_moe/router.py"
            )
        if len(self.lines) not in (0, 2):
            raise UserError("lines takes two numbers, the first line and the last")


@dataclass(frozen=True)
class Fault:
    """One changed expression: the text between two positions of the file is replaced.

    Attributes:
        line: line number, from 1.
        begin: offset of the replaced text in the file's UTF-8 bytes.
        end: offset behind it.
        old: the replaced text.
        new: the text in its place.
    """

    line: int
    begin: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"line {self.line}: {' '.join(self.old.split())}  ->  {' '.join(self.new.split())}"


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the faulty forms of one node: a swapped operator, a negated condition, another constant, a dropped factor."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPPED:
        yield ast.Compare(node.left, [SWAPPED[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPPED[type(node.op)](), node.values)
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        yield ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
        yield node.left
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)


def statement_changes(node: ast.AST) -> Iterator[str]:
    """Yields the faulty forms of one statement: a call or a raise that does not happen, an `if` that is negated."""
    if isinstance(node, (ast.AugAssign, ast.Raise)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield "pass"


def find_faults(source: str) -> list[Fault]:
    """Lists every fault that this script can make in a file, in the order of the lines.

    Annotations, docstrings and decorators are left as they are: no test can notice a change in them.
    """
    tree, starts = ast.parse(source), [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        quiet = [getattr(node, name, None) for name in ("annotation", "returns")] + getattr(node, "decorator_list", [])
        skipped.update(inner for part in quiet if part is not None for inner in ast.walk(part))
    faults = []
    for node in ast.walk(tree):
        if node in skipped or not isinstance(node, (ast.expr, ast.stmt)) or node.end_lineno is None:
            continue
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + (node.end_col_offset or 0)
        old = source.encode()[begin:end].decode()
        new = [f"({ast.unparse(change)})" for change in changes(node)] + list(statement_changes(node))
        faults += [Fault(node.lineno, begin, end, old, text) for text in new]
    return sorted(faults, key=lambda fault: (fault.line, fault.begin))


def mirror(file: str) -> list[str]:
    """Finds the tests of a file by the layout of tests/: the file with the module's name, or else the module's folder.

    Raises:
        UserError: if there is neither.
    """
    path = Path(file)
    folder = path.relative_to("modeling_moe").parent if path.parts[0] == "modeling_moe" else path.parent
    tests = ROOT / "tests" / ("core" if folder == Path() else folder)
    for place in (tests / f"test_{path.stem}.py", tests):
        if place.exists():
            return [str(place.relative_to(ROOT))]
    raise UserError(f"no tests mirror {file}: name them with --tests")


def noticed(copy: Path, tests: list[str], timeout: int) -> bool:
    """Runs tests in a copy of the repository; returns whether one failed, or did not end in time."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "scripts")]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "-m", "not slow", *tests]
    try:
        result = subprocess.run(
            command, cwd=copy, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return True
    return result.returncode != 0


def survivors(args: MutationArguments, copy: Path) -> list[Fault]:
    """Tries the faults one after another and returns those that no test noticed.

    Raises:
        UserError: if the tests fail without a fault, or the file has none to make.
    """
    tests = args.tests or mirror(args.file)
    source = (copy / args.file).read_text(encoding="utf-8")
    first, last = args.lines or (1, source.count("\n") + 1)
    faults = [fault for fault in find_faults(source) if first <= fault.line <= last]
    if not faults:
        raise UserError(f"{args.file} has no expression to change from line {first} to line {last}")
    if noticed(copy, tests, args.timeout):
        raise UserError(f"{' '.join(tests)} fails without a fault: mend that first, or raise --timeout")
    drawn = sorted(random.Random(args.seed).sample(faults, min(args.most, len(faults))), key=lambda fault: fault.begin)
    alive = []
    for number, fault in enumerate(drawn, 1):
        data = source.encode()
        (copy / args.file).write_bytes(data[: fault.begin] + fault.new.encode() + data[fault.end :])
        caught = noticed(copy, tests, args.timeout)
        alive += [] if caught else [fault]
        print(f"{number}/{len(drawn)} {'noticed ' if caught else 'SURVIVED'} {fault}", flush=True)
    return alive


def main() -> None:
    """Copies the repository, tries the faults, and lists the survivors."""
    (args,) = parse([MutationArguments], __doc__)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        copy.mkdir()
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).is_file():
                shutil.copy2(ROOT / name, copy / name)
        alive = survivors(args, copy)
    print(f"\n{len(alive)} faults survived in {args.file}" + "".join(f"\n  {fault}" for fault in alive))
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    run(main, "nothing here was changed: start the command again")
