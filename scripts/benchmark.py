#!/usr/bin/env python
"""This script is `moe benchmark` for a clone: `python scripts/benchmark.py --help` describes it."""

import sys

from modeling_moe.commands.main import run_command


if __name__ == "__main__":
    run_command("benchmark", sys.argv)
