"""The doctor finds what is wrong with each plugin, with real processes, and outlives them all."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from attnbench.harness import doctor
from attnbench.harness.contract import Device
from attnbench.harness.doctor import Finding, describe_device, examine, machine_facts
from attnbench.harness.registry import Entry
from attnbench.harness.run.gpus import Gpu

SOUND = """
from attnbench.harness.contract import Capabilities, Implementation, Unavailable
class Plugin(Implementation):
    contract = 1
    capabilities = Capabilities(devices=("cpu",))
    package = "planted"
    def prepare(self, problem, device): raise NotImplementedError
"""
# module -> its source, the state it is found in, and what the reason says
PLUGINS = {
    "sound": (SOUND, "usable", ""),
    "prints": (f"print('{{}}', flush=True)\nimport os\nos.write(1, b'noise')\n{SOUND}", "usable", ""),
    "segfaults": ("import ctypes\nctypes.string_at(0)\n", "broken", "died of SIGSEGV on load"),
    "leaves": ("import os, sys\nprint('bye', file=sys.stderr)\nsys.stderr.flush()\nos._exit(7)\n", "broken",
               "ended with exit code 7 on load: bye"),
    "exits": ("raise SystemExit(4)\n", "broken", "ended with exit code 4"),
    "raises": ("raise OSError('two\\nlines')\n", "broken", "does not import: OSError: two lines"),
    "missing": ("import no_such_module_at_all\n", "broken", "No module named 'no_such_module_at_all'"),
    "older": (SOUND.replace("contract = 1", "contract = 0"), "broken", "written for an older plugin contract (0)"),
    "cuda_only": (SOUND.replace('("cpu",)', '("cuda",)'), "unavailable", "runs on cuda, and this run is on cpu"),
    "rough": (SOUND, "usable", ""),
    "needy": (f"{SOUND}    def unavailable(self, device): return Unavailable('needs x', 'pip install x')\n",
              "unavailable", "needs x"),
    "rude": (f"{SOUND}    def unavailable(self, device): return 1 / 0\n", "broken",
             "unavailable() raises ZeroDivisionError"),
}  # fmt: skip
APPROXIMATE = ("rough",)


def ended(pid: int) -> bool:
    """Waits for a killed process to be gone, or a zombie that nobody has reaped yet."""
    for _ in range(200):
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def plant(site: Path, monkeypatch: pytest.MonkeyPatch, sources: dict[str, str]) -> None:
    """Registers a plugin a source, for this process and those it starts, and nothing else for the doctor to see."""
    metadata = site / "planted-2.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 2.5\n")
    groups = {False: "[attnbench.impls]", True: "[attnbench.approximations]"}
    text = ""
    for approximate, group in groups.items():
        points = [
            f"{name} = planted_{name}:Plugin" for name in sources if (name in APPROXIMATE) == approximate
        ]
        text += "\n".join([group, *points]) + "\n"
    (metadata / "entry_points.txt").write_text(text)
    for name, source in sources.items():
        (site / f"planted_{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])))

    def found(*, approximate: bool = False) -> dict[str, list[Entry]]:
        names = [name for name in sources if (name in APPROXIMATE) == approximate]
        return {name: [Entry(name, f"planted_{name}:Plugin", "planted", "2.5")] for name in names}

    monkeypatch.setattr(doctor, "entries", found)


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    with pytest.MonkeyPatch.context() as patch:
        plant(
            tmp_path_factory.mktemp("site"), patch, {name: source for name, (source, *_) in PLUGINS.items()}
        )
        return {found.name: found for found in examine("cpu")}


@pytest.mark.parametrize("name", PLUGINS)
def test_each_plugin_is_found_in_its_state(findings: dict[str, Finding], name: str) -> None:
    _, state, reason = PLUGINS[name]
    found = findings[name]
    assert (found.state, found.version) == (state, "2.5")
    assert reason in found.reason
    assert "\n" not in found.reason
    assert bool(found.fix) == bool(found.reason) == (state != "usable")


def test_a_plugins_own_fix_is_passed_on(findings: dict[str, Finding]) -> None:
    assert findings["needy"].fix == "pip install x"


def test_a_plugin_that_hangs_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child"
    source = (
        "import pathlib, subprocess, time\n"
        "started = subprocess.Popen(['sleep', '600'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(started.pid))\n"
        "time.sleep(600)\n"
    )
    plant(tmp_path, monkeypatch, {"hangs": source})
    (found,) = examine("cpu", limit_s=5.0)
    assert (found.state, found.reason) == ("broken", "did not load within 5 s")
    assert ended(int(child.read_text()))


def test_a_gpu_is_described_as_the_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu("NVIDIA A", "GPU-a", (8, 0), "580"), Gpu("NVIDIA H", "GPU-h", (9, 0), "580")]
    monkeypatch.setattr(doctor, "visible_gpus", lambda: gpus)
    assert describe_device("cuda:1") == Device("cuda", 1, "NVIDIA H", (9, 0))
    facts = machine_facts()
    assert (facts["GPU"], facts["driver"]) == ("NVIDIA A, NVIDIA H", "580")


def test_the_machines_facts_say_none_for_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "visible_gpus", list)
    monkeypatch.setenv("PATH", "")
    facts = machine_facts()
    assert (facts["GPU"], facts["driver"], facts["C compiler"]) == ("none", "none", "none")
    assert all(facts.values())
