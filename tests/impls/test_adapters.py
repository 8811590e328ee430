"""What holds for every adapter without its library: imports, availability, limits, and how a mask is passed on."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest
import torch

from attnbench.harness.contract import (
    CONTRACT_VERSION,
    Capabilities,
    Device,
    Implementation,
    Unavailable,
    Unsupported,
)
from attnbench.harness.masks import Mask
from attnbench.harness.problem import Problem
from attnbench.impls import flash_attn, xformers_fmha

ADAPTERS = {
    "standard": "standard:Standard",
    "tiled-fa1": "tiled:fa1",
    "tiled-fa2": "tiled:fa2",
    "sdpa-math": "sdpa:math",
    "sdpa-flash": "sdpa:flash",
    "sdpa-efficient": "sdpa:efficient",
    "sdpa-cudnn": "sdpa:cudnn",
    "flex": "flex:Flex",
    "xformers-cutlass": "xformers_fmha:cutlass",
    "xformers-flash2": "xformers_fmha:flash2",
    "xformers-flash3": "xformers_fmha:flash3",
    "xformers-splitk": "xformers_fmha:splitk",
    "flash-attn-2": "flash_attn:FlashAttention2",
    "flash-attn-3": "flash_attn:FlashAttention3",
    "flash-attn-4": "flash_attn:FlashAttention4",
}
CPU = Device("cpu")
HOPPER = Device("cuda", name="NVIDIA H200", capability=(9, 0))


def load(name: str) -> Implementation:
    module, attribute = ADAPTERS[name].split(":")
    found = getattr(importlib.import_module(f"attnbench.impls.{module}"), attribute)
    return found() if isinstance(found, type) else found


every_adapter = pytest.mark.parametrize("name", ADAPTERS)


def test_importing_the_adapters_imports_nothing_heavy() -> None:
    modules = sorted({f"attnbench.impls.{spec.split(':')[0]}" for spec in ADAPTERS.values()})
    script = (
        f"import sys, importlib\nfor m in {modules}: importlib.import_module(m)\n"
        "print([m for m in ('torch', 'numpy', 'xformers', 'flash_attn') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["flex", "flash-attn-2", "flash-attn-4", "xformers-cutlass", "sdpa-flash"])
def test_what_the_library_would_answer_wrongly_is_refused_before_it_is_called(name: str) -> None:
    shifted = Mask.causal("top_left") if name.startswith("flash-attn") else Mask.causal()
    problem = Problem(1, 2, 9, 12, seqlen_k=4, mask=shifted, dtype="fp64")
    with pytest.raises(Unsupported, match=r"alignment|fp64|nothing to attend to"):
        load(name).prepare(problem, HOPPER)


@pytest.fixture
def any_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in libraries compute on a CPU and in fp32, which the real ones do not declare."""
    monkeypatch.setattr(Implementation, "require", lambda *_: None)


