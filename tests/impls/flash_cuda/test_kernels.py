"""Every kernel compiles for sm_90a without a spill, a stack frame or a remark that products or registers suffer."""

from dataclasses import replace

import pytest

from attnbench.impls.flash_cuda import ahead, build
from attnbench.impls.flash_cuda.configs import ForwardKernel, Shape, backward_kernel, forward_kernel


def shape(
    head_dim, head_dim_v=None, dtype="BF16", left=False, right=False, dropout=False, seqlen=4096, mask=(0, 0)
):
    return Shape(dtype, 1, 2, 1, seqlen, seqlen, head_dim, head_dim_v or head_dim, left, right, dropout, mask)


def forward(*words, **more):
    return forward_kernel(shape(*words, **more), multiprocessors=1)


COVERING = [
    forward(64),
    forward(64, seqlen=512, right=True),
    forward(64, left=True, right=True),
    forward(64, right=True, dropout=True),
    forward(128, right=True),
    forward(128, dtype="FP16", dropout=True),
    forward(192, 128, right=True),
    forward(128, 256, left=True),
    forward(256, right=True),
    forward(64, right=True, mask=(128, 128)),
    forward(128, left=True, right=True, mask=(128, 128)),
    forward(256, mask=(128, 128)),
    forward(64, seqlen=1, right=True),
    forward(128, dtype="FP16", seqlen=1),
    forward(256, left=True, right=True, seqlen=1),
    backward_kernel(shape(64, right=True)),
    backward_kernel(shape(128)),
    backward_kernel(shape(128, dtype="FP16", left=True, right=True)),
    backward_kernel(shape(256, right=True)),
    backward_kernel(shape(128, left=True, right=True, mask=(128, 128))),
    backward_kernel(shape(128, left=True, right=True, dropout=True)),
    backward_kernel(shape(128, left=True, right=True, dropout=True), deterministic=True),
    backward_kernel(shape(256, left=True, right=True, dropout=True), deterministic=True),
]
"""Each head dim, mask, type and feature at least once."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.mark.parametrize("kernel", COVERING, ids=str)
def test_compiles_without_a_loss(kernel):
    assert build.build(kernel.source).resources.problems == []


def test_a_loss_would_be_seen():
    """Three consumers share registers that 96 keys at head_dim 128 exceed."""
    greedy = ForwardKernel("BF16", 128, 128, 3, 96, 2, out_in_q=True)
    problems = build.build(greedy.source).resources.problems
    assert any("spill" in line for line in problems)
    assert any("C7512" in line for line in problems)


def test_more_shared_memory_than_there_is_does_not_compile():
    with pytest.raises(build.CompileError, match="more shared memory than Hopper has"):
        build.build(replace(forward(128), slots=4).source)


@pytest.mark.parametrize("blocks", [(64, 32), (192, 96)], ids=str)
def test_lists_of_other_blocks_compile_too(blocks):
    kernel = forward(64, right=True, dropout=True, mask=blocks)
    assert blocks[0] % kernel.rows == 0
    assert blocks[1] % kernel.keys == 0
    assert build.build(kernel.source).resources.problems == []


def test_a_backward_of_narrow_blocks_compiles_too():
    kernel = backward_kernel(shape(64, right=True, dropout=True, mask=(64, 192)))
    assert kernel.keys == 64
    assert build.build(kernel.source).resources.problems == []


def test_the_covering_set_is_of_offered_kernels():
    assert set(COVERING) <= {*ahead.every_kernel(), *ahead.every_kernel(deterministic=True)}
