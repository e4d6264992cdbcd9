"""Products of 16-bit matrices on a CPU without instructions for them.

There torch multiplies bfloat16 without AVX-512, and float16 without AVX512-FP16, in loops of its
own: a member's evaluation takes about half of the time with the factors widened to float32 for each
product (docs/engines.md has figures). A widened product is summed in float32 and rounded once, as
oneDNN does it. A linear layer's weights are widened a part at a time, so that the output matrix of
a large vocabulary (152,000 x 4096: 2.5 GB in float32) takes 64 MB. Not promised: the bits of either
way. The same processor gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

PRODUCTS = frozenset({
    linear, scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul,
    torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm, torch.addmm,
    torch.baddbmm,
})  # fmt: skip
WIDENED_AT_ONCE = 1 << 24  # weights of a linear layer: 64 MB in float32
# What tells whether oneDNN multiplies a dtype here; the same at every call of a process.
TOLD_BY = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


def wide_products(model: torch.nn.Module) -> AbstractContextManager[object]:
    """While it lasts, products of the model's dtypes that this CPU lacks are computed in float32.

    Does nothing for a model on another device, or one whose dtypes the processor multiplies.
    """
    missing = _missing(model)
    return WideProducts(missing) if missing else nullcontext()


def told_products(model: object) -> list[str]:
    """A line for each dtype of a torch model that is widened."""
    missing = _missing(model) if isinstance(model, torch.nn.Module) else ()
    return [
        f"this processor has no instructions for products of {str(dtype).removeprefix('torch.')}: "
        "they are computed in float32; --dtype float32 takes less time and twice the memory"
        for dtype in missing
    ]


def _missing(model: torch.nn.Module) -> frozenset[torch.dtype]:
    on_cpu = {p.dtype for p in model.parameters() if p.device.type == "cpu"}
    return frozenset(dtype for dtype in on_cpu if not multiplies(dtype))


def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has fast products of `dtype` on this CPU; True where it cannot tell."""
    tells = getattr(torch.ops.mkldnn, TOLD_BY.get(dtype, ""), None)
    return tells is None or bool(tells())


class WideProducts(TorchFunctionMode):
    """Widens the factors of products in one of `dtypes` to float32, and rounds what comes out."""

    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        super().__init__()
        self._dtypes = dtypes

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        dtype = getattr(args[0], "dtype", None) if func in PRODUCTS and args else None
        if dtype not in self._dtypes or args[0].device.type != "cpu" or "out" in given:
            return func(*args, **given)
        in_parts = func is linear and _is_large(*args, **given)
        return _linear_in_parts(*args, **given) if in_parts else _wide(func, *args, **given)


def _wide(func: Callable[..., torch.Tensor], *args: Any, **given: Any) -> torch.Tensor:
    dtype = args[0].dtype

    def widened(value: Any) -> Any:
        narrow = isinstance(value, torch.Tensor) and value.dtype == dtype
        return value.float() if narrow else value

    wide = {name: widened(value) for name, value in given.items()}
    return func(*map(widened, args), **wide).to(dtype)


def _is_large(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return weight.dim() == 2 and weight.numel() > WIDENED_AT_ONCE


def _linear_in_parts(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Some rows of the weight, which are features of the result, at a time."""
    rows = max(1, WIDENED_AT_ONCE // weight.shape[1])
    outs = []
    for start in range(0, len(weight), rows):
        here = slice(start, start + rows)
        outs.append(_wide(linear, input, weight[here], None if bias is None else bias[here]))
    return torch.cat(outs, -1)
