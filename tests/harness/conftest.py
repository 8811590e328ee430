"""For all tests of the harness: made-up runs to read, and plugins.

Plugins planted by tests are found like any installed one, by their entry points, in this process and in workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

Register = Callable[[Mapping[str, str], Path], None]


@pytest.fixture(scope="session")
def builder(load_module: Callable[[str, Path], ModuleType]) -> ModuleType:
    """The maker of made-up runs, ``report/builder.py``."""
    return load_module("run_builder", Path(__file__).parent / "report" / "builder.py")


@pytest.fixture(scope="module")
def register_plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Register]:
    """``register({name: "module:attribute"}, folder of the modules)``, once a test module."""
    site = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:

        def register(points: Mapping[str, str], folder: Path) -> None:
            metadata = site / "planted-1.0.dist-info"
            metadata.mkdir(parents=True)
            (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
            lines = ["[attnbench.impls]", *(f"{name} = {value}" for name, value in points.items())]
            (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
            path = [str(site), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
            patch.setenv("PYTHONPATH", os.pathsep.join(path))
            patch.syspath_prepend(str(site))

        yield register
