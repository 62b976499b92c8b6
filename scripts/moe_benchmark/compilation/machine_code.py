# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds loops, spilled registers and products without matrix instructions in a kernel's machine code."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Isa(NamedTuple):
    """Holds the patterns that read a maker's disassembly.

    Attributes:
        instruction: matches a line with an instruction; the group is its text.
        label: matches a line with a label; the group is the label.
        jump: matches an instruction that may jump to a label, the group.
        leaves: matches an instruction after which the next one never runs.
        matrix: matches a matrix instruction.
        scalar: matches a multiply-add of float32.
        spill: matches a load or store of a spilled register.
    """

    instruction: str
    label: str
    jump: str
    leaves: str
    matrix: str
    scalar: str
    spill: str


NVIDIA = Isa(
    instruction=r"\s+/\*[0-9a-f]+\*/\s+(\S.*?)\s*;",
    label=r"(\.L\w+):",
    # a far jump is a CALL that never returns
    jump=r"(?:@\S+ )?(?:BRA|CALL|JMP)\b.*`\((\.L\w+)\)",
    leaves=r"(?:BRA[.\w]* `|JMP|BRX|EXIT|RET)",
    matrix=r"(?:@\S+ )?(?:HGMMA|HMMA|QGMMA|UTC\w*MMA)",
    scalar=r"(?:@\S+ )?FFMA",
    spill=r"(?:@\S+ )?(?:LDL|STL)",
)
AMD = Isa(
    instruction=r"\t([a-z]\w+.*)",
    label=r"(\.L\w+):",
    jump=r"s_c?branch\w*\s+(\.L\w+)",
    leaves=r"s_(?:branch|endpgm|setpc)",
    matrix=r"v_mfma",
    scalar=r"v_(?:pk_)?fmac?_f32",
    spill=r"scratch_(?:load|store)",
)


class Flow:
    """Holds the blocks of a program between jumps, and the loops that they form.

    Attributes:
        blocks: instructions of each block, the entry first.
        successors: numbers of the blocks that may follow each block.
        loops: for each loop, the numbers of the blocks in it, and of those blocks that run in every iteration.
    """

    def __init__(self, text: str, isa: Isa):
        self.blocks: list[list[str]] = [[]]
        names: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(isa.label, line):
                self._begin_block()
                names[label[1]] = len(self.blocks) - 1
            elif instruction := re.match(isa.instruction, line):
                self.blocks[-1].append(instruction[1])
                if re.match(isa.jump, instruction[1]) or re.match(isa.leaves, instruction[1]):
                    self._begin_block()
        self.successors = [self._after(number, names, isa) for number in range(len(self.blocks))]
        self.loops = [*self._find_loops()]

    def _begin_block(self) -> None:
        if self.blocks[-1]:
            self.blocks.append([])

    def _after(self, number: int, names: dict[str, int], isa: Isa) -> list[int]:
        last = self.blocks[number][-1] if self.blocks[number] else ""
        after = [] if re.match(isa.leaves, last) or number + 1 == len(self.blocks) else [number + 1]
        jump = re.match(isa.jump, last)
        return [*after, names[jump[1]]] if jump and jump[1] in names else after

    def _dominators(self) -> dict[int, set[int]]:
        """Returns, for each reachable block, the blocks on every path to it."""
        found, stack = {0: {0}}, [0]
        while stack:
            block = stack.pop()
            for after in self.successors[block]:
                passed = found[block] | {after}
                passed = passed & found[after] | {after} if after in found else passed
                if passed != found.get(after):
                    found[after] = passed
                    stack.append(after)
        return found

    def _find_loops(self) -> Iterator[tuple[set[int], set[int]]]:
        dominators, ends, before = self._dominators(), defaultdict(set), defaultdict(set)
        for block in dominators:
            for after in self.successors[block]:
                before[after].add(block)
                if after in dominators[block]:
                    ends[after].add(block)
        for start, lasts in ends.items():
            members, stack = {start}, [*lasts]
            while stack:
                if (block := stack.pop()) not in members:
                    members.add(block)
                    stack += before[block]
            yield members, members.intersection(*(dominators[last] for last in lasts))

    def count(self, blocks: Iterable[int], pattern: str) -> int:
        """Counts the instructions of the given blocks that match."""
        return sum(bool(re.match(pattern, each)) for block in blocks for each in self.blocks[block])


def spills_in_loops(text: str, isa: Isa, products: str | None) -> int:
    """Counts the loads and stores of spilled registers that run in every iteration of the innermost loops with
    products.

    Those at the end of a tile are not counted, even if the compiler has made one loop of all tiles.

    Args:
        text: the disassembly.
        isa: `NVIDIA` or `AMD`.
        products: pattern of a product's instruction; None for a kernel without products, of which all loops count.
    """
    flow = Flow(text, isa)
    if products is None:
        return flow.count(set().union(*(members for members, _ in flow.loops)), isa.spill)
    holding = {block for block in range(len(flow.blocks)) if flow.count([block], products)}
    loops = [(members, each_round) for members, each_round in flow.loops if members & holding]
    innermost = [loop for loop in loops if not any(other[0] < loop[0] for other in loops)]
    return flow.count(set().union(*(each | members & holding for members, each in innermost)), isa.spill)


def scalar_products(ttgir: str) -> tuple[bool, list[tuple[int, int]]]:
    """Finds the products without matrix instructions in Triton's IR, `kernel.asm["ttgir"]`.

    Returns:
        Whether there are any, and the (rows, columns) of those that could have matrix instructions: all except
            products of
        float32 in full precision.
    """
    # a matrix instruction's sum has a layout of that instruction, or it is another operation than tt.dot
    dots = re.findall(r"tt\.dot (.*) : tensor<\S*x(\w+), .*-> tensor<(\d+)x(\d+)x\w+, #blocked", ttgir)
    could = [dot for dot in dots if dot[1] != "f32" or "inputPrecision = tf32" in dot[0]]
    return bool(dots), sorted({(int(rows), int(columns)) for _, _, rows, columns in could})
