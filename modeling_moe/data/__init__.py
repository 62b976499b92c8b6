# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Files, folders and datasets become documents, and documents become blocks of tokens."""
