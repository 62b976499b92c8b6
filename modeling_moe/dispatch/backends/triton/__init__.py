# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The Triton back end computes the experts on a GPU."""
