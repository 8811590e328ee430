from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from attnbench.harness.report import write
from attnbench.harness.report.drawing import drawing
from attnbench.harness.report.plots import Plot
from attnbench.harness.report.write import MOST_FILE_BYTES, write_plots, write_report


@pytest.fixture(scope="module")
def written(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = builder.write_run(tmp_path_factory.mktemp("written"), builder.problems(head_dims=(64,)))
    return folder, write_report(folder, baseline="older", metrics=["latency", "speedup"])


def test_everything_lands_beside_the_records(written: tuple[Path, list[Path]]) -> None:
    folder, paths = written
    names = {str(path.relative_to(folder)) for path in paths}
    figures = {
        f"plots/{metric}_{way}.{kind}"
        for metric in ("latency", "speedup")
        for way in ("fwd", "bwd")
        for kind in ("svg", "png")
    }
    assert names == {"tables.md", "tables.csv", "tables.tex", "report.html"} | figures
    assert all(0 < path.stat().st_size < MOST_FILE_BYTES for path in paths)
    assert all(path.stat().st_size < 300_000 for path in paths if path.suffix == ".png")
    assert all(path.stat().st_size < 500_000 for path in paths if path.suffix == ".svg")
    assert (folder / "report.html").read_text().count("data:image/svg+xml") == 4
    shown = re.findall(r"!\[.*\]\((.*)\)", (folder / "tables.md").read_text())
    assert {folder / name for name in shown} == {path for path in paths if path.suffix == ".png"}


def test_written_apart_or_by_several_processes_they_are_the_same_files(
    written: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = written
    metrics = ["latency", "speedup"]
    apart = write_report(folder, baseline="older", metrics=metrics, out=tmp_path, formats=["html"])
    monkeypatch.setattr(write, "drawing", partial(drawing, 2))
    monkeypatch.setattr(Plot, "encode", None)  # in this process
    assert {path.suffix for path in apart} == {".html", ".svg", ".png"}
    apart += write_plots(folder, baseline="older", metrics=metrics, out=tmp_path / "plots")
    for path in apart:
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes(), path


def test_a_figure_that_cannot_be_drawn_is_told_by_whoever_waits_for_it() -> None:
    for processes in (1, 2):
        with drawing(processes) as begin:
            wait = begin([Plot("f", "F", partial(divmod, 1, 0))])  # type: ignore[arg-type]
            with pytest.raises(ZeroDivisionError):
                wait()


def test_only_the_formats_asked_for(written: tuple[Path, list[Path]], tmp_path: Path) -> None:
    folder, _ = written
    assert write_report(folder, formats=["csv", "tex"], out=tmp_path) == [
        tmp_path / "tables.csv",
        tmp_path / "tables.tex",
    ]
    assert len(list(tmp_path.iterdir())) == 2


def test_records_alone_report_and_say_so(written: tuple[Path, list[Path]], tmp_path: Path) -> None:
    folder, _ = written
    shutil.copy(folder / "records.jsonl", tmp_path)
    write_report(tmp_path, formats=["md"], metrics=["latency"], draw=False)
    assert not (tmp_path / "plots").exists()
    assert "environment.json: not there" in (tmp_path / "tables.md").read_text()


def test_a_run_of_bad_lines_only_reports_them(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text('{"torn')
    assert write_report(tmp_path)
    assert "records.jsonl:1: the line is torn" in (tmp_path / "tables.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"formats": ["pdf"]}, "unknown format 'pdf'"),
        ({"metrics": ["latncy"]}, "did you mean latency"),
        ({"baseline": "nobody"}, "baseline 'nobody' is not in this run"),
        ({"metrics": ["speedup"]}, "needs a baseline"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_written(
    written: tuple[Path, list[Path]], tmp_path: Path, arguments: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        write_report(written[0], out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
