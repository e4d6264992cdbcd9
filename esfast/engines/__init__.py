"""Engines: what generates text under the live weights. `base` states the contract."""

from __future__ import annotations

from esfast.engines.base import Completion, Engine, Message, Prompt, Sampling

__all__ = ["Completion", "Engine", "Message", "Prompt", "Sampling"]
