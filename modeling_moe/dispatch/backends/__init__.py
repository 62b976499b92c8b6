# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The back ends compute the experts: native C, a loop over experts, torch's grouped GEMM, and Triton kernels."""
