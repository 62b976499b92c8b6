# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Each family of models in transformers has its fields and tensors described here, for import and for export."""
