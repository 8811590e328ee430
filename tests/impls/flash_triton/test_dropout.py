"""Dropout: the published mask is the kernels' mask, in forward and in backward."""

import itertools

import pytest
import torch
from torch import Tensor

from attnbench.impls import flash_api
from attnbench.impls.flash_api import call
from attnbench.impls.flash_triton import flash_attention


def state_of(monkeypatch: pytest.MonkeyPatch, seed: int, offset: int) -> None:
    """Make the next calls draw this state."""
    monkeypatch.setattr(
        call,
        "draw_dropout_state",
        lambda device: torch.tensor([seed, offset], dtype=torch.int64, device=device),
    )


def test_philox_known_answers():
    """The known-answer vectors of the Random123 distribution for philox4x32 with 7 rounds."""
    ones = 0xFFFFFFFF
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((ones,) * 4, (ones,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ]  # fmt: skip
    for counter, key, expected in vectors:
        got = flash_api.philox4x32(tuple(torch.tensor(c) for c in counter), key)
        assert tuple(int(word) for word in got) == expected


def test_mask_by_its_definition():
    """Each element by the documented formula, one scalar Philox call at a time."""
    seed, offset, heads, p = -(2**40) + 12345, (7 << 32) + 5, 3, 0.3
    mask = flash_api.dropout_keep_mask(seed, offset, 2, heads, 70, 40, p)
    assert mask.shape == (2, heads, 70, 40)
    for b, h, i, j in itertools.product((0, 1), (0, 2), (0, 9, 31, 32, 69), (0, 8, 17, 39)):
        counter = (8 * (i // 32) + i % 8, 8 * (j // 32) + j % 8, b * heads + h, 5)
        words = flash_api.philox4x32(
            tuple(torch.tensor(c) for c in counter), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
        )
        word = int(words[2 * (i // 16 % 2) + j // 16 % 2])
        byte = word >> 8 * (2 * (i // 8 % 2) + j // 8 % 2) & 0xFF
        assert bool(mask[b, h, i, j]) == (byte < flash_api.dropout_threshold(p))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate_is_the_declared_one(p):
    effective = flash_api.dropout_effective_p(p)
    assert abs(effective - p) <= 0.5 / 256
    dropped = 1 - flash_api.dropout_keep_mask(1, 2, 2, 4, 200, 300, p).float().mean().item()
    assert abs(dropped - effective) < 5 * (effective * (1 - effective) / 480_000) ** 0.5


def test_an_element_does_not_depend_on_the_sizes():
    big = flash_api.dropout_keep_mask(3, 4, 1, 2, 100, 90, 0.5)
    assert torch.equal(big[:, :, :33, :70], flash_api.dropout_keep_mask(3, 4, 1, 2, 33, 70, 0.5))


@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(2, 2, (None, None)), (4, 2, (None, 0))])
def test_kernels_apply_the_mask(make, monkeypatch, heads, kv_heads, window):
    state_of(monkeypatch, -(2**50) + 3, 11)
    p = 0.3
    problem = make(70, 100, heads, kv_heads, batch=2, dtype=torch.float32, left=window[0], right=window[1])
    keep = flash_api.dropout_keep_mask(-(2**50) + 3, 11, 2, heads, 70, 100, p, device=problem.q.device)
    reference = problem.attention(torch.float64, keep, 1 - flash_api.dropout_effective_p(p))
    for got, wanted in zip(problem.run(flash_attention, window=window, dropout_p=p), reference, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=2e-5)


def test_decode_applies_the_mask(make, monkeypatch):
    state_of(monkeypatch, 5, 6)
    problem = make(1, 200, 4, 2, dtype=torch.float32)
    keep = flash_api.dropout_keep_mask(5, 6, 1, 4, 1, 200, 0.5, device=problem.q.device)
    reference = problem.attention(torch.float64, keep, 0.5)
    for got, wanted in zip(problem.run(flash_attention, dropout_p=0.5), reference, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=2e-5)


def recovered(out: Tensor) -> Tensor:
    """Which keys of a one-hot V got through."""
    return out != 0


def test_state_comes_from_torch(device):
    """Unseeded calls differ, seeded ones agree, and checkpointing redraws the same mask."""
    q = torch.randn(1, 32, 1, 32, device=device)
    v = torch.eye(32, device=device)[None, :, None]
    torch.manual_seed(0)
    first, second = (recovered(flash_attention(q, q, v, dropout_p=0.5)) for _ in range(2))
    torch.manual_seed(0)
    again = recovered(flash_attention(q, q, v, dropout_p=0.5))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)

    def gradient(run):
        torch.manual_seed(1)
        x = q.clone().requires_grad_()
        run(lambda y: flash_attention(y, y, v, dropout_p=0.5), x).square().sum().backward()
        return x.grad

    def checkpointed(f, x):
        return torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False)

    assert torch.equal(gradient(lambda f, x: f(x)), gradient(checkpointed))
