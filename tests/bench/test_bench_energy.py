"""Joules come from a real counter, less what rest would have cost, or not at all."""

import sys
import types
from pathlib import Path

import pytest

from medlite.bench import energy
from medlite.bench.energy import NvmlSource, RaplSource, find_energy_source, read_energy
from medlite.errors import BenchmarkError, MissingDependency

RANGE_UJ = 1_000_000


def add_domain(root, folder, name, energy_uj):
    domain = root / folder
    domain.mkdir(parents=True)
    (domain / "name").write_text(f"{name}\n")
    (domain / "energy_uj").write_text(f"{energy_uj}\n")
    (domain / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    return domain / "energy_uj"


@pytest.fixture
def powercap(tmp_path):
    """A machine with two packages, a core inside one, and a platform around all."""
    add_domain(tmp_path, "intel-rapl:0", "package-0", 100)
    add_domain(tmp_path, "intel-rapl:0:0", "core", 50)
    add_domain(tmp_path, "intel-rapl:1", "package-1", 900_000)
    add_domain(tmp_path, "intel-rapl:2", "psys", 5_000)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


class Meter:
    """A clock and a counter that draws 5 W at rest and 25 W at work."""

    name, update_period_seconds = "meter", 0.1

    def __init__(self, idle_watts=(5.0, 5.0)):
        self.idle_watts = list(idle_watts)
        self.now, self.joules = 0.0, 0.0

    def read_joules(self):
        return self.joules

    def rest(self, seconds):
        self.spend(seconds, self.idle_watts.pop(0))

    def work(self, seconds):
        self.spend(seconds, 25.0)
        return 100

    def spend(self, seconds, watts):
        self.now += seconds
        self.joules += seconds * watts

    def read(self, seconds=10.0):
        return read_energy(self, self.work, seconds, rest=self.rest, clock=lambda: self.now)


def test_packages_are_added_and_what_overlaps_them_is_not(powercap):
    source = RaplSource(powercap)
    (powercap / "intel-rapl:0" / "energy_uj").write_text("300100")
    (powercap / "intel-rapl:1" / "energy_uj").write_text("950000")
    for ignored in ("intel-rapl:0:0", "intel-rapl:2"):
        (powercap / ignored / "energy_uj").write_text("999999")
    assert source.read_joules() == pytest.approx(0.3 + 0.05)
    assert source.name == "RAPL, 2 package(s)"


def test_counter_that_begins_again_loses_nothing(powercap):
    source = RaplSource(powercap)
    (powercap / "intel-rapl:1" / "energy_uj").write_text("100000")
    assert source.read_joules() == pytest.approx(0.2)
    (powercap / "intel-rapl:1" / "energy_uj").write_text("300000")
    assert source.read_joules() == pytest.approx(0.4)


def test_machine_without_rapl_says_so(tmp_path):
    with pytest.raises(BenchmarkError, match="no RAPL package under"):
        find_energy_source("cpu", tmp_path)


def test_counter_that_may_not_be_read_says_how_to_allow_it(powercap, monkeypatch):
    read_text = Path.read_text

    def refuse(path, *arguments, **options):
        if path.name == "energy_uj":
            raise PermissionError(path)
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(BenchmarkError, match=r"may not read .*sudo chmod a\+r"):
        RaplSource(powercap)


def test_net_energy_is_the_work_less_the_rest():
    reading = Meter().read()
    assert reading.num_images == 100
    assert reading.net_mj_per_image(5.0) == pytest.approx(1e3 * (25 - 5) * 10 / 100)


def test_idle_power_before_and_after_bounds_the_net_energy():
    meter = Meter(idle_watts=(4.0, 6.0))
    rows = {row.name: row for row in energy.summarise("", "fake", meter, meter.read())}
    net = rows["energy/fake/net_mj_per_image"]
    assert net.value == pytest.approx(2000)
    assert net.spread == (pytest.approx(1900), pytest.approx(2100))
    assert rows["energy/fake/raw_mj_per_image"].value == pytest.approx(2500)
    assert rows["energy/fake/idle_w"].value == pytest.approx(5.0)
    assert all("meter" in row.note for row in rows.values())


def test_absent_energy_has_the_names_of_present_energy():
    meter = Meter()
    present = {row.name for row in energy.summarise("", "fake", meter, meter.read())}
    absent = energy.unavailable("", "fake", "no counter")
    assert {row.name for row in absent} == present
    assert all(row.source == "unavailable" and row.note == "no counter" for row in absent)


@pytest.mark.parametrize(("period", "wanted", "window"), [(0.1, 3, 10), (0.1, 30, 30), (1, 3, 20)])
def test_window_is_long_enough_for_the_counter(period, wanted, window):
    source = types.SimpleNamespace(update_period_seconds=period)
    assert energy.window_seconds(source, wanted) == window


class FakeNvml(types.ModuleType):
    class NVMLError(Exception):
        pass

    def __init__(self, has_driver):
        super().__init__("pynvml")
        self.has_driver = has_driver
        self.millijoules = 7_000

    def nvmlInit(self):  # noqa: N802
        if not self.has_driver:
            message = "driver not loaded"
            raise self.NVMLError(message)

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        return uuid

    def nvmlDeviceGetName(self, board):  # noqa: N802
        return f"Fake Board {board}"

    def nvmlDeviceGetTotalEnergyConsumption(self, board):  # noqa: N802
        return self.millijoules


def test_board_counts_millijoules(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(has_driver=True))
    source = find_energy_source("cuda")
    assert isinstance(source, NvmlSource)
    assert source.read_joules() == 7.0
    assert source.name == "NVML, board Fake Board 0"


@pytest.mark.parametrize(
    ("visible", "board"), [("1", "1"), ("3,1", "3"), ("GPU-89ab,0", "GPU-89ab"), ("", "0")]
)
def test_the_board_is_the_first_that_cuda_sees(monkeypatch, visible, board):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(has_driver=True))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_energy_source("cuda").name == f"NVML, board Fake Board {board}"


def test_a_part_of_a_board_is_not_counted(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(has_driver=True))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-89ab")
    with pytest.raises(BenchmarkError, match=r"NVML counts whole boards, .* begins with MIG-89ab"):
        find_energy_source("cuda")


def test_board_without_a_driver_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(has_driver=False))
    with pytest.raises(BenchmarkError, match="NVML gives no energy: driver not loaded"):
        find_energy_source("cuda")


def test_missing_nvml_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingDependency, match=r"medlite\[nvml\]"):
        find_energy_source("cuda")
