"""What a machine is called: times of one must not pass for those of another."""

import math
import platform
from pathlib import Path

import pytest

from rankprune.machine import _named_in, _quota, cpu_name, usable_cores

MILAN = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n"
GENOA = MILAN.replace("model\t\t: 1\n", "model\t\t: 17\n")
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd0c\n"
POWER = "processor\t: 0\ncpu\t\t: POWER9, altivec supported\n"


def test_generations_that_a_virtual_machine_calls_alike_have_names_of_their_own() -> None:
    assert _named_in(MILAN + GENOA) == "AMD EPYC (family 25, model 1)"  # the first processor's
    assert _named_in(GENOA) == "AMD EPYC (family 25, model 17)"


@pytest.mark.parametrize(("cpuinfo", "name"), [(ARM, f"{platform.machine()} 0x41 0xd0c"), (POWER, ""), ("", "")])
def test_a_machine_without_family_and_model(cpuinfo: str, name: str) -> None:
    assert _named_in(cpuinfo) == name


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ({"cpu.max": "?"}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_time_that_a_container_gets(files: dict[str, str], cores: float, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert _quota(tmp_path) == cores


def test_this_machine_has_a_name_and_cores() -> None:
    assert cpu_name()
    assert usable_cores() >= 1
