# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Experiments compare routers and ways to upcycle by training small models; the scripts beside this folder run them."""
