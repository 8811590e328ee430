"""The paper's findings asked of made-up runs in which the answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from attnbench.harness.limits.findings import Finding, Roles, findings, rows

ROLES = Roles("standard", "flash", "sparse")
LENGTHS = [256, 512, 1024, 2048, 4096, 8192]
ROUGH = ("sparse", "linear")

# Milliseconds and MiB against length: quadratic, quadratic and faster, sparse, linear with a large constant.
TIMES = {
    "standard": lambda n: 1e-6 * n**2,
    "flash": lambda n: 2e-7 * n**2,
    "sparse": lambda n: 2e-8 * n**1.5,
    "linear": lambda n: 1.5e-4 * n,
}
MEMORY = {
    "standard": lambda n: 1e-4 * n**2,
    "flash": lambda n: 1e-2 * n,
    "sparse": lambda n: 1e-2 * n,
    "linear": lambda n: 1e-2 * n,
}


def table(times=TIMES, memory=MEMORY, **columns: object) -> pd.DataFrame:
    cells = [
        {
            "impl": f"{impl} (approximate)" if impl in ROUGH else impl, "approximate": impl in ROUGH, "seqlen_k": n,
            "direction": "fwd", "mask": "full", "dropout_p": 0.0, "status": "OK",
            "round_ms": np.array([time(n), 1.1 * time(n)]), "peak_mib": memory[impl](n),
        }
        for impl, time in times.items()
        for n in LENGTHS
    ]  # fmt: skip
    return pd.DataFrame(cells).assign(**columns).astype({"approximate": "boolean"})


def asked(data: pd.DataFrame, word: str) -> Finding:
    (found,) = (one for one in findings(data, ROLES) if word in one.claim)
    return found


@pytest.mark.parametrize(
    "word",
    [
        "linear in the sequence",
        "faster than standard",
        "crosses",
        "every approximate method",
        "20 times less",
    ],
)
def test_each_finding_holds_where_it_does(word: str) -> None:
    assert asked(table(), word).holds is True


def test_figures_are_the_runs_own() -> None:
    assert asked(table(), "linear in the sequence").evidence == "flash N^1.00, standard N^2.00"
    assert asked(table(), "faster than standard").evidence.startswith("256 5.00×, 512 5.00×")
    assert asked(table(), "crosses").evidence == "ahead from: linear 1k"
    assert asked(table(), "20 times less").evidence.startswith("81.9× less at 8k")


def test_each_fails_where_the_figures_say_so() -> None:
    quadratic = MEMORY | {"flash": MEMORY["standard"]}
    assert asked(table(memory=quadratic), "linear in the sequence").holds is False
    assert asked(table(memory=quadratic), "20 times less").holds is False
    slow = TIMES | {"flash": lambda n: 2e-6 * n**2}
    assert asked(table(slow), "faster than standard").holds is False
    late = TIMES | {"linear": lambda n: 1.5e-3 * n}
    assert asked(table(late), "crosses").holds is False
    quick = asked(table(TIMES | {"linear": lambda n: 1e-8 * n}), "every approximate method")
    assert quick.holds is False
    assert quick.evidence.startswith("of 6 pairs, behind in 6: linear at 256")


def test_a_lead_that_is_lost_again_is_no_crossing() -> None:
    slow_at_4k = TIMES | {"linear": lambda n: 1.5e-4 * n * (100 if n == 4096 else 1)}
    assert asked(table(slow_at_4k), "crosses").evidence == "ahead from: linear 8k"
    lost = TIMES | {"linear": lambda n: 1.5e-4 * n * (100 if n == 8192 else 1)}
    assert asked(table(lost), "crosses").evidence == "ahead from: linear never"


def test_a_crossing_of_what_was_never_met_is_open() -> None:
    without = {name: TIMES[name] for name in ("standard", "sparse", "linear")}
    assert asked(table(without), "crosses").holds is None


def test_what_the_run_lacks_stays_open() -> None:
    alone = {name: TIMES[name] for name in ("standard", "sparse")}
    found = findings(table(alone), ROLES)
    assert {one.holds for one in found} == {None}
    assert {row[2] for row in rows(found)} == {"open"}
    assert findings(table(mask="causal"), ROLES) == []
    assert findings(table(status="OOM"), ROLES) == []


def test_a_run_with_several_problems_of_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="several problems of length 256"):
        findings(pd.concat([table(), table()]), ROLES)
