"""Few queries against many keys: split key ranges, merged by LSE, with query heads packed into tiles."""

from dataclasses import replace

import pytest
import torch

from attnbench.impls.flash_triton import configs, flash_attention, launch

H200 = configs.Device((9, 0), 132)


@pytest.mark.parametrize(("seqlen_q", "heads", "kv_heads"), [(1, 4, 4), (1, 8, 2), (3, 3, 1), (17, 4, 2)])
@pytest.mark.parametrize("window", [(None, None), (None, 0), (20, 0)], ids=str)
def test_few_queries(make, wrong, seqlen_q, heads, kv_heads, window):
    problem = make(seqlen_q, 300, heads, kv_heads, left=window[0], right=window[1], batch=2)
    assert wrong(problem, flash_attention, window=window) == []


@pytest.mark.parametrize("splits", [2, 3, 8])
def test_splits_are_merged(make, wrong, monkeypatch, splits):
    """More splits than tiles leaves some without a key."""
    chosen = configs.forward_config
    monkeypatch.setattr(launch, "forward_config", lambda *a: replace(chosen(*a), splits=splits))
    assert wrong(make(2, 200, 4, 2, 24, 40, dtype=torch.float32), flash_attention) == []
    # Queries past the last key by top-left alignment, and rows that see nothing.
    assert wrong(make(40, 10, 2, right=0, dtype=torch.float32), flash_attention, causal=True) == []


def test_decode_fills_the_device():
    shape = configs.Shape(1, 32, 8, 1, 65536, 128, 128, 2, True, True, False, (0, 0), True)
    config = configs.forward_config(H200, shape)
    assert config.pack
    assert config.splits * 8 >= H200.sms
