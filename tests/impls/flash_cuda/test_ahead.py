"""Configurations compiled ahead: each by a name of its own, and nothing that costs speed passes for fit."""

import pickle
from dataclasses import replace

import pytest

from attnbench.impls.flash_cuda import ahead, build
from attnbench.impls.flash_cuda.configs import (
    BackwardKernel,
    ForwardKernel,
    Shape,
    backward_kernel,
    forward_kernel,
)
from attnbench.impls.flash_cuda.plugin import FlashCuda, deterministic

PLAIN = forward_kernel(Shape("BF16", 1, 2, 2, 4096, 4096, 128, 128, False, False), 1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))


def test_what_is_compiled_ahead_is_what_first_calls_find():
    compiled = ahead.compile_one(PLAIN)
    assert (compiled.problems, compiled.cached, compiled.spill_bytes) == ((), False, 0)
    assert compiled.registers > 100
    assert compiled.code_bytes == len(build.build(PLAIN.source).cubin)
    assert ahead.compile_one(PLAIN) == replace(compiled, cached=True)


@pytest.mark.parametrize(
    ("kernel", "problem", "logged"),
    [
        (ForwardKernel("BF16", 128, 128, 3, 96, 2, out_in_q=True), "spill", "C7512"),
        (replace(PLAIN, slots=4), "NVRTC refused it", "more shared memory than Hopper has"),
    ],
    ids=["spilling", "too large"],
)
def test_a_loss_is_a_problem_and_the_log_is_kept(kernel, problem, logged):
    compiled = ahead.compile_one(kernel)
    assert any(problem in line for line in compiled.problems)
    assert logged in compiled.log


def test_every_configuration_has_a_name_and_crosses_to_another_process():
    for plugin in (FlashCuda(), deterministic):
        builds = plugin.builds()
        kernels = ahead.every_kernel(plugin.deterministic)
        assert len(builds) == len(kernels)
        assert not any(" " in name for name in builds)
        assert [pickle.loads(pickle.dumps(one)).args for one in builds.values()] == [(k,) for k in kernels]


def test_deterministic_gradients_have_kernels_of_their_own():
    plain, settled = set(ahead.every_kernel()), set(ahead.every_kernel(deterministic=True))
    assert {type(kernel) for kernel in plain ^ settled} == {BackwardKernel}
    assert all(kernel.deterministic for kernel in settled - plain)


def test_a_name_says_what_is_set():
    kernel = backward_kernel(Shape("FP16", 1, 1, 1, 64, 64, 64, 128, True, False))
    assert ahead.name_of(kernel).startswith("backward-fp16-dim64-dim_v128")
    assert "has_left" in ahead.name_of(kernel)
    assert "has_right" not in ahead.name_of(kernel)
