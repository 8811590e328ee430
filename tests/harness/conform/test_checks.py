"""Every check passes a right implementation and turns red for one that is broken in the way it is there to see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnbench.harness.conform.case import Case
from attnbench.harness.conform.posed import Posed
from attnbench.harness.conform.verdict import Verdict
from attnbench.harness.contract import Capabilities, Device, Prepared
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem
from attnbench.impls.standard import Standard
from attnbench.impls.tiled import fa2

TINY = Problem(1, 2, 20, 8, kv_heads=1, seqlen_k=30, dtype="fp32", mask=Mask.causal(), direction="fwd_bwd")
Spoil = Callable[[torch.Tensor], torch.Tensor]


def case(check: str = "agrees", problem: Problem = TINY, **options: Any) -> Case:
    return Case(problem, "c", "a test", suite="s", check=check, options=options)


class Spoiled(torch.autograd.Function):
    """Right in the forward; each gradient goes through its own spoiler."""

    @staticmethod
    def forward(
        ctx: Any, spoilers: Any, out: torch.Tensor, q: Any, k: Any, v: Any, right: Any
    ) -> torch.Tensor:
        ctx.spoilers, ctx.right = spoilers, right
        ctx.save_for_backward(q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            grads = torch.autograd.grad(ctx.right(*leaves), leaves, dout)
        spoiled = (ctx.spoilers.get(name, lambda x: x)(grad) for name, grad in zip("qkv", grads, strict=True))
        return (None, None, *spoiled, None)


class Broken(Standard):
    """``standard``, with what it returns spoiled. gradients: by the name of the input."""

    def __init__(
        self, out: Spoil | None = None, lse: Spoil | None = None, gradients: dict[str, Spoil] | None = None
    ) -> None:
        self.out, self.lse, self.gradients = out, lse, gradients

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        right = super().prepare(problem, device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = right.attend(q, k, v)
            if self.gradients:
                out = Spoiled.apply(self.gradients, out.detach(), q, k, v, right.attend)
            return self.out(out) if self.out else out

        def attend_with_lse(q: Any, k: Any, v: Any) -> tuple[torch.Tensor, torch.Tensor]:
            assert right.attend_with_lse is not None
            out, lse = right.attend_with_lse(q, k, v)
            return out, self.lse(lse) if self.lse else lse

        return Prepared(attend, attend_with_lse)


def one_bad_element(x: torch.Tensor) -> torch.Tensor:
    spoil = torch.zeros_like(x)
    spoil[0, 11, 0, 3] = 0.01
    return x + spoil


def off(factor: float) -> Spoil:
    return lambda x: x * factor


@pytest.mark.parametrize("check", ["agrees", "one_gradient", "after_variants", "lse_gradient"])
@pytest.mark.parametrize("impl", [Broken(), fa2], ids=["standard", "tiled"])
def test_right_ones_pass(examine_on_cpu: Any, impl: Any, check: str) -> None:
    outcome = examine_on_cpu(impl, case(check))
    assert outcome.verdict is (Verdict.REFUSED if check == "lse_gradient" else Verdict.PASS), outcome


@pytest.mark.parametrize("impl", [Broken(), fa2], ids=["standard", "tiled"])
def test_right_gradients_are_the_slopes(examine_on_cpu: Any, impl: Any) -> None:
    problem = dataclasses.replace(TINY, dtype="fp64")
    assert examine_on_cpu(impl, case("finite_differences", problem)).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("impl", "seen"),
    [
        (Broken(out=one_bad_element), "out[0, 11, 0, 3]"),
        (Broken(out=off(1.001)), "out["),
        (Broken(gradients={"q": one_bad_element}), "dq[0, 11, 0, 3]"),
        (Broken(gradients={"k": off(1.01)}), "dk["),
        (Broken(gradients={"v": off(1.01)}), "dv["),
        (Broken(out=lambda out: out[:, :-1]), "out has shape"),
        (Broken(out=lambda out: out.double()), "out has dtype float64"),
        (Broken(out=lambda out: str(out.shape)), "it returned a str"),  # type: ignore[arg-type, return-value]
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_agrees_sees_the_first_bad_place(examine_on_cpu: Any, impl: Broken, seen: str) -> None:
    outcome = examine_on_cpu(impl, case())
    assert outcome.verdict is Verdict.FAIL
    assert seen in outcome.reason


@pytest.mark.parametrize(
    "lse", [off(1 / 0.693147), lambda lse: lse.masked_fill(lse == -torch.inf, torch.inf)]
)
def test_agrees_sees_an_lse_in_base_2_and_one_of_inf_where_nothing_is_seen(
    examine_on_cpu: Any, lse: Spoil
) -> None:
    more_queries = dataclasses.replace(TINY, seqlen_q=40, direction="fwd")
    assert examine_on_cpu(Broken(), case(problem=more_queries)).verdict is Verdict.PASS
    outcome = examine_on_cpu(Broken(lse=lse), case(problem=more_queries))
    assert (outcome.verdict, outcome.reason[:22]) == (Verdict.FAIL, "of the call with lse, ")


class WritesInputs(Broken):
    def prepare(self, problem: Problem, device: Device) -> Prepared:
        right = super().prepare(problem, device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = right.attend(q, k, v)
            with torch.no_grad():
                v.mul_(1.5)
            return out

        return Prepared(attend)


def test_agrees_sees_inputs_that_were_written(examine_on_cpu: Any) -> None:
    outcome = examine_on_cpu(WritesInputs(), case(problem=TINY.with_direction("fwd")))
    assert outcome.reason == "writes into its inputs (v)"


class Partly(Broken):
    """Leaves the last row of its output as memory was: NaN. What torch.empty finds may be right, an earlier answer."""

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        right = super().prepare(problem, device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            got = right.attend(q, k, v)
            out = torch.full(problem.out_shape, torch.nan)
            out[:, :-1] = got[:, :-1]
            return out

        return Prepared(attend)


def test_agrees_sees_a_row_that_was_never_written(examine_on_cpu: Any) -> None:
    assert examine_on_cpu(Partly(), case(problem=TINY.with_direction("fwd"))).verdict is Verdict.FAIL


def test_finite_differences_see_a_gradient_that_is_not_the_forwards(examine_on_cpu: Any) -> None:
    problem = dataclasses.replace(TINY, dtype="fp64")
    for name in "qkv":
        outcome = examine_on_cpu(Broken(gradients={name: off(1 + 1e-5)}), case("finite_differences", problem))
        assert outcome.verdict is Verdict.FAIL
        assert outcome.facts["tensor"] == f"d{name}"


class OneAtATime(Broken):
    """Forgets the keys' gradient unless the queries need one as well."""

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        right = super().prepare(problem, device)
        return Prepared(lambda q, k, v: right.attend(q, k if q.requires_grad else k.detach(), v))


