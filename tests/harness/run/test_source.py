"""The source hash of an implementation: it moves with every file that it is made of, and with nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from attnbench.harness import registry
from attnbench.harness.registry import Entry
from attnbench.harness.run import source

FILES = {
    "shop/__init__.py": "",
    "shop/shared.py": "SCALE = 1\n",
    "shop/lonely.py": "from shop.shared import SCALE\n",
    "shop/unused.py": "",
    "shop/kernel/__init__.py": "",
    "shop/kernel/plugin.py": "def prepare():\n    from ..shared import SCALE\n    from . import op\n",
    "shop/kernel/op.py": "import shop.deep.down\n",
    "shop/kernel/csrc/forward.cu": "__global__ void f() {}\n",
    "shop/kernel/NOTES.md": "what was measured\n",
    "shop/deep/__init__.py": "",
    "shop/deep/down.py": "",
}


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with two plugins, one a package of its own, one a module beside other things."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    registered = {"lonely": "shop.lonely:plugin", "kernel": "shop.kernel.plugin:plugin"}
    entries = {name: [Entry(name, value, "shop", "1.0")] for name, value in registered.items()}
    monkeypatch.setattr(registry, "entries", lambda approximate=False: {} if approximate else entries)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("plugin", "changed", "moves"),
    [
        ("kernel", "shop/kernel/csrc/forward.cu", True),
        ("kernel", "shop/kernel/op.py", True),
        ("kernel", "shop/shared.py", True),  # by a relative import inside a function
        ("kernel", "shop/deep/down.py", True),  # by an import of an import
        ("kernel", "shop/kernel/NOTES.md", False),
        ("kernel", "shop/lonely.py", False),
        ("kernel", "shop/unused.py", False),
        ("lonely", "shop/lonely.py", True),
        ("lonely", "shop/shared.py", True),
        ("lonely", "shop/kernel/op.py", False),
    ],
)
def test_it_moves_with_the_files_of_the_implementation(
    shop: Path, plugin: str, changed: str, moves: bool
) -> None:
    before = source.source_hash(plugin)
    assert len(before) == source.DIGITS
    with (shop / changed).open("a") as file:
        file.write("\n# a comment is a change too\n")
    assert (source.source_hash(plugin) != before) is moves


def test_it_does_not_depend_on_where_it_is_installed(
    shop: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = source.source_hash("kernel")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (shop / "shop").rename(elsewhere / "shop")
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]
    sys.path.insert(0, str(elsewhere))
    try:
        assert source.source_hash("kernel") == before
    finally:
        sys.path.remove(str(elsewhere))


def test_the_wrapped_distribution_counts(shop: Path) -> None:
    alone = source.source_hash("lonely")
    assert source.source_hash("lonely", "numpy") not in ("", alone)
    assert source.source_hash("lonely", "not-installed") == alone


def test_what_cannot_be_read_has_no_hash(shop: Path) -> None:
    assert source.source_hash("unknown") == ""
    (shop / "shop" / "lonely.py").write_text("def broken(:\n")
    assert source.source_hash("lonely") == ""


def test_own_implementations_are_hashed_without_running_them() -> None:
    code = (
        "import sys; from attnbench.harness.run.source import source_hash as h;"
        "print(h('standard'), h('tiled-fa1'), h('tiled-fa2'), h('flash-triton'), 'torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    standard, fa1, fa2, triton, torch = answer
    assert standard != fa1 == fa2
    assert len(triton) == source.DIGITS
    assert torch == "False"


def test_a_mark_says_nothing_of_the_source() -> None:
    assert source.source_hash("standard@base.1") == source.source_hash("standard") != ""
