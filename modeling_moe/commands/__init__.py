# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Each module is one command of `moe`: dataclasses of arguments, a function that does the work, and `main`."""
