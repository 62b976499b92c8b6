#!/usr/bin/env python
"""This script is `moe push` for a clone: `python scripts/push_to_hub.py --help` describes it."""

import sys

from modeling_moe.commands.main import run_command


if __name__ == "__main__":
    run_command("push", sys.argv)
