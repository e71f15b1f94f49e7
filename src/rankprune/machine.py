"""The processor and the devices of this machine."""

import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name, as the operating system tells it.

    On Linux with family and model, for virtual machines call many generations alike, like "AMD EPYC".
    """
    told = ""
    with suppress(OSError):
        told = _named_in(Path("/proc/cpuinfo").read_text())
    if sys.platform == "darwin":
        with suppress(OSError):
            found = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
            told = found.stdout.strip()
    return told or platform.processor() or platform.machine()


def _named_in(cpuinfo: str) -> str:
    """The name in the text of /proc/cpuinfo, of the first processor; "" if it has none."""
    told: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        field, _, value = line.partition(":")
        told.setdefault(field.strip(), value.strip())
    if "CPU part" in told:  # ARM tells numbers
        told.setdefault("model name", f"{platform.machine()} {told.get('CPU implementer')} {told['CPU part']}")
    name = told.get("model name", "")
    if not name or not {"cpu family", "model"} <= told.keys():
        return name
    return f"{name} (family {told['cpu family']}, model {told['model']})"


def usable_cores() -> int:
    """How many processor cores this process may use: it may be bound to some, and a container be given the time of fewer."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(Path("/sys/fs/cgroup")))))


def _quota(folder: Path) -> float:
    """How many cores' time a container gets, by the files of control groups in a folder; infinite without a limit."""
    with suppress(OSError, ValueError):
        granted, period = (folder / "cpu.max").read_text().split()
        return math.inf if granted == "max" else int(granted) / int(period)
    with suppress(OSError, ValueError):  # of the first version
        granted, period = (int((folder / "cpu" / f"cpu.cfs_{of}_us").read_text()) for of in ("quota", "period"))
        return granted / period if granted > 0 else math.inf
    return math.inf


def device_name(device: torch.device) -> str:
    """The name of an accelerator, or of the processor."""
    named = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return cpu_name() if named is None else str(named(device))


def synchronizer(*devices: torch.device) -> Callable[[], None]:
    """What waits until these devices have computed all they were given; nothing on a CPU."""
    asynchronous = {device for device in devices if device.type != "cpu"}

    def synchronize() -> None:
        for device in asynchronous:
            torch.accelerator.synchronize(device)

    return synchronize


def gpus_in_use() -> list[torch.device]:
    """Those that hold anything of this process; a model may lie on several."""
    if not torch.cuda.is_initialized():
        return []
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(i)]
