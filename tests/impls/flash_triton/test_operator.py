"""The operator as torch sees it: opcheck, compile, autocast, errors, double backward, determinism."""

import pytest
import torch

from attnbench.impls import flash_api
from attnbench.impls.flash_triton import flash_attention


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(make, device, dropout_p):
    problem = make(20, 30, 2, dtype=torch.float32)
    tensors = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    rng = flash_api.draw_dropout_state(torch.device(device)) if dropout_p else None
    torch.library.opcheck(
        torch.ops.attnbench.flash_triton_forward.default,
        (*tensors, rng, [], None, 0, True, 0.25, dropout_p, 0, 0, False),
    )


def test_double_backward_raises(make):
    problem = make(20, 30, dtype=torch.float32)
    q = problem.q.requires_grad_()
    (dq,) = torch.autograd.grad(flash_attention(q, problem.k, problem.v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        dq.sum().backward()


def test_autocast(make, device):
    problem = make(20, 30, dtype=torch.float32)
    with torch.autocast(device, dtype=torch.float16):
        out = flash_attention(problem.q, problem.k, problem.v)
    assert out.dtype == torch.float16


def test_repeats_are_bitwise_equal(make):
    problem = make(70, 90, 4, 2)
    first, second = (problem.run(flash_attention, deterministic=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": (2, 3, 4)}, ValueError, "q: got 3 dimensions"),
        ({"q": torch.float64}, TypeError, "q: got torch.float64"),
        ({"k": torch.float32}, TypeError, "k: got torch.float32, must match"),
        ({"k": (1, 8, 3, 16)}, ValueError, "v: .seqlen, heads."),
        ({"q": (1, 8, 3, 16)}, ValueError, "k: 2 heads, allowed are divisors of q's 3"),
        ({"q": (2, 8, 2, 16)}, ValueError, "k: batch 1"),
        ({"q": (1, 8, 2, 20)}, ValueError, "q: head_dim 20"),
        ({"v": (1, 8, 2, 264)}, ValueError, "v: head_dim 264"),
        ({"q": (1, 8, 2, 32)}, ValueError, "k: head_dim 16, must match"),
        ({"alignment": "left"}, ValueError, "alignment: got 'left'"),
        ({"window": (-1, 0)}, ValueError, "window: got"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0"),
        ({"scale": 0.0}, ValueError, "scale: got 0.0"),
        ({"block_mask": 3}, TypeError, "block_mask: got int"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    tensors = {name: torch.zeros(1, 8, 2, 16, dtype=torch.float16) for name in "qkv"}
    options = {}
    for name, value in changes.items():
        if isinstance(value, tuple) and name in tensors:
            tensors[name] = torch.zeros(value, dtype=torch.float16)
        elif isinstance(value, torch.dtype):
            tensors[name] = tensors[name].to(value)
        else:
            options[name] = value
    with pytest.raises(error, match=message):
        flash_attention(**tensors, **options)


def test_bfloat16_is_refused_by_the_interpreter(device):
    if device != "cpu":
        pytest.skip("compiled kernels multiply bfloat16 rightly")
    x = torch.zeros(1, 8, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="bfloat16 on the CPU"):
        flash_attention(x, x, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_traces_through(make):
    """Without graph breaks, forward and backward, with an argument that changes between calls."""
    problem = make(20, 30, 2, dtype=torch.float32, right=0)
    compiled = torch.compile(flash_attention, backend="aot_eager", fullgraph=True)
    for causal in (True, False):
        got = problem.run(compiled, causal=causal)
        wanted = problem.run(flash_attention, causal=causal)
        assert all(map(torch.equal, got, wanted))