def test_one_gradient_sees_one_that_is_forgotten(examine_on_cpu: Any) -> None:
    assert examine_on_cpu(OneAtATime(), case()).verdict is Verdict.PASS
    outcome = examine_on_cpu(OneAtATime(), case("one_gradient"))
    assert outcome.verdict is Verdict.FAIL or "does not require grad" in outcome.reason


class Caching(Standard):
    """Keeps what it prepared for a shape, whatever the scale."""

    def __init__(self) -> None:
        self.kept: dict[str, Prepared] = {}

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        key = dataclasses.replace(problem, scale=None).key
        return self.kept.setdefault(key, super().prepare(problem, device))


def test_after_variants_sees_a_cache_key_without_the_scale(examine_on_cpu: Any) -> None:
    assert examine_on_cpu(Caching(), case()).verdict is Verdict.PASS
    assert examine_on_cpu(Caching(), case("after_variants")).verdict is Verdict.FAIL


class DifferentiableLse(Broken):
    """Returns an lse of the dense scores, differentiable; ``share`` of its gradient reaches q and k."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        right = super().prepare(problem, device)
        hidden = ~problem.mask.dense(
            torch.arange(problem.seqlen_q), problem.heads, problem.seqlen_q, problem.seqlen_k
        )

        def attend_with_lse(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            shared = k.repeat_interleave(problem.heads // problem.kv_heads, dim=2)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, shared) * problem.softmax_scale
            lse = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
            return right.attend(q, k, v), lse * self.share + lse.detach() * (1 - self.share)

        return Prepared(right.attend, attend_with_lse)


@pytest.mark.parametrize(
    ("share", "verdict"), [(1.0, Verdict.PASS), (0.99, Verdict.FAIL), (0.0, Verdict.FAIL)]
)
def test_lse_gradient_sees_one_that_is_left_out(examine_on_cpu: Any, share: float, verdict: Verdict) -> None:
    assert examine_on_cpu(DifferentiableLse(share), case("lse_gradient")).verdict is verdict


@torch.library.custom_op("attnbench_tests::times_itself", mutates_args=())
def times_itself(x: torch.Tensor) -> torch.Tensor:
    """Without a gradient formula: to be called where gradients are no matter."""
    return x * x


@times_itself.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("attnbench_tests::ignores_its_fake", mutates_args=())
def ignores_its_fake(x: torch.Tensor) -> torch.Tensor:
    return x * x


@ignores_its_fake.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[::-1]).mT


class Calls(torch.autograd.Function):
    """The identity; an operator is called in the forward and in the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, operator: Any) -> torch.Tensor:
        ctx.operator = operator
        operator(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        ctx.operator(dout)
        return dout, None


def calling(operator: Callable[[torch.Tensor], torch.Tensor]) -> Broken:
    return Broken(out=lambda out: Calls.apply(out, operator))


def test_opcheck_asks_no_gradient_of_an_operator_that_is_called_below_autograd(examine_on_cpu: Any) -> None:
    outcome = examine_on_cpu(calling(times_itself), case("opcheck"))
    assert outcome.verdict is Verdict.PASS, outcome.reason
    outcome = examine_on_cpu(calling(ignores_its_fake), case("opcheck"))
    assert outcome.verdict is Verdict.FAIL
    assert outcome.facts["operator"] == "attnbench_tests.ignores_its_fake.default"


class EagerFlex(Broken):
    """FlexAttention as it is without torch.compile: a higher-order operator, compiled for dynamo's eager backend."""

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        from torch.nn.attention.flex_attention import flex_attention

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            bhsd = (x.transpose(1, 2) for x in (q, k, v))
            return flex_attention(*bhsd, scale=problem.softmax_scale).transpose(1, 2)  # type: ignore[union-attr]

        return Prepared(attend)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_opcheck_lets_higher_order_operators_through_and_leaves_the_compiler_as_it_was(
    examine_on_cpu: Any,
) -> None:
    problem = Problem(1, 2, 20, 16, dtype="fp32")
    outcome = examine_on_cpu(EagerFlex(), case("opcheck", problem))
    assert (outcome.verdict, outcome.reason) == (Verdict.REFUSED, "registers no operator of its own")
    outcome = examine_on_cpu(EagerFlex(), case(problem=problem))
    assert outcome.verdict is Verdict.PASS, outcome.reason


# ---- what is declared unsupported ----------------------------------------------------------------------------


class Declines(Broken):
    """Declares no mask but full; ``act`` is what it does when asked for another all the same."""

    capabilities = Capabilities(devices=("cpu",), dtypes=("fp32",), masks=("full",), head_dim_multiple=1)

    def __init__(self, act: Callable[[Prepared], Prepared]) -> None:
        super().__init__()
        self.act = act

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        return self.act(super().prepare(problem, device))


def _raise(error: Exception) -> Callable[[Prepared], Prepared]:
    def act(_: Prepared) -> Prepared:
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "verdict", "said"),
    [
        (_raise(NotImplementedError("no causal mask")), Verdict.REFUSED, "mask causal not in full"),
        (lambda right: right, Verdict.REFUSED, "mask causal not in full"),
        (
            _raise(AttributeError("'NoneType' object has no attribute 'size'")),
            Verdict.FAIL,
            "with an unclear error",
        ),
        (_raise(RuntimeError("")), Verdict.FAIL, "with an unclear error: RuntimeError: (no message)"),
        (
            lambda right: Prepared(lambda q, k, v: right.attend(q, k, v) * 1.1),
            Verdict.FAIL,
            "yet answers: out[0, 0, 0, 0] is",
        ),
        (lambda right: Prepared(lambda *_: 3), Verdict.FAIL, "yet answers: it returned a int"),  # type: ignore[arg-type, return-value]
    ],
    ids=["raises", "is right", "slips", "says nothing", "is wrong", "is no tensor"],
)
def test_what_is_declared_unsupported_may_raise_or_be_right(
    examine_on_cpu: Any, act: Any, verdict: Verdict, said: str
) -> None:
    outcome = examine_on_cpu(Declines(act), case())
    assert outcome.verdict is verdict
    assert said in outcome.reason


