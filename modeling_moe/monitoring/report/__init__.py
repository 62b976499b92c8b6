# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package traces the routing of a model on texts of several domains, and shows the trace as a page and as pictures.

`tracing` runs the model and fills the dataclasses of `data`; `comparing` says what moved between two models; `logged_history`
reads what a training run has logged; `page` draws it all.
"""

from .comparing import compare_traces
from .data import LayerTrace, ModelTrace, RoutingReport
from .logged_history import read_history
from .page import card_pictures, require_matplotlib, write_report
from .tracing import Traced, TraceOptions, refuse_untraceable, trace_routing


__all__ = [
    "LayerTrace",
    "ModelTrace",
    "RoutingReport",
    "TraceOptions",
    "Traced",
    "card_pictures",
    "compare_traces",
    "read_history",
    "refuse_untraceable",
    "require_matplotlib",
    "trace_routing",
    "write_report",
]