def install(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Makes the adapters find these modules and no others."""

    def missing_module(module: str, fix: str) -> Unavailable | None:
        return None if module in modules else Unavailable(f"module {module} is not installed", fix)

    for adapter in (flash_attn, xformers_fmha):
        monkeypatch.setattr(adapter, "missing_module", missing_module)


@every_adapter
def test_declarations(name: str) -> None:
    impl = load(name)
    assert impl.name == name
    assert impl.contract == CONTRACT_VERSION
    assert isinstance(impl.capabilities, Capabilities)
    assert impl.summary
    assert "\n" not in impl.summary
    assert isinstance(impl.version(), str)


@every_adapter
@pytest.mark.parametrize("device", [CPU, HOPPER], ids=str)
def test_unavailable_says_why_in_one_line(name: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    impl = load(name)
    found = impl.unavailable(device)
    needs_nothing = impl.package in ("", "torch")
    expected = not needs_nothing or device.kind not in impl.capabilities.devices
    assert (found is not None) is expected
    if found:
        assert found.reason
        assert found.fix
        assert "\n" not in found.reason + found.fix


@pytest.mark.parametrize(
    ("name", "modules", "reason"),
    [
        ("xformers-cutlass", ["xformers"], None),
        ("xformers-cutlass", ["xformers", "flash_attn"], "beside FlashAttention-4"),
        ("xformers-cutlass", ["xformers", "flash_attn", "flash_attn.flash_attn_interface"], None),
        ("xformers-flash3", ["xformers"], "carries no FlashAttention-3"),
        ("xformers-flash3", ["xformers", "xformers.flash_attn_3._C"], None),
        ("flash-attn-3", ["fa3_fwd_interface"], None),
        ("flash-attn-4", ["flash_attn.cute"], "module cutlass"),
        ("flash-attn-4", ["flash_attn.cute", "cutlass"], None),
    ],
)
def test_availability_follows_what_is_installed(
    name: str, modules: list[str], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, *modules)
    found = load(name).unavailable(HOPPER)
    assert found is None if reason is None else reason in found.reason


def test_a_full_flash_attention_3_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn_interface", "fa3_fwd_interface")
    full = load("flash-attn-3")
    assert (full.package, full.capabilities.backward) == ("flash-attn-3", True)
    install(monkeypatch, "fa3_fwd_interface")
    forward_only = load("flash-attn-3")
    assert (forward_only.package, forward_only.capabilities.backward) == ("fa3-fwd", False)


@every_adapter
def test_the_common_case_is_supported_on_hopper(name: str) -> None:
    problem = Problem(4, 16, 4096, 128, mask=Mask.causal())
    expected = ["causal takes at most 16 queries and no more than keys"] if name == "xformers-splitk" else []
    assert load(name).unsupported_reasons(problem, HOPPER) == expected


def reasons(name: str, device: Device = HOPPER, **changes: object) -> str:
    shape: dict[str, object] = {"batch": 2, "heads": 8, "seqlen_q": 64, "head_dim": 64, **changes}
    return "; ".join(load(name).unsupported_reasons(Problem(**shape), device))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "changes", "fragment"),
    [
        ("sdpa-flash", {"mask": Mask.window(8, 0)}, "mask window"),
        ("sdpa-flash", {"mask": Mask.causal("top_left"), "seqlen_k": 80}, "alignment top_left"),
        ("sdpa-flash", {"mask": Mask.causal(), "seqlen_k": 32}, "nothing to attend to"),
        ("sdpa-flash", {"strides": (("v", (8192, 1, 64, 128)),)}, "last dimension of v"),
        ("sdpa-efficient", {"mask": Mask.parse("blocks(random,32x32,density=0)")}, "nothing to attend to"),
        ("sdpa-efficient", {"kv_heads": 2}, "GQA"),
        ("sdpa-cudnn", {"mask": Mask.causal(), "seqlen_k": 80}, "alignment bottom_right"),
        ("sdpa-cudnn", {"seqlen_k": 1}, "sequence length 1"),
        ("flex", {"head_dim": 8}, "below FlexAttention's 16"),
        ("flex", {"batch": 0}, "batch 0"),
        ("xformers-cutlass", {"mask": Mask.causal(), "seqlen_k": 32}, "nothing to attend to"),
        ("xformers-flash2", {"kv_heads": 2, "direction": "bwd"}, "no backward"),
        ("xformers-flash3", {"head_dim": 32, "direction": "bwd"}, "below 64"),
        ("xformers-splitk", {"head_dim": 96}, "head_dim 96"),
        ("xformers-splitk", {"direction": "bwd"}, "no backward"),
        ("flash-attn-2", {"mask": Mask.causal("top_left"), "seqlen_k": 80}, "alignment top_left"),
        ("flash-attn-3", {"head_dim": 64, "head_dim_v": 128}, "differs from head_dim"),
        ("flash-attn-4", {"batch": 0}, "batch 0"),
    ],
)
def test_refusals(name: str, changes: dict[str, object], fragment: str) -> None:
    assert fragment in reasons(name, **changes)


def test_sdpa_on_the_cpu_refuses_only_gradients_that_it_rounds() -> None:
    assert reasons("sdpa-flash", CPU, dtype="bf16", mask=Mask.window(3, 0)) == ""
    assert reasons("sdpa-flash", CPU, dtype="fp32", direction="bwd") == ""
    assert "sums dk and dv in bf16" in reasons("sdpa-flash", CPU, dtype="bf16", direction="bwd")


MASKS = [
    "causal",
    "causal@top_left",
    "window(9,2)",
    "window(inf,4)@top_left",
    "window(5,inf)&blocks(random,16x8,density=0.4,per_head=1)",
]


@pytest.mark.parametrize("mask", MASKS)
def test_flex_mask_mod_is_the_mask(mask: str) -> None:
    from attnbench.impls.flex import mask_mod

    problem = Problem(1, 3, 40, 16, seqlen_k=55, mask=Mask.parse(mask))
    rows, keys = torch.arange(40), torch.arange(55)
    visible = problem.mask.dense(rows, 3, 40, 55).expand(3, -1, -1)
    seen = mask_mod(problem, "cpu")
    b, h, i, j = torch.tensor(0), torch.arange(3)[:, None, None], rows[:, None], keys
    assert torch.equal(seen(b, h, i, j).expand(3, -1, -1), visible)


@pytest.mark.usefixtures("any_problem")
@pytest.mark.filterwarnings("ignore")  # eager FlexAttention warns that it is a debugging aid
@pytest.mark.parametrize("mask", ["full", *MASKS[:3]])
def test_flex_passes_on_mask_scale_and_groups(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    problem = Problem(1, 4, 130, 16, kv_heads=2, seqlen_k=200, dtype="fp32", mask=Mask.parse(mask), scale=0.5)
    q, k, v = (torch.randn(shape) for shape in (problem.q_shape, problem.k_shape, problem.v_shape))
    out = load("flex").prepare(problem, CPU).attend(q, k, v)
    visible = problem.mask.dense(torch.arange(130), 4, 130, 200)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=visible, scale=0.5, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def fmha(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """xformers' module, with plain torch where its dispatcher would ask for a GPU."""
    library = pytest.importorskip("xformers.ops.fmha", exc_type=ImportError)

    def plain(q, k, v, *, attn_bias, p, scale, op):
        """BMHK or BMGHK as documented by xformers, with the bias materialised."""
        assert p == 0
        scores = torch.einsum("bm...k,bn...k->b...mn", q, k) * scale
        if attn_bias is not None:
            shape = (scores.shape[-2], scores.shape[-1])
            scores = scores + attn_bias.materialize(shape, dtype=scores.dtype)
        return torch.einsum("b...mn,bn...k->bm...k", scores.softmax(-1), v)

    monkeypatch.setattr(library, "memory_efficient_attention", plain)
    return library


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    ("name", "rows", "mask"),
    [
        ("xformers-cutlass", 9, "full"),
        ("xformers-cutlass", 9, "causal"),
        ("xformers-cutlass", 9, "causal@top_left"),
        ("xformers-flash2", 9, "window(4,2)"),
        ("xformers-flash3", 9, "window(inf,2)"),
        ("xformers-flash3", 20, "window(3,inf)"),
        ("xformers-splitk", 9, "full"),
        ("xformers-splitk", 9, "causal"),
        ("xformers-splitk", 1, "causal"),
    ],
)
@pytest.mark.usefixtures("any_problem")
def test_xformers_passes_on_mask_scale_and_groups(
    fmha, name: str, rows: int, mask: str, kv_heads: int
) -> None:
    problem = Problem(
        3, 4, rows, 16, kv_heads=kv_heads, seqlen_k=20, dtype="fp32", mask=Mask.parse(mask), scale=0.5
    )
    q, k, v = (torch.randn(shape) for shape in (problem.q_shape, problem.k_shape, problem.v_shape))
    out = load(name).prepare(problem, CPU).attend(q, k, v)
    visible = problem.mask.dense(torch.arange(rows), 4, rows, 20)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=visible, scale=0.5, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in ADAPTERS if n.startswith("xformers")])