def test_what_is_declared_supported_may_not_raise(examine_on_cpu: Any) -> None:
    full = dataclasses.replace(TINY, mask=Mask.full())
    outcome = examine_on_cpu(Declines(_raise(NotImplementedError("not today"))), case(problem=full))
    assert (outcome.verdict, outcome.reason) == (Verdict.ERROR, "NotImplementedError: not today")


class LosesTheDevice(Broken):
    """Raises what a check takes for a refusal, and leaves the device in an error that stays."""

    lost = False

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.lost = True
            raise RuntimeError("no second derivatives")

        return Prepared(attend)


def test_a_device_that_is_lost_is_the_fault_of_the_case_that_lost_it(
    examine_on_cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert examine_on_cpu(LosesTheDevice(), case("double_backward")).verdict is Verdict.PASS

    def synchronize(posed: Posed) -> None:
        if posed.implementation.lost:  # type: ignore[attr-defined]
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Posed, "synchronize", synchronize)
    outcome = examine_on_cpu(LosesTheDevice(), case("double_backward"))
    assert outcome.verdict is Verdict.ERROR
    assert "illegal memory access" in outcome.reason


class Aligned(Broken):
    """Takes only tensors that start where an allocation does."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def prepare(self, problem: Problem, device: Device) -> Prepared:
        right = super().prepare(problem, device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if q.storage_offset():
                raise self.error
            return right.attend(q, k, v)

        return Prepared(attend)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [(RuntimeError("q is not correctly aligned"), Verdict.REFUSED), (IndexError("7"), Verdict.ERROR)],
)
def test_where_a_tensor_starts_may_be_refused_with_a_clear_word(
    examine_on_cpu: Any, error: Exception, verdict: Verdict
) -> None:
    assert examine_on_cpu(Broken(), case(offset=1)).verdict is Verdict.PASS
    assert examine_on_cpu(Aligned(error), case()).verdict is Verdict.PASS
    assert examine_on_cpu(Aligned(error), case(offset=1)).verdict is verdict
