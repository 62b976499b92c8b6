# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A plan says what a model of any family costs before it is downloaded: parameters, memory, time, on a device.

The model runs on tensors that have shapes and no memory, so the model's own code decides what is computed and kept. The
operators that it calls are counted, and a device's figures turn the counts into seconds.
"""

from .communication import Collective
from .configurations import local_folder_of, read_config
from .devices import Device, device_named, devices
from .headers import Headers, check_headers
from .memory import Memory
from .parallelism import Parallelism
from .plan import InferencePlan, ModelPlan, Request, TrainingPlan, make_plan
from .probe import measure_device
from .simulation import METHODS, RECOMPUTE, Method, Recompute, SimulationError, simulated_model
from .sizes import Sizes
from .timing import PassTime


__all__ = [
    "METHODS",
    "RECOMPUTE",
    "Collective",
    "Device",
    "Headers",
    "InferencePlan",
    "Memory",
    "Method",
    "ModelPlan",
    "Parallelism",
    "PassTime",
    "Recompute",
    "Request",
    "SimulationError",
    "Sizes",
    "TrainingPlan",
    "check_headers",
    "device_named",
    "devices",
    "local_folder_of",
    "make_plan",
    "measure_device",
    "read_config",
    "simulated_model",
]
