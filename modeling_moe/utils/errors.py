# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Every command answers these exceptions in one line."""


class UserError(ValueError):
    """A user gave something that cannot be used; the message is one sentence that names it and the remedy."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C stopped a command; the message says how to go on, such as `"add --resume_from_checkpoint true"`."""
