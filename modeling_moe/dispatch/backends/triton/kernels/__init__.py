# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels of the dispatch, which triton_backend.py launches.

# T tokens, K (TOP_K) experts per token, S = T*K slots; E experts; H hidden, I inner, C = I or 2I columns of h
# row: a place in `order` (S,), which sorts the slots by expert; x, grad, h, ... are contiguous, matrices have strides
# LAYOUT: what the columns of h are: "plain" activations, "halves" [g | u] or "pairs" g0, u0, g1, u1, ...
# `tiles` (2 num_tiles + 1,) int32: of each tile of BLOCK_M rows the expert (-1: no such tile), then of each the first
#   row, then the number of tiles in use
# a low-rank update b a of the matrices, of rank R: `narrow` (S, R) is what a gives, `factor` the matrix after it
# sizes are arguments, so that one compiled kernel serves them all; EVEN says that the blocks divide them
# PRECISION: how float32 is multiplied, "ieee" or "tf32"

No two programs write to one place, and each adds up in a fixed order: a launch gives the same bits every time.
"""
