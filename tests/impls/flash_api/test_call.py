"""What a call says about arguments that no kernel takes."""

import math

import numpy as np
import pytest
import torch

from attnbench.impls.flash_api import attend
from attnbench.impls.flash_api.operators import Operator
from attnbench.impls.flash_api.scale import LARGEST_SCALE, SMALLEST_SCALE

Q = torch.zeros(1, 8, 2, 16)


def told(q=Q, **changes):
    """What the operator is told after the tensors, up to the dropout probability."""
    seen = []

    def op(*arguments):
        seen.extend(arguments)
        return arguments[0], arguments[0]

    operator = Operator(op, plan=lambda *_: None, again=op)

    options = {
        "causal": False, "window": None, "alignment": "bottom_right", "dropout_p": 0.0, "block_mask": None,
        "scale": None, "return_lse": False, "deterministic": False,
    }  # fmt: skip
    attend(operator, q, q, q, **options | changes)
    return seen[5:10]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": np.zeros((1, 8, 2, 16))}, TypeError, "q: got ndarray"),
        ({"window": (1, 2, 3)}, ValueError, r"window: got \(1, 2, 3\)"),
        ({"window": 5}, ValueError, "window: got 5"),
        ({"window": "ab"}, ValueError, "window: got 'ab'"),
        ({"window": (True, 0)}, ValueError, r"window: got \(True, 0\)"),
        ({"window": (1.0, 0)}, ValueError, r"window: got \(1.0, 0\)"),
        ({"dropout_p": "a"}, TypeError, "dropout_p: got 'a'"),
        ({"dropout_p": math.nan}, ValueError, "dropout_p: got nan"),
        ({"scale": "a"}, TypeError, "scale: got 'a'"),
        ({"scale": 1e39}, ValueError, "scale: got 1e[+]39, allowed is"),
        ({"scale": 1e-46}, ValueError, "scale: got 1e-46, allowed is"),
        ({"scale": math.inf}, ValueError, "scale: got inf"),
        ({"scale": math.nan}, ValueError, "scale: got nan"),
        ({"scale": -1}, ValueError, "scale: got -1"),
    ],
)
def test_errors_name_what_was_given(changes, error, message):
    with pytest.raises(error, match=message):
        told(**changes)


@pytest.mark.parametrize("scale", [SMALLEST_SCALE, 1, LARGEST_SCALE])
def test_every_scale_that_is_allowed_is_a_number_in_float32(scale):
    given = told(scale=scale)[3]
    assert isinstance(given, float)
    for x in (given, given * math.log2(math.e)):
        assert 0 < torch.tensor(x, dtype=torch.float32).item() < math.inf


def test_the_scales_are_those_of_float32():
    limits = torch.finfo(torch.float32)
    assert (limits.tiny, limits.max * math.log(2)) == (SMALLEST_SCALE, LARGEST_SCALE)


def test_a_window_beyond_64_bits_reaches_the_end():
    left, right, *_ = told(window=(2**70, 0))
    assert left < 2**63
    assert left > 2**40
    assert right == 0


def test_a_device_without_autocast_is_no_error():
    assert told(q=Q.to("meta"))[0] is None
