# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package holds the Triton kernels, which row_tiles.py and backend.py launch.

# T tokens, K (TOP_K) experts per token, A = T*K assignments, E experts, H hidden size, I (inner) expert width
# C columns of h: I, or 2I for gated experts; R rank of a low-rank update
# row: a position in `order` (A,), which lists the assignments in expert order. Rows of empty assignments come last.
# x, grad, h and other tensors of rows are contiguous; matrices have strides
# LAYOUT, the columns of h: "plain" activations, "halves" [g | u], or "pairs" g0, u0, g1, u1, ...
# tiles (2 num_tiles + 1,) int32 describes tiles of BLOCK_M rows: first the expert of each (-1 for an unused tile), then
#   the first row of each, then the number of tiles in use
# narrow (A, R) and factor: the low-rank update adds narrow factor^T. `narrow` is a product with the update's first
#   factor, and `factor` is the other one
# EVEN: True if the blocks divide the sizes. Sizes are arguments, so one compiled kernel serves all of them.
# PRECISION, how float32 is multiplied: "ieee" or "tf32"

No two programs write to one place, and each adds up in a fixed order, so a launch gives the same bits every time.
"""
