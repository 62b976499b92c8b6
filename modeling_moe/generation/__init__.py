# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This sub-package lets a causal LM write text to the terminal, with a draft model and with experts outside the memory."""

from .arguments import SamplingArguments, WriterArguments, refuse_surrogates
from .draft import Draft, dense_source, fit_draft, load_draft, reason_not_exact
from .loading import Writer, load_writer
from .measures import WritingSpeed
from .writing import Written, write


__all__ = [
    "Draft",
    "SamplingArguments",
    "Writer",
    "WriterArguments",
    "Written",
    "WritingSpeed",
    "dense_source",
    "fit_draft",
    "load_draft",
    "load_writer",
    "reason_not_exact",
    "refuse_surrogates",
    "write",
]
