# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""`python -m modeling_moe COMMAND` is `moe COMMAND`, for launchers such as torchrun and for a clone that is not installed."""

from .commands.main import main


if __name__ == "__main__":
    main()
