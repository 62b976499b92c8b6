# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What several sub-packages use and no checkpoint carries."""
