# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package checks modeling_moe on one GPU; `bash scripts/gpu_check.sh` runs each part in a separate process."""
