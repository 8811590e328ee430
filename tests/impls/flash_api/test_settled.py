"""Calls like an earlier one: told apart from all that are not, and with the same answers as if there had been none."""

import gc
import threading
import weakref
from decimal import Decimal

import pytest
import torch

from attnbench.impls.flash_api import attend, call, define_ops, settled
from attnbench.impls.flash_api.operators import Options

PLANNED: list[str] = []


@torch.no_grad()  # autograd sees nothing of a kernel
def forward(q, k, v, rng, lists, options):
    """Not attention, but of its shape; every option and every input shows in it."""
    left, right = (-1 if side is None else side for side in (options.left, options.right))
    told = left + 3 * right + 10 * options.bottom_right + 100 * options.scale + 1000 * options.deterministic
    summed = k.double().sum(1, keepdim=True) + 2 * v.double().sum(1, keepdim=True)
    out = (q.double() * summed + told).to(q.dtype)
    return out.contiguous(), out.float().sum(3).transpose(1, 2).contiguous()


def backward(d_out, d_lse, q, k, v, out, lse, rng, lists, options):
    extra = 0 if d_lse is None else d_lse.sum()
    grads = (d_out.double().sum() * n + extra + options.scale for n in (1, 2, 3))
    return tuple(torch.full_like(x, float(g)) for x, g in zip((q, k, v), grads, strict=True))


def plan_forward(q, k, v, options):
    PLANNED.append("forward")
    layouts = [(x.shape, x.stride(), x.dtype) for x in (q, k, v)]

    def again(q, k, v, rng):
        assert [(x.shape, x.stride(), x.dtype) for x in (q, k, v)] == layouts
        assert (rng is None) == (options.dropout_p == 0)
        return forward(q, k, v, rng, [], options)

    return again


def plan_backward(d_out, q, k, v, out, lse, options):
    PLANNED.append("backward")
    layouts = [(x.shape, x.stride(), x.dtype) for x in (d_out, q, k, v, out, lse)]

    def again(d_out, q, k, v, out, lse, rng):
        assert [(x.shape, x.stride(), x.dtype) for x in (d_out, q, k, v, out, lse)] == layouts
        return backward(d_out, None, q, k, v, out, lse, rng, [], options)

    return again


def refuse(q, v, options):
    if options.scale == 7:
        raise ValueError("scale: no gradients with 7")


OP = define_ops("test_settled", forward, backward, refuse, plan_forward, plan_backward)


def attention(q, k, v, op=OP, **changes):
    options = {
        "causal": False, "window": None, "alignment": "bottom_right", "dropout_p": 0.0, "block_mask": None,
        "scale": None, "return_lse": False, "deterministic": False,
    }  # fmt: skip
    return attend(op, q, k, v, **options | changes)


@pytest.fixture(autouse=True)
def nothing_settled():
    settled.forget()
    PLANNED.clear()


@pytest.fixture
def anew(monkeypatch):
    """How often a call's tensors were checked."""
    checked, check = [], call.check_tensors

    def counting(*tensors):
        checked.append(1)
        check(*tensors)

    monkeypatch.setattr(call, "check_tensors", counting)
    return checked


def tensors(shape=(1, 8, 2, 16), dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype) for _ in range(3)]


def leaves(*of, **options):
    return [x.requires_grad_() for x in tensors(*of, **options)]


def test_what_is_asked_once_is_not_asked_again(anew):
    for _ in range(3):
        for make in (tensors, leaves):
            q, k, v = make()
            out, lse = attention(q, k, v, return_lse=True)
            expected = forward(q, k, v, None, [], Options(None, None, True, 0.25, 0.0, (0, 0), False))
            assert torch.equal(out, expected[0])
            assert torch.equal(lse, expected[1])
    assert len(anew) == 2
    assert PLANNED == ["forward"] * 2


def test_a_backward_is_planned_once(anew):
    for _ in range(3):
        q, k, v = leaves()
        d_out = torch.randn(1, 8, 2, 16)
        grads = torch.autograd.grad(attention(q, k, v), (q, k, v), d_out)
        expected = [float(d_out.double().sum()) * n + 0.25 for n in (1, 2, 3)]
        assert [float(x.flatten()[0]) for x in grads] == pytest.approx(expected, rel=1e-6)
    assert PLANNED == ["forward", "backward"]


