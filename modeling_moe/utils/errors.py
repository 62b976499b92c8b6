# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Every command prints these exceptions as one line instead of a traceback."""


class UserError(ValueError):
    """The user gave a value that cannot be used; the message is one sentence that names the value and the remedy."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C stopped a command; the message says how to continue, such as `"add --resume_from_checkpoint true"`."""
