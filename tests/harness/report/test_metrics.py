from __future__ import annotations

import pytest

from attnbench.harness.report.frame import COLUMNS
from attnbench.harness.report.metrics import DEFAULT, METRICS, metrics_named


def test_every_metric_has_its_column() -> None:
    assert {metric.column for metric in METRICS.values()} - {"speedup"} <= set(COLUMNS)


def test_default_and_repeated_names() -> None:
    assert tuple(metric.name for metric in metrics_named(None)) == DEFAULT
    assert [metric.name for metric in metrics_named(["memory", "latency", "memory"])] == ["memory", "latency"]


def test_an_unknown_name_is_answered_with_close_ones() -> None:
    with pytest.raises(ValueError, match="unknown metric 'tflop'; did you mean tflops"):
        metrics_named(["tflop"])
    with pytest.raises(ValueError, match="known: latency"):
        metrics_named(["§"])
