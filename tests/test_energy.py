"""Joules from a folder as Linux has it, and from a library with NVML's functions; what is missing is told."""

from __future__ import annotations

import pytest
from fake_nvml import COMPILER, write_nvml

from nanovllm.energy import EnergyMeter

NO_NVML = "libnvidia-ml-of-nobody.so"


def zone(powercap, name: str, kind: str, microjoules: int, limit: int = 262_143_328_850):
    folder = powercap / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder / "energy_uj"


def test_packages_and_their_memory_are_counted_and_their_parts_are_not(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 500_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    zone(tmp_path, "intel-rapl:1", "psys", 9_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    meter = EnergyMeter(tmp_path, NO_NVML)
    assert meter.joules() == {"package-0": 0.0, "package-0-dram": 0.0}
    package.write_text("3500000\n")
    core.write_text("2000000\n")
    memory.write_text("250000\n")
    assert meter.joules() == pytest.approx({"package-0": 2.5, "package-0-dram": 0.25})
    assert meter.describe() == "package-0, package-0-dram" and NO_NVML in meter.missing[0]


def test_a_counter_that_began_again_has_not_gone_back(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, limit=10_000_000)
    meter = EnergyMeter(tmp_path, NO_NVML)
    counter.write_text("500000")  # 1.0 J up to the range, and 0.5 J more
    assert meter.joules() == pytest.approx({"package-0": 1.5})
    counter.write_text("700000")
    assert meter.joules() == pytest.approx({"package-0": 1.7})


def test_a_counter_that_can_no_longer_be_read_stays_where_it_was(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = EnergyMeter(tmp_path, NO_NVML)
    counter.write_text("2000000")
    assert meter.joules() == {"package-0": 2.0}
    counter.unlink()
    assert meter.joules() == {"package-0": 2.0}


def test_what_does_not_tell_has_a_reason(tmp_path):
    meter = EnergyMeter(tmp_path, NO_NVML)
    assert meter.joules() == {} and "no package in" in meter.missing[0] and NO_NVML in meter.missing[1]
    zone(tmp_path, "intel-rapl:0", "package-0", 0).unlink()
    meter = EnergyMeter(tmp_path, NO_NVML)
    assert meter.joules() == {} and "energy_uj is not readable: it is for root" in meter.describe()


@pytest.fixture(scope="module")
def nvml(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C compiler")
    return str(write_nvml(tmp_path_factory.mktemp("nvml")))


@pytest.mark.parametrize(
    ("visible", "names"), [(None, ["gpu0", "gpu1"]), ("1", ["gpu0"]), ("GPU-1,0", ["gpu0", "gpu1"]), ("", []), ("GPU-7", [])]
)
def test_gpus_count_millijoules_and_only_those_that_are_visible(nvml, tmp_path, monkeypatch, visible, names):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter = EnergyMeter(tmp_path, nvml)
    assert meter.joules() == pytest.approx(dict.fromkeys(names, 1.5))  # a reading costs this library 1.5 J
    if not names:
        assert ("Not Found" if visible else "no GPU is visible") in meter.missing[-1]
