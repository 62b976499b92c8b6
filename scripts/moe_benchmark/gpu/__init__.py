# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The check of the package on one GPU: `bash scripts/gpu_check.sh` runs each part here as a process of its own."""
