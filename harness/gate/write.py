"""A gate's result written out: text for a terminal, Markdown for a pull request, JSON, and JUnit XML."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2

from attnbench.harness.gate.outcome import (
    Answer,
    CellResult,
    GateExit,
    GateResult,
    calibration_in_words,
)
from attnbench.harness.report.escape import markdown_escape
from attnbench.harness.run.errors import Exit, RunError

SCHEMA = 1
# What a reader must act on comes first.
ORDER = (
    Answer.WRONG, Answer.LOST, Answer.SLOWER, Answer.UNSURE, Answer.FASTER, Answer.SAME, Answer.SKIPPED,
)  # fmt: skip
HEADLINES = {
    GateExit.OK: "no regression",
    GateExit.REGRESSION: "regression",
    GateExit.NOTHING: "nothing could be compared",
    GateExit.WRONG: "wrong answers",
    GateExit.UNFIT: "this machine cannot tell",
    GateExit.UNSURE: "unsure",
}
TEMPLATES = Path(__file__).parent / "templates"


def write_all(result: GateResult, folder: Path, *, unsure_passes: bool, junit: Path | None) -> dict[str, str]:
    """Writes gate.json, gate.md and junit.xml (also to ``junit``); returns the texts by form, and the plain text."""
    texts = {
        "json": json.dumps(document(result, unsure_passes=unsure_passes), indent=1) + "\n",
        "markdown": markdown(result, unsure_passes=unsure_passes),
        "junit": junit_xml(result, unsure_passes=unsure_passes),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, form in (("gate.json", "json"), ("gate.md", "markdown"), ("junit.xml", "junit")):
            (folder / name).write_text(texts[form], encoding="utf-8")
        if junit:
            junit.write_text(texts["junit"], encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {error.filename}: {error.strerror}", Exit.MACHINE) from error
    return texts | {"text": plain(result, unsure_passes=unsure_passes)}


def document(result: GateResult, *, unsure_passes: bool) -> dict[str, Any]:
    """Everything that is known, as JSON values."""
    code = result.exit_code(unsure_passes=unsure_passes)
    data = dataclasses.asdict(result) | {"schema": SCHEMA, "exit_code": int(code), "verdict": code.name}
    if found := result.calibration:
        data["calibration"] |= {
            "fit": found.fit,
            "smallest": found.smallest,
            "false_positive_bound": found.false_positives.most,
        }
    finite: dict[str, Any] = _finite(data)
    return finite


def headline(result: GateResult, *, unsure_passes: bool) -> str:
    """One line: the verdict and the answers that it rests on."""
    counts = Counter(cell.answer for cell in result.cells)
    said = ", ".join(f"{counts[answer]} {answer}" for answer in ORDER if counts[answer])
    return f"{HEADLINES[result.exit_code(unsure_passes=unsure_passes)]}: {said or 'no cells'}"


def plain(result: GateResult, *, unsure_passes: bool) -> str:
    """For a terminal: the verdict, then a line a cell."""
    lines = [
        headline(result, unsure_passes=unsure_passes),
        f"  base  {result.base}",
        f"  head  {result.head}",
    ]
    lines += [f"  {line}" for line in facts(result)]
    for cell in sorted_cells(result):
        lines.append(
            f"{cell.answer:8}{cell.impl}  {cell.problem}  {' '.join(filter(None, figures(cell)))}".rstrip()
        )
        lines += [f"        {cell.reason}"] if cell.reason else []
    return "\n".join(lines) + "\n"


def markdown(result: GateResult, *, unsure_passes: bool) -> str:
    """A pull-request comment."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        finalize=markdown_escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("gate.md.j2").render(
        result=result,
        headline=headline(result, unsure_passes=unsure_passes),
        facts=facts(result),
        cells=[(cell, figures(cell)) for cell in sorted_cells(result)],
        command=shlex.join(result.command),
    )


def junit_xml(result: GateResult, *, unsure_passes: bool) -> str:
    """One test case a cell: failure for what fails the gate, skipped for what was not compared, error if unfit."""
    suite = ElementTree.Element(
        "testsuite", name="bench gate", tests=str(len(result.cells)), time=f"{result.seconds:.1f}"
    )
    outcomes: Counter[str] = Counter()
    for cell in result.cells:
        case = ElementTree.SubElement(
            suite, "testcase", classname=_printable(cell.impl), name=_printable(cell.problem)
        )
        kind = _junit_kind(cell.answer, unfit=bool(result.unfit), unsure_passes=unsure_passes)
        if kind:
            message = cell.reason or "; ".join(result.unfit) or " ".join(filter(None, figures(cell)))
            ElementTree.SubElement(case, kind, type=cell.answer, message=_printable(message))
            outcomes[kind] += 1
    for kind, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(attribute, str(outcomes[kind]))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _junit_kind(answer: Answer, *, unfit: bool, unsure_passes: bool) -> str:
    if answer in (Answer.WRONG, Answer.LOST):
        return "failure"
    if answer is Answer.SKIPPED:
        return "skipped"
    if unfit:
        return "error"
    if answer is Answer.SLOWER or (answer is Answer.UNSURE and not unsure_passes):
        return "failure"
    return ""


def facts(result: GateResult) -> list[str]:
    """What a reader needs to weigh the verdict."""
    lines = [
        f"threshold {result.threshold:.2%}, every verdict of this gate right with {1 - result.alpha:.0%}"
    ]
    lines += [calibration_in_words(result.calibration)] if result.calibration else []
    lines += [f"unfit: {line}" for line in result.unfit]
    lines += [f"note: {line}" for line in result.notes]
    return [*lines, f"{result.device}, {result.seconds:.0f} s"]


def figures(cell: CellResult) -> tuple[str, str, str, str, str]:
    """Times, change, bounds, cycles and units of a cell; empty where not measured."""
    times = f"{cell.base_ms:.4g} → {cell.head_ms:.4g} ms" if cell.base_ms and cell.head_ms else ""
    if cell.change is None or cell.low is None or cell.high is None:
        return times, "", "", "", cell.units
    cycles = "" if cell.cycles is None else f"{cell.cycles:+.2%} cycles"
    return times, f"{cell.change:+.2%}", f"[{cell.low:+.2%}, {cell.high:+.2%}]", cycles, cell.units


def sorted_cells(result: GateResult) -> list[CellResult]:
    return sorted(result.cells, key=lambda cell: (ORDER.index(cell.answer), cell.impl, cell.problem))


def _finite(value: Any) -> Any:
    """JSON has no infinity: an open interval's end is null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and abs(value) == float("inf") else value


def _printable(text: str) -> str:
    """XML has no way to write most control characters, escaped or not."""
    return "".join(c if c.isprintable() or c in "\t\n" else "�" for c in text)
