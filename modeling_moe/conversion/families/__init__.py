# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package describes the fields and tensors of each model family in transformers, for import and for export."""
