"""Run the real kernels without a GPU.

Triton's interpreter is switched on before Triton is first imported. It multiplies bfloat16 wrongly, so on a
CPU the tests use float16 and float32; with a GPU the same tests run compiled.
"""

import os

import pytest
import torch

WITHOUT_GPU = not torch.cuda.is_available()

if WITHOUT_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def _accept_one_element_arrays() -> None:
    """Let the interpreter turn its one-element arrays into Python ints, which NumPy 2.4 and later refuse
    implicitly."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: object = None) -> None:
        original(tensor, *([] if scope is None else [scope]))
        tensor.__index__ = lambda self: int(self.handle.data.item())  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patched


if WITHOUT_GPU:
    _accept_one_element_arrays()


@pytest.fixture(autouse=True)
def _poison(poisoned: None) -> None:
    """Every test here runs with poisoned memory."""