def test_xformers_limits_are_the_operators(fmha, name: str) -> None:
    impl = load(name)
    assert isinstance(impl, xformers_fmha.XformersOperator)
    operators = importlib.import_module(f"xformers.ops.fmha.{impl.module}")
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    assert {names[dtype] for dtype in impl.capabilities.dtypes} <= operators.FwOp.SUPPORTED_DTYPES
    assert impl.capabilities.max_head_dim == operators.FwOp.SUPPORTED_MAX_K
    assert hasattr(operators, "BwOp") is impl.capabilities.backward
    for rows in (16, 20):
        for mask in (Mask.causal(), Mask.causal("top_left"), Mask.window(3, 1)):
            problem = Problem(1, 1, rows, 64, seqlen_k=20, mask=mask)
            if not impl.unsupported_reasons(problem, HOPPER):
                bias = impl._bias(problem, CPU)
                for operator in (operators.FwOp, operators.BwOp if impl.capabilities.backward else None):
                    assert operator is None or type(bias) in operator.SUPPORTED_ATTN_BIAS_TYPES


@pytest.mark.parametrize(
    ("name", "module", "window", "lse_option"),
    [
        ("flash-attn-2", "flash_attn.flash_attn_interface", (7, -1), "return_attn_probs"),
        ("flash-attn-3", "fa3_fwd_interface", (7, -1), "return_attn_probs"),
        ("flash-attn-4", "flash_attn.cute", (7, None), "return_lse"),
    ],
)
@pytest.mark.usefixtures("any_problem")
def test_flash_attn_arguments(
    name: str, module: str, window: tuple[object, object], lse_option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def flash_attn_func(q, k, v, **options):
        calls.append(options)
        return (q, "lse") if options.get(lse_option) else q

    library = types.ModuleType(module)
    library.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    for parent in module.split(".")[:-1]:
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, module, library)
    causal = load(name).prepare(Problem(1, 1, 8, 64, mask=Mask.causal(), scale=0.25), HOPPER)
    assert causal.attend("q", "k", "v") == "q"  # type: ignore[arg-type]
    assert causal.attend_with_lse("q", "k", "v") == ("q", "lse")  # type: ignore[arg-type, misc]
    window_of = load(name).prepare(Problem(1, 1, 8, 64, mask=Mask.window(7, None)), HOPPER)
    window_of.attend("q", "k", "v")  # type: ignore[arg-type]
    plain = {"softmax_scale": 0.25, "causal": True}
    assert calls[:2] == [plain, {**plain, lse_option: True}]
    assert calls[2] == {"softmax_scale": 0.125, "causal": False, "window_size": window}


@pytest.mark.usefixtures("any_problem")
def test_flash_attention_2_keeps_its_infinite_lse_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    sys.modules["flash_attn.flash_attn_interface"].flash_attn_func = print  # type: ignore[attr-defined]
    shape = {"batch": 1, "heads": 1, "seqlen_q": 8, "head_dim": 64, "mask": Mask.causal()}
    assert load("flash-attn-2").prepare(Problem(**shape, seqlen_k=8), HOPPER).attend_with_lse
    assert load("flash-attn-2").prepare(Problem(**shape, seqlen_k=4), HOPPER).attend_with_lse is None
