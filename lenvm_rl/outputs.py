"""What the forward of a length value model returns."""

from typing import NamedTuple

import torch


class LengthValueOutput(NamedTuple):
    """What a [`LengthValueModel`] says about a batch, in float32.

    A tuple, not a `ModelOutput`: that is a dictionary, and a field called `values` would hide its method, which tree
    utilities of torch (and so DDP and FSDP) call.

    Args:
        logits (`torch.FloatTensor` of shape `(B, S)`):
            The head's output z. Remaining length is read off it, never off the value: `n = -softplus(z) / ln(gamma)`.
        values (`torch.FloatTensor` of shape `(B, S)`):
            `-sigmoid(z)`, in (-1, 0): the value of the state that ends in the token at this position.
        past_key_values (`Cache`, *optional*):
            The decoder's cache, if `use_cache=True` was given.
        rope_deltas (`torch.LongTensor` of shape `(B, 1)`, *optional*):
            With pictures, in a decoder that places them on a grid: how far the next position is ahead of the number of
            tokens.
    """

    logits: torch.FloatTensor
    values: torch.FloatTensor
    past_key_values: object | None = None
    rope_deltas: torch.LongTensor | None = None
