#!/usr/bin/env python
"""This script is `moe merge_adapter` for a clone: `python scripts/merge_adapter.py --help` describes it."""

import sys

from modeling_moe.commands.main import run_command


if __name__ == "__main__":
    run_command("merge_adapter", sys.argv)
