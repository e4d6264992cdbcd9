"""Products of 16-bit matrices where the processor has no instructions for them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import byte_tokenizer, gpt2, llama
from torch.utils._python_dispatch import TorchDispatchMode

from esfast import cli
from esfast.engines import Sampling, products
from esfast.engines.products import WideProducts, multiplies, told_products, wide_products
from esfast.engines.transformers import TransformersEngine

NARROW = (torch.bfloat16, torch.float16)
X, W = (torch.randn(shape, generator=torch.manual_seed(0)) for shape in ((2, 5, 64), (2, 64, 7)))
BIAS = torch.linspace(-1, 1, 7)
CASES: dict[str, Callable[[Any], torch.Tensor]] = {
    "linear": lambda of: F.linear(of(X), of(W[0].T), of(BIAS)),
    "linear by name": lambda of: F.linear(of(X), weight=of(W[0].T), bias=of(BIAS)),
    "matmul": lambda of: torch.matmul(of(X), of(W)),
    "@": lambda of: of(X) @ of(W),
    "mm": lambda of: of(X)[0].mm(of(W)[0]),
    "bmm": lambda of: torch.bmm(of(X), of(W)),
    "addmm": lambda of: torch.addmm(of(BIAS), of(X)[0], of(W)[0]),
    "attention": lambda of: F.scaled_dot_product_attention(of(X), of(X), of(X)),
}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("product", CASES.values(), ids=CASES)
def test_a_product_is_summed_in_float32_and_rounded_once(
    product: Callable[[Any], torch.Tensor], dtype: torch.dtype
) -> None:
    want = product(lambda x: x.to(dtype).float()).to(dtype)
    with WideProducts(frozenset(NARROW)):
        got = product(lambda x: x.to(dtype))
    assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("bias", [None, BIAS])
def test_a_large_weight_is_widened_by_parts(
    bias: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = (torch.arange(-k, n - k) % 7 for k, n in ((0, 2 * 5 * 64), (3, 7 * 64)))
    x, weight = x.reshape(2, 5, 64).half(), weight.reshape(7, 64).half()
    given = {"bias": None if bias is None else (4 * bias).round().half()}
    want = F.linear(x.double(), weight.double(), None if bias is None else given["bias"].double())
    sizes = []
    widen = products._wide
    monkeypatch.setattr(products, "WIDENED_AT_ONCE", 3 * 64 + 1)
    monkeypatch.setattr(
        products, "_wide", lambda func, *args: sizes.append(len(args[1])) or widen(func, *args)
    )
    with WideProducts(frozenset(NARROW)):
        got = F.linear(x, weight, **given)
    assert sizes == [3, 3, 1]
    assert got.dtype == torch.float16 and torch.equal(got, want.half())


def test_other_dtypes_and_functions_are_left_alone() -> None:
    x = torch.full((2, 2), 3, dtype=torch.bfloat16)
    want = torch.add(x, x), torch.full_like(x.double(), 3) @ x.double(), x.half() @ x.half()
    out = torch.empty_like(x)
    with WideProducts(frozenset([torch.bfloat16])):
        got = torch.add(x, x), torch.full_like(x.double(), 3) @ x.double(), x.half() @ x.half()
        torch.mm(x, x, out=out)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))
    assert torch.equal(out, torch.full_like(x, 18))


class Multiplied(TorchDispatchMode):
    """Notes the dtypes of the matrices that are multiplied in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("mm", "linear", "matmul", "attention")):
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", [llama, gpt2])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_the_engine_widens_what_the_processor_lacks(
    model: Callable[[], Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "multiplies", lambda dtype: dtype not in NARROW)
    engine = TransformersEngine(model().to(dtype).eval(), byte_tokenizer())
    with Multiplied() as multiplied:
        first, again = (engine.generate(["What?", "And 1 + 1?"], Sampling(5)) for _ in range(2))
    assert multiplied.dtypes == {torch.float32}
    assert first == again


def test_a_model_of_dtypes_that_are_there_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies", lambda dtype: dtype != torch.float16)
    for model in (llama().bfloat16(), llama(), llama().half().to("meta")):
        assert not isinstance(wide_products(model), WideProducts)
        assert told_products(model) == []
    assert isinstance(wide_products(llama().half()), WideProducts)
    assert told_products("a name of vLLM's") == []


def test_a_run_says_that_its_products_are_widened(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(products, "multiplies", lambda dtype: dtype != torch.float16)
    line = "train --task arithmetic --population-size 2 --prompts 1 --generations 1 --no-plots"
    sizes = "--eval-size 2 --eval-every 1 --max-new-tokens 1"
    said = []
    for dtype in ("float16", "float32"):
        where = ["--model", str(tiny_model), "--output", str(tmp_path / dtype), "--dtype", dtype]
        assert cli.main([*line.split(), *sizes.split(), *where]) == 0
        said.append("".join(capfd.readouterr()))
    assert "no instructions for products of float16" in said[0] and "--dtype float32" in said[0]
    assert "no instructions" not in said[1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN is told to be an older x86")
def test_what_the_processor_multiplies_is_as_onednn_says() -> None:
    assert all(map(multiplies, (torch.float32, torch.float64, torch.int8)))
    code = (
        "import torch; from esfast.engines.products import multiplies\n"
        "print(multiplies(torch.bfloat16), multiplies(torch.float16), multiplies(torch.float32))"
    )
    told = {**os.environ, "ONEDNN_MAX_CPU_ISA": "SSE41"}
    done = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False", "True"], done.stderr


def test_a_torch_that_cannot_tell_multiplies_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "TOLD_BY", dict.fromkeys(NARROW, "_no_such_question"))
    assert all(map(multiplies, NARROW))
