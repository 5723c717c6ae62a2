"""The models that the scaling study compares, and what the ablations change in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from torch.nn.functional import linear, silu
from transformers.trainer_pt_utils import LengthGroupedSampler

from lenvm_rl.modeling.value_model import LengthValueHead
from lenvm_rl.pretraining.trainer import LengthValueTrainer, completion_lengths


@dataclass(frozen=True)
class Cell:
    """One model of the study.

    Args:
        prompts (`int`): training prompts.
        samples (`int`): completions of each.
        seed (`int`): seed of weights and order, and of which prompts and completions are used.
        hidden_size (`int`, *optional*): width of a decoder of its own; the policy's decoder when omitted.
        horizon (`float`, *optional*, defaults to `1.0`): multiple of the fitted horizon of gamma.
        grouped (`bool`, *optional*, defaults to `False`): whether optimiser steps are made of similar lengths.
        rounded_head (`bool`, *optional*, defaults to `False`): whether the head computes in bfloat16.
    """

    prompts: int
    samples: int
    seed: int
    hidden_size: int | None = None
    horizon: float = 1.0
    grouped: bool = False
    rounded_head: bool = False

    @property
    def name(self) -> str:
        """Name of the file of its result."""
        backbone = "policy" if self.hidden_size is None else f"h{self.hidden_size}"
        parts = [backbone, f"p{self.prompts}", f"n{self.samples}", f"x{self.horizon:g}"]
        parts += ["grouped"] * self.grouped + ["bf16head"] * self.rounded_head
        return "-".join([*parts, f"seed{self.seed}"])


def make_axes(
    prompts: Sequence[int], samples: Sequence[int], hidden_sizes: Sequence[int], horizons: Sequence[float]
) -> dict[str, dict[str, Cell]]:
    """The cells along each axis, by their label there, all with seed 0. Axes share cells, so each is trained once.

    Args:
        prompts, samples (`Sequence[int]`): training prompts and completions of each; the last is that of other axes.
        hidden_sizes (`Sequence[int]`): widths.
        horizons (`Sequence[float]`): multiples of the fitted horizon of gamma.
    """
    base = Cell(prompts[-1], samples[-1], 0)
    return {
        "model size": {str(width): replace(base, hidden_size=width) for width in hidden_sizes},
        "prompts": {str(count): replace(base, prompts=count) for count in prompts},
        "samples per prompt": {str(count): replace(base, samples=count) for count in samples},
        "optimiser steps": {"shuffled": base, "grouped by length": replace(base, grouped=True)},
        "gamma": {f"horizon x {factor:g}": replace(base, horizon=factor) for factor in horizons},
        "precision of the head": {"float32": base, "bfloat16": replace(base, rounded_head=True)},
    }


def rate_factor(hidden_size: int) -> float:
    """The learning rate beside that at a width of 64: it goes with 1 / width, up to ten times."""
    return min(10.0, 64 / hidden_size)


class RoundedHead(LengthValueHead):
    """The head with every number it reads and makes rounded to bfloat16; the weights that are trained stay float32."""

    def forward(self, hidden_states):
        """See [`~lenvm_rl.modeling.value_model.LengthValueHead.forward`]."""
        hidden = _rounded(hidden_states)
        for layer, activation in ((self.hidden, silu), (self.output, lambda logits: logits)):
            hidden = _rounded(linear(hidden, _rounded(layer.weight), _rounded(layer.bias)))
            hidden = _rounded(activation(hidden))
        return hidden.squeeze(-1)


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16).float()


class GroupedTrainer(LengthValueTrainer):
    """Optimiser steps made of completions of similar length, which shifts what values converge to."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthGroupedSampler:
        lengths = completion_lengths(self.train_dataset).tolist()
        return LengthGroupedSampler(self.args.train_batch_size, lengths=lengths)
