#!/usr/bin/env python
"""This script is `moe export_adapter` for a clone: `python scripts/export_adapter.py --help` describes it."""

import sys

from modeling_moe.commands.main import run_command


if __name__ == "__main__":
    run_command("export_adapter", sys.argv)