def changed_view(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


CHANGES = {
    "causal": ({"causal": True}, lambda x: x),
    "window": ({"window": (1, 0)}, lambda x: x),
    "another window": ({"window": (0, 1)}, lambda x: x),
    "alignment": ({"alignment": "top_left"}, lambda x: x),
    "scale": ({"scale": 0.5}, lambda x: x),
    "deterministic": ({"deterministic": True}, lambda x: x),
    "dropout": ({"dropout_p": 0.5}, lambda x: x),
    "dtype": ({}, lambda x: x.half()),
    "strides": ({}, changed_view),
    "a size": ({}, lambda x: x[:, :, :1]),
    "negated": ({}, torch._neg_view),
    "a parameter": ({}, torch.nn.Parameter),
    "needs no gradient": ({}, torch.Tensor.detach),
}


@pytest.mark.parametrize("change", CHANGES)
def test_calls_that_differ_are_told_apart(change, anew):
    """From another one with and without gradients; each with the answer that it has as the first of all calls."""
    options, alter = CHANGES[change]
    q, k, v = leaves()
    for x in (q, k, v):
        x.data.round_(decimals=1)
    others = [alter(x) for x in (q, k, v)]
    attention(q, k, v)
    before = len(anew)
    got = attention(*others, **options)
    assert len(anew) == before + 1, "it was taken for the other one"
    settled.forget()
    expected = attention(*others, **options)
    assert torch.equal(got, expected)
    assert got.requires_grad == expected.requires_grad
    if got.requires_grad and options:
        for out in (got, expected):
            assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("which", [1, 2])
def test_strides_of_k_and_v_alone_tell_calls_apart(which, anew):
    arguments = tensors()
    attention(*arguments)
    arguments[which] = changed_view(arguments[which])
    attention(*arguments)
    assert len(anew) == 2


@pytest.mark.parametrize("first", [False, True])
def test_modes_of_autograd_tell_calls_apart(first):
    """Whichever came first."""
    q, k, v = leaves()
    modes = [(torch.enable_grad, True), (torch.no_grad, False), (torch.inference_mode, False)]
    for mode, wanted in (modes if first else modes[::-1]) * 2:
        with mode():
            assert attention(q, k, v).requires_grad is wanted
    assert attention(*(x.detach() for x in (q, k, v))).requires_grad is False
    with torch._C._AutoDispatchBelowAutograd():
        assert attention(q, k, v).requires_grad is False


@pytest.mark.parametrize("autocast_first", [False, True])
def test_autocast_tells_calls_apart(autocast_first):
    q, k, v = tensors()
    for enabled in [autocast_first, not autocast_first] * 2:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert attention(q, k, v).dtype == (torch.bfloat16 if enabled else torch.float32)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_autocast_is_the_dtype_of_now(given):
    """Also where it changes between calls, and where nothing was to be cast."""
    for dtype in (torch.bfloat16, torch.float16) * 2:
        with torch.autocast("cpu", dtype=dtype):
            assert attention(*tensors(dtype=given)).dtype == dtype


@pytest.mark.parametrize(
    ("fine", "refused", "error"),
    [
        ({"window": (1, 0)}, {"window": (True, 0)}, "window: got"),
        ({"window": (1, 0)}, {"window": (1.0, 0)}, "window: got"),
        ({"window": (1, 0)}, {"window": 5}, "window: got 5"),
        ({"window": (1, 0)}, {"window": {}}, "window: got"),
        ({"window": (1, 0)}, {"window": [1, []]}, "window: got"),
        ({"scale": 0.5}, {"scale": torch.tensor(0.5)}, "scale: got"),
        ({"scale": 0.5}, {"scale": Decimal("0.5")}, "scale: got"),
        ({}, {"dropout_p": Decimal(0)}, "dropout_p: got"),
        ({}, {"scale": []}, "scale: got"),
        ({}, {"dropout_p": "0"}, "dropout_p: got"),
        ({}, {"alignment": []}, "alignment: got"),
        ({"alignment": "top_left"}, {"alignment": "TOP_LEFT"}, "alignment: got"),
        ({}, {"block_mask": 3}, "block_mask: got int"),
    ],
)
def test_what_is_refused_is_refused_after_its_like(fine, refused, error):
    arguments = tensors()
    attention(*arguments, **fine)
    with pytest.raises((TypeError, ValueError), match=error):
        attention(*arguments, **refused)


def test_no_tensors_are_refused_after_their_like():
    q, k, v = tensors()
    attention(q, k, v)
    for arguments in ((q.numpy(), k, v), (q, k.numpy(), v), (q, k, v.numpy()), (q, k, None), (None, k, v)):
        with pytest.raises(TypeError, match="allowed are torch tensors"):
            attention(*arguments)


def test_a_gradient_that_is_not_offered_is_refused_every_time():
    q, k, v = tensors()
    for _ in range(2):
        attention(q, k, v, scale=7)
        with pytest.raises(ValueError, match="no gradients with 7"):
            attention(q.clone().requires_grad_(), k, v, scale=7)


def test_a_switch_that_is_a_tensor_is_read_every_time():
    arguments, causal = tensors(), torch.tensor(False)
    before = attention(*arguments, causal=causal)
    causal.fill_(True)
    assert not torch.equal(attention(*arguments, causal=causal), before)


def test_every_call_draws_its_own_dropout(monkeypatch):
    drawn = []
    monkeypatch.setattr(call, "draw_dropout_state", lambda device: drawn.append(device) or torch.zeros(2))
    for _ in range(3):
        attention(*tensors(), dropout_p=0.5)
    assert len(drawn) == 3
    assert PLANNED == ["forward"]


def test_a_gradient_of_lse_is_not_lost():
    for _ in range(2):
        for weight in (0, 1, 0):
            q, k, v = leaves()
            out, lse = attention(q, k, v, return_lse=True)
            (grad,) = torch.autograd.grad(out.sum() + weight * lse.sum() if weight else out.sum(), q)
            wanted = out.numel() + 0.25 + weight * lse.numel()
            assert grad.flatten()[0] == wanted


def test_gradients_of_gradients_are_refused_after_a_plain_one():
    for _ in range(2):
        q, k, v = leaves()
        torch.autograd.grad(attention(q, k, v).sum(), q)
        (grad,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not implemented"):
            grad.sum().backward()


def test_gradients_in_another_layout_are_told_apart():
    q, k, v = leaves()
    d_out = torch.randn(1, 8, 2, 16)
    for grad in (
        d_out,
        changed_view(d_out),
        d_out.expand(1, 8, 2, 16),
        d_out[:, :, :, :1].expand(1, 8, 2, 16),
    ):
        for _ in range(2):
            (got,) = torch.autograd.grad(attention(q, k, v), q, grad)
            assert got.flatten()[0] == pytest.approx(float(grad.double().sum()) + 0.25, rel=1e-5, abs=1e-5)
    assert PLANNED.count("backward") == 3


def test_hooks_of_saved_tensors_may_change_their_layout():
    q, k, v = leaves()
    for hooked in (False, True, False, True):
        unpack = changed_view if hooked else (lambda x: x)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            out = attention(q, k, v)
        torch.autograd.grad(out.sum(), q)
    assert PLANNED == ["forward", "backward", "backward"]


def test_nothing_keeps_tensors_alive():
    def call_and_go():
        made = leaves()
        out = attention(*made)
        out.sum().backward()
        attention(*made).sum().backward()
        return [weakref.ref(x) for x in (*made, out)]

    refs = call_and_go()
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4


def test_what_is_remembered_is_bounded(monkeypatch, anew):
    monkeypatch.setattr(settled, "KEPT", 5)
    monkeypatch.setattr(settled, "KEPT_EACH", 2)
    arguments = tensors()
    for scale in range(1, 21):
        attention(*arguments, scale=scale)
        assert len(settled._known) <= 5
    del anew[:]
    attention(*arguments, scale=20)
    assert anew == []
    attention(*arguments, scale=1)
    assert anew == [1], "the oldest is forgotten"
    for n in range(1, 9):
        attention(*(torch.randn(1, 8, 2, 16 * n)[:, :, :, :16] for _ in range(3)))
    assert max(map(len, settled._known.values())) == 2


def test_one_tensor_in_two_places():
    q, k, v = tensors()
    options = Options(None, None, True, 0.25, 0.0, (0, 0), False)
    for arguments in ((q, q, q), (q, k, k), (q, k, v), (q, q, v), (q, q, q)):
        assert torch.equal(attention(*arguments), forward(*arguments, None, [], options)[0])
    assert [len(known) for known in settled._known.values()] == [1]


def test_families_are_told_apart():
    other = define_ops("test_settled_too", lambda q, *_: (q * 0, q[..., 0].transpose(1, 2) * 0), backward)
    arguments = tensors()
    for _ in range(2):
        assert attention(*arguments).any()
        assert not attention(*arguments, op=other).any()


def test_threads_may_call_at_once(monkeypatch):
    monkeypatch.setattr(settled, "KEPT", 3)
    failed = []

    def work(seed):
        try:
            for n in range(200):
                scale = float((seed + n) % 7 + 1)
                q, k, v = tensors((1, 2, 1, 16))
                options = Options(None, None, True, scale, 0.0, (0, 0), False)
                assert torch.equal(attention(q, k, v, scale=scale), forward(q, k, v, None, [], options)[0])
        except Exception as error:  # noqa: BLE001 - told in the test's thread
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
