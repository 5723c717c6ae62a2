"""How exactly a device can add up: asked wherever sums run over many tokens."""

from __future__ import annotations

import torch


def wide_dtype(device: torch.device | str) -> torch.dtype:
    """The widest floating-point dtype of a device: float64, and float32 on Apple's MPS, which has no other."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
