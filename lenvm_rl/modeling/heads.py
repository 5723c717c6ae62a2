"""The heads of value models: small modules on a decoder's hidden states, float32 whatever the decoder is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Float32Module(nn.Module):
    """A module whose weights stay float32 when it, or a parent, is cast; to another device they follow."""

    def to_float32(self) -> Float32Module:
        """Cast whatever is of another dtype; weights without data (on the device "meta") are left."""
        return super()._apply(lambda weight: weight if weight.is_meta else weight.float())

    def _apply(self, fn, recurse=True):
        # `.to()`, `.half()`, `.bfloat16()` of any parent come through here: follow to the device, not to the dtype.
        def to_device_only(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(to_device_only, recurse)


class LengthValueHead(Float32Module):
    """`z = W2 SiLU(W1 h + b1) + b2` on the decoder's last hidden state h (arXiv 2604.27039, §3.1).

    Weights and arithmetic are float32 whatever the dtype of the decoder or of autocast, and stay so when the whole
    model is cast: with gamma near 1, one token more changes the logit by less than bfloat16 resolves.

    A new head says `z ≈ 0`, hence `V ≈ -1/2`, at every state. That is the middle of the range of the return and the
    steepest point of the sigmoid, so an error either way is corrected at the same speed. In tokens it is
    `ln 2 / -ln(gamma)`: 15 % of the length that gamma covers to 99 %. The last layer starts small (z spreads by about
    0.06 for hidden states of unit size) but not at zero, so that the decoder learns from the first step on.

    Args:
        hidden_size (`int`): size of the layer between.
        in_features (`int`, *optional*, defaults to `hidden_size`): size of h.
    """

    OUTPUT_SCALE = 0.1

    def __init__(self, hidden_size: int, in_features: int | None = None):
        super().__init__()
        self.hidden = nn.Linear(in_features or hidden_size, hidden_size, dtype=torch.float32)
        self.output = nn.Linear(hidden_size, 1, dtype=torch.float32)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw starting weights as described above."""
        nn.init.normal_(self.hidden.weight, std=1 / math.sqrt(self.hidden.in_features))
        nn.init.zeros_(self.hidden.bias)
        nn.init.normal_(self.output.weight, std=self.OUTPUT_SCALE / math.sqrt(self.output.in_features))
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states `(…, H)` of any floating dtype to logits `(…)` in float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.output(nn.functional.silu(self.hidden(hidden_states.float()))).squeeze(-1)


def check_layers(layers: Sequence[int] | None, num_layers: int) -> list[int] | None:
    """Layers of a decoder that a head reads, in order; a `ValueError` unless each is one of its hidden states.

    Args:
        layers (sequence of `int`, *optional*): 0 for the embeddings, k for what the k-th layer gives; from the end, -1
            is the last, which is what a head reads that is told nothing.
        num_layers (`int`): layers of the decoder.
    """
    if layers is None:
        return None
    known = [layer + num_layers + 1 if layer < 0 else layer for layer in layers]
    if not known or len(set(known)) < len(known) or not all(0 <= layer <= num_layers for layer in known):
        raise ValueError(
            f"layers must name hidden states of a decoder of {num_layers} layers, each once: 0 to {num_layers}, or -1 "
            f"for the last; got {list(layers)}."
        )
    return sorted(known)


def states_of_layers(hidden_states: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
    """Hidden states of several layers side by side, each scaled to a root mean square of one.

    Below a decoder's last norm hidden states grow from layer to layer, and a few of their numbers outgrow the others by
    far: unscaled, one layer would be all that a head sees.

    Args:
        hidden_states (sequence of `torch.Tensor`): as `output_hidden_states=True` gives them, each `(B, S, H)`.
        layers (sequence of `int`): which of them.

    Returns:
        `torch.Tensor`: `(B, S, len(layers) * H)`, in the dtype of the hidden states.
    """
    chosen = (hidden_states[layer].float() for layer in layers)
    return torch.cat([nn.functional.rms_norm(each, each.shape[-1:]) for each in chosen], dim=-1).to(
        hidden_states[0].dtype
    )


class ScoreHead(Float32Module):
    """`v = w h + b`, float32: the head of a reward model, whose score of a whole text is read at its last token."""

    def __init__(self, hidden_size: int, bias: bool):
        super().__init__()
        self.output = nn.Linear(hidden_size, 1, bias=bias, dtype=torch.float32)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states `(…, H)` of any floating dtype to values `(…)` in float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.output(hidden_states.float()).squeeze(-1)
