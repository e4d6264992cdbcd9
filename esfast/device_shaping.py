"""Rewards to fitness where the rewards already lie on a CUDA device; nothing is copied back.

The formulas and the bits are those of `esfast.shaping`. Rewards are not looked at, which would wait
for the device: NaN and infinity are the caller's to keep out. Not yet run on a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from esfast.device_table import driver
from esfast.errors import DataError, require_one_of
from esfast.shaping import METHODS

_NUMBERS = {"rank": 0, "z_score": 1, "centered_rank": 2, "raw": 3, "group_centered": 4}
assert set(_NUMBERS) == set(METHODS)


@cache
def _prepared(kernels: Any, device: int) -> None:
    kernels.prepare(device)  # or the first call would load the kernels, which a capture forbids


def shape_on_device(rewards: torch.Tensor, method: str = "rank") -> torch.Tensor:
    """Fitness of each member, float64 [population], on the rewards' device and its current stream.

    rewards: float64 [population], or [population, prompts] for "group_centered". Errors:
    ConfigError for an unknown method, DataError for another shape, dtype or device.
    """
    require_one_of("shaping", method, METHODS)
    dimensions = 2 if method == "group_centered" else 1
    kernels = driver()
    fits = rewards.ndim == dimensions and rewards.numel() > 0 and rewards.dtype is torch.float64
    if kernels is None or rewards.device.type != "cuda" or not fits:
        raise DataError(
            f"{method} got {rewards.dtype} rewards of shape {tuple(rewards.shape)} on "
            f"{rewards.device}; on a device it takes float64 on CUDA with {dimensions} dimensions. "
            "Elsewhere use esfast.shaping."
        )
    _prepared(kernels, rewards.device.index or 0)
    values = rewards.contiguous()
    population, prompts = values.shape[0], values.shape[1] if dimensions == 2 else 1
    room = kernels.shape_doubles(population, prompts)
    workspace = torch.empty(room, dtype=torch.float64, device=values.device)
    fitness = torch.empty(population, dtype=torch.float64, device=values.device)
    stream = torch.cuda.current_stream(values.device).cuda_stream
    pointers = (workspace.data_ptr(), fitness.data_ptr())
    place = (values.device.index or 0, stream, values.data_ptr(), population, prompts)
    kernels.shape(_NUMBERS[method], *place, *pointers)
    return fitness
