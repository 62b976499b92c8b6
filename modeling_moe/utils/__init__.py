# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These helpers are shared by several sub-packages and are not saved with checkpoints."""
