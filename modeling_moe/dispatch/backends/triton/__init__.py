# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package computes the experts on a GPU by Triton kernels."""
