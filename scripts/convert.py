#!/usr/bin/env python
"""This script is `moe convert` for a clone: `python scripts/convert.py --help` describes it."""

import sys

from modeling_moe.commands.main import run_command


if __name__ == "__main__":
    run_command("convert", sys.argv)
