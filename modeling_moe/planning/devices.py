# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module describes the device of a plan: by name from configuration/devices.yaml, or by numbers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import yaml

from ..utils.errors import UserError
from ..utils.recipes import CONFIGURATION


@dataclass(frozen=True)
class Device:
    """What a device can do, as far as a plan counts on it.

    Attributes:
        name: name of the device.
        memory: bytes of memory.
        bandwidth: bytes per second between the device and its memory.
        flops: additions and multiplications per second of dense matrix products, by dtype.
        link_bandwidth: bytes per second that the device sends to others, in one direction.
        link_latency: seconds of one round of a collective.
        operator_seconds: seconds that Python and torch need to start an operator.
        assumed: names of the figures that are neither measured nor stated by the maker.
        source: where the figures come from.
    """

    name: str
    memory: float
    bandwidth: float
    flops: dict[torch.dtype, float]
    link_bandwidth: float
    link_latency: float
    operator_seconds: float
    assumed: tuple[str, ...]
    source: str

    def rate(self, dtype: torch.dtype) -> float:
        """Returns the additions and multiplications per second of products in a dtype.

        Raises:
            UserError: if the device has no figure for the dtype.
        """
        if dtype not in self.flops:
            known = ", ".join(str(each).removeprefix("torch.") for each in self.flops)
            name = str(dtype).removeprefix("torch.")
            raise UserError(
                f"dtype {name}: {self.name} has throughputs for {known} alone, choose one or give device_tflops"
            )
        return self.flops[dtype]

    def with_numbers(
        self,
        memory_gb: float | None,
        bandwidth_gbps: float | None,
        tflops: float | None,
        dtypes: Iterable[torch.dtype],
    ) -> "Device":
        """Returns the device with figures of the user in the place of some of its own.

        Args:
            memory_gb: memory in 10^9 bytes.
            bandwidth_gbps: bandwidth of the memory in 10^9 bytes per second.
            tflops: 10^12 additions and multiplications per second.
            dtypes: dtypes of the plan, in which the products are computed.

        Raises:
            UserError: if a number is not above 0.
        """
        given = {"device_memory": memory_gb, "device_bandwidth": bandwidth_gbps, "device_tflops": tflops}
        for name, value in given.items():
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}: it must be a number above 0")
        changes: dict[str, Any] = {}
        if memory_gb is not None:
            changes["memory"] = memory_gb * 1e9
        if bandwidth_gbps is not None:
            changes["bandwidth"] = bandwidth_gbps * 1e9
        if tflops is not None:
            changes["flops"] = {**self.flops, **dict.fromkeys(dtypes, tflops * 1e12)}
        assumed = tuple(
            name for name in self.assumed if {"memory_gb": "memory", "tflops": "flops"}.get(name, name) not in changes
        )
        return replace(self, **changes, assumed=assumed) if changes else self


@cache
def devices() -> dict[str, Device]:
    """Returns the devices of configuration/devices.yaml by name, with the share of the makers' peaks that is counted on."""
    values = yaml.safe_load((CONFIGURATION / "devices.yaml").read_text(encoding="utf-8"))
    reached = values["reached"]
    return {
        name: Device(
            name=name,
            memory=entry["memory_gb"] * 1e9,
            bandwidth=entry["bandwidth"] * 1e12 * reached["bandwidth"],
            flops={getattr(torch, dtype): rate * 1e12 * reached["tflops"] for dtype, rate in entry["tflops"].items()},
            link_bandwidth=entry["link_bandwidth"] * 1e9 * reached["link_bandwidth"],
            link_latency=entry["link_latency"] * 1e-6,
            operator_seconds=entry["operator_seconds"] * 1e-6,
            assumed=tuple(entry["assumed"]),
            source=entry["source"],
        )
        for name, entry in values["devices"].items()
    }


def device_named(name: str) -> Device:
    """Returns a device of configuration/devices.yaml.

    Raises:
        UserError: for an unknown name; the message lists those known.
    """
    known = {key.lower(): device for key, device in devices().items()}
    if name.lower() not in known:
        raise UserError(
            f"device {name!r} is unknown: it must be measure (this machine) or one of {', '.join(devices())}, with "
            "device_memory, device_bandwidth and device_tflops in the place of their figures"
        )
    return known[name.lower()]
