#!/usr/bin/env python
"""This script is `moe report` for a clone: `python scripts/router_report.py --help` describes it."""

import sys

from modeling_moe.commands.main import run_command


if __name__ == "__main__":
    run_command("report", sys.argv)
