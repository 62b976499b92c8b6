# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package holds the experiments on routers and upcycling, and what they share."""
