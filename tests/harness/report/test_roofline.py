"""The roofline's roofs."""

from __future__ import annotations

import math

import matplotlib as mpl
import pandas as pd
import pytest

from attnbench.harness.report.palette import styles
from attnbench.harness.report.plots import RC
from attnbench.harness.report.roofline import exp_roof, has_roofline, roofline


def cells(**columns: object) -> pd.DataFrame:
    shared = {
        "impl": ["a", "b"], "head_dim": 64, "seqlen_k": 1024, "direction": "fwd", "tflops": [300.0, 500.0],
        "gemm_tflops": 700.0, "copy_gbs": 4000.0, "intensity": 400.0, "sm_mhz": 1980.0, "sm_count": 132.0,
        "visible_pairs": 10**6, "flops": 2 * 128 * 10**6,
    }  # fmt: skip
    return pd.DataFrame(shared | columns)


def test_the_exp_roof_is_flop_over_exponentials_at_the_clock() -> None:
    """At head_dim 64: 256 FLOP an exp, 4.18e12 exp/s, 1071 TFLOP/s."""
    assert exp_roof(cells()) == pytest.approx(256 * 16 * 132 * 1.98e9 / 1e12)
    assert exp_roof(cells(direction="fwd_bwd")) == pytest.approx(128 * 16 * 132 * 1.98e9 / 1e12)
    assert math.isnan(exp_roof(cells(sm_mhz=float("nan"))))


def test_the_ridge_stands_where_copy_and_gemm_meet() -> None:
    table = cells()
    (axes,) = roofline(table, ["a", "b"], styles(["a", "b"])).axes
    roof = next(line for line in axes.lines if line.get_marker() == "None" and len(line.get_xdata()) == 3)
    assert list(roof.get_xdata())[1] == pytest.approx(700 / 4.0)
    assert list(roof.get_ydata())[1:] == pytest.approx([700, 700])


def test_the_legend_of_many_implementations_fits() -> None:
    impls = [f"impl-{number}" for number in range(24)]
    with mpl.rc_context(RC):
        figure = roofline(cells(), impls, styles(impls))
        figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().y0 >= 0


def test_cells_without_ceilings_have_no_roofline() -> None:
    assert has_roofline(cells())
    assert not has_roofline(cells(gemm_tflops=float("nan")))
    assert not has_roofline(cells(tflops=float("nan")))
