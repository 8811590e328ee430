"""Plugins by entry point: listing imports none of them, and whatever is wrong with one is said in one line."""

from __future__ import annotations

import importlib.metadata
import sys
import types

import pytest

from attnbench.harness.contract import CONTRACT_VERSION, Capabilities, Device, Implementation, Prepared
from attnbench.harness.problem import Problem
from attnbench.harness.registry import APPROXIMATE_GROUP, GROUP, PluginError, entries, load


class Good(Implementation):
    contract = CONTRACT_VERSION
    capabilities = Capabilities()

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        return Prepared(attend=lambda q, k, v: q)


class FakeDistribution(importlib.metadata.Distribution):
    def __init__(self, name: str) -> None:
        self._name = name

    def read_text(self, filename: str) -> str | None:
        return (
            f"Metadata-Version: 2.1\nName: {self._name}\nVersion: 1.5\n" if filename == "METADATA" else None
        )

    def locate_file(self, path: object) -> object:
        raise NotImplementedError


@pytest.fixture
def register(monkeypatch):
    """Replaces what is installed by (name, attribute, distribution) triples; attributes live in one fake module."""
    module = types.ModuleType("fake_plugins")
    monkeypatch.setitem(sys.modules, "fake_plugins", module)
    points: list[importlib.metadata.EntryPoint] = []

    def entry_points(*, group: str) -> importlib.metadata.EntryPoints:
        return importlib.metadata.EntryPoints(point for point in points if point.group == group)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    def add(
        name: str,
        plugin: object,
        distribution: str = "some-kernels",
        value: str | None = None,
        group: str = GROUP,
    ) -> None:
        attribute = f"plugin{len(points)}"
        setattr(module, attribute, plugin)
        point = importlib.metadata.EntryPoint(name, value or f"fake_plugins:{attribute}", group)
        points.append(point._for(FakeDistribution(distribution)))

    return add


def test_a_class_and_an_instance_both_load_under_their_registered_name(register):
    register("by-class", Good)
    register("by-instance", Good())
    for name in ("by-class", "by-instance"):
        loaded = load(name)
        assert isinstance(loaded, Good)
        assert loaded.name == name


def test_listing_is_sorted_and_imports_nothing(register):
    register("zeta", Good, value="a_module_that_does_not_exist:Thing")
    register("alpha", Good, "other-kernels")
    listed = entries()
    assert list(listed) == ["alpha", "zeta"]
    assert listed["alpha"][0].origin == "alpha (fake_plugins:plugin1, from other-kernels 1.5)"
    assert "a_module_that_does_not_exist" not in sys.modules


def test_an_unknown_name_is_refused(register):
    with pytest.raises(PluginError, match="no implementation is registered as 'flash'"):
        load("flash")


def test_a_name_registered_by_two_distributions_is_refused(register):
    register("flash", Good, "one")
    register("flash", Good, "two")
    assert len(entries()["flash"]) == 2
    with pytest.raises(
        PluginError, match=r"'flash' is registered twice: .*from one 1\.5\) and .*from two 1\.5\)"
    ):
        load("flash")


def test_an_editable_install_seen_twice_is_one_entry(register):
    register("flash", Good)
    register("flash", Good, value="fake_plugins:plugin0")
    assert len(entries()["flash"]) == 1
    assert isinstance(load("flash"), Good)


def explode() -> None:
    raise RuntimeError("no driver")


class Explosive(Good):
    def __init__(self) -> None:
        explode()


class Older(Good):
    contract = CONTRACT_VERSION - 1


class Newer(Good):
    contract = CONTRACT_VERSION + 1


class Undated(Implementation):
    capabilities = Capabilities()

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        return Prepared(attend=lambda q, k, v: q)


class Undeclared(Good):
    capabilities = None


class Unwritten(Implementation):
    contract = CONTRACT_VERSION
    capabilities = Capabilities()


@pytest.mark.parametrize(
    ("plugin", "complaint"),
    [
        (Explosive, "does not import: RuntimeError: no driver"),
        (Unwritten, "does not import: TypeError: .*prepare"),
        (explode, "is a function, not an attnbench.harness.contract.Implementation"),
        (dict, "is a dict, not"),
        (Older, f"written for an older plugin contract \\({CONTRACT_VERSION - 1}\\).* speaks version"),
        (Newer, f"written for another plugin contract \\({CONTRACT_VERSION + 1}\\)"),
        (Undated, r"written for another plugin contract \(None\)"),
        (Undeclared, "declares no capabilities"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_said_with_its_origin(register, plugin, complaint):
    register("flash", plugin)
    with pytest.raises(
        PluginError, match=f"flash \\(fake_plugins:plugin0, from some-kernels 1.5\\) .*{complaint}"
    ):
        load("flash")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("no_such_module_anywhere:Thing", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("fake_plugins:Thing", "AttributeError: .*Thing"),
    ],
)
def test_a_plugin_that_does_not_import_says_why(register, value, complaint):
    register("flash", None, value=value)
    with pytest.raises(PluginError, match=f"does not import: {complaint}"):
        load("flash")


def test_what_this_project_registers_loads():
    own = [name for name, found in entries().items() if found[0].value.startswith("attnbench.impls.")]
    assert "standard" in own
    assert load("standard").name == "standard"


def test_an_approximation_is_kept_apart_and_loads_as_one(register):
    register("exact", Good())
    register("rough", Good(), group=APPROXIMATE_GROUP)
    assert list(entries()) == ["exact"]
    assert list(entries(approximate=True)) == ["rough"]
    assert load("rough").approximate
    assert not load("exact").approximate


def test_a_name_in_both_groups_is_refused(register):
    register("same", Good())
    register("same", Good(), group=APPROXIMATE_GROUP)
    with pytest.raises(PluginError, match="registered twice"):
        load("same")
