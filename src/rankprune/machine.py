"""The processor and the devices of this machine."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name, as the operating system tells it."""
    told: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            field, _, value = line.partition(":")
            told.setdefault(field.strip(), value.strip())
    if "CPU part" in told:  # ARM tells numbers
        told.setdefault("model name", f"{platform.machine()} {told.get('CPU implementer')} {told['CPU part']}")
    if sys.platform == "darwin":
        with suppress(OSError):
            found = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
            told["model name"] = found.stdout.strip()
    return told.get("model name") or platform.processor() or platform.machine()


def usable_cores() -> int:
    """How many processor cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits until the device has computed all it was given; nothing on a CPU."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)
