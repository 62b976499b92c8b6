#!/usr/bin/env python
"""This script is `moe eval` for a clone: `python scripts/eval_lm.py --help` describes it."""

import sys

from modeling_moe.commands.main import run_command


if __name__ == "__main__":
    run_command("eval", sys.argv)
