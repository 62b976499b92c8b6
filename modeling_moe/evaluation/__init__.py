# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A language model is scored on text, and its routing on how it uses the experts."""
