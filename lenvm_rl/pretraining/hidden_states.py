"""Hidden states of a frozen decoder along rollouts, computed once and kept in a file, for a head that learns from them.

A head alone learns from what the decoder says at each state, and the decoder does not change: one forward for each
completion serves every epoch. The states lie in a memory-mapped file in bfloat16, `2 * hidden size` bytes each, so that
they need not fit into memory; what was computed before an interruption is not computed again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from lenvm_rl.files import read_json, write_json
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.batches import COLUMNS, blank_batch, read_tokens, write_labels
from lenvm_rl.pretraining.shared_prompts import model_inputs

logger = logging.getLogger(__name__)

# The place of a rollout among those whose states are kept.
ROW_COLUMN = "row"
# Its name, by what is done with the rollouts.
FILE = "hidden_states_{}.bin"
# What saving a decoder writes into its config: nothing that it computes with.
_OF_SAVING = ("_name_or_path", "transformers_version", "architectures", "dtype")
# Completions between two notes of how far the work has come.
NOTED = 64


class HiddenStates:
    """What a head reads of a decoder at every state of some rollouts.

    Args:
        path (`str` or path): the file, made if it is not there, with a digest of `about` in its name; files beside it
            say what is in it.
        rollouts (`datasets.Dataset`): whose states.
        hidden_size (`int`): H, of all layers that the head reads together.
        truncated (`str`): what is made of cut completions, see [`~lenvm_rl.pretraining.batches.read_tokens`].
        about (mapping): what the states depend on, as JSON; a file of something else is removed.
        process, processes (`int`, *optional*): which part of the rollouts is this process's to compute; all of them
            write into one file, and read all of it.
    """

    def __init__(
        self,
        path: str | Path,
        rollouts: Dataset,
        hidden_size: int,
        truncated: str,
        about: dict[str, Any],
        process: int = 0,
        processes: int = 1,
    ):
        self.truncated, self.hidden_size = truncated, hidden_size
        share = -(-len(rollouts) // processes)
        starts = [min(part * share, len(rollouts)) for part in range(processes + 1)]
        self._parts = [range(*ends) for ends in itertools.pairwise(starts)]
        self.part = self._parts[process]
        self._rollouts = rollouts
        pairs = rollouts.select_columns(["completion_ids", "finish_reason"])
        # The state at the prompt's end, and one after each token that is read.
        self.counts = [1 + len(read_tokens(each, truncated)) for each in pairs]
        self.first = np.concatenate([[0], np.cumsum(self.counts)])
        self._about = {**about, "states": int(self.first[-1]), "hidden_size": hidden_size}
        digest = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).hexdigest()[:12]
        path = Path(path)
        # A name of its own: what another run has left half done is never taken for this one's, however it was split.
        self.path = path.with_name(f"{path.stem}.{digest}{path.suffix}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if process == 0:
            for other in self.path.parent.glob(f"{path.stem}.*{path.suffix}*"):
                if not other.name.startswith(self.path.name):
                    other.unlink()
        # Not opened anew: another process may have written its part already.
        with open(self.path, "ab") as file:
            file.truncate(self.bytes)
        if not self._place(self.part).exists():
            self._say(self.part.start)
        shape = (int(self.first[-1]), hidden_size)
        self._array = np.memmap(self.path, dtype=np.uint16, mode="r+", shape=shape)

    @property
    def done(self) -> int:
        """The first rollout of this process's part whose states are not there."""
        return read_json(self._place(self.part))["done"]

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return 2 * self.hidden_size * int(self.first[-1])

    @torch.no_grad()
    def fill(
        self, model: LengthValueModel, collate: Callable[[list[dict]], dict], batch_size: int, progress: bool = True
    ) -> None:
        """Computes what is missing, in batches of completions.

        Args:
            model ([`LengthValueModel`]): of form `"head"`, whose decoder is asked.
            collate ([`~lenvm_rl.pretraining.LengthValueCollator`]): makes the batches, with the same `truncated`.
            batch_size (`int`): completions in a forward.
            progress (`bool`, *optional*, defaults to `True`): whether to show a bar.
        """
        if self.done == self.part.stop:
            return
        logger.info("hidden states of %d states: %.2f GiB in %s", self.first[-1], self.bytes / 2**30, self.path)
        training = model.training
        model.eval()
        before = self.done - self.part.start
        with tqdm(total=len(self.part), initial=before, desc="hidden states", disable=not progress) as bar:
            for rows in self._missing(batch_size):
                batch = collate([self._rollouts[row] for row in rows])
                inputs = model_inputs(batch, model)
                states = model.hidden_states(**{name: each.to(model.backbone.device) for name, each in inputs.items()})
                for row, (line, column, *_) in zip(rows, batch["sequences"].tolist(), strict=True):
                    found = states[line, column : column + self.counts[row]].to(torch.bfloat16).cpu()
                    self._array[self.first[row] : self.first[row + 1]] = found.view(torch.uint16).numpy()
                bar.update(len(rows))
                after = rows[-1] + 1
                if after == self.part.stop or after // NOTED > rows[0] // NOTED:
                    self._array.flush()
                    self._say(after)
        model.train(training)

    def of(self, row: int) -> Tensor:
        """The states of a rollout, `(states, H)` bfloat16."""
        found = np.array(self._array[self.first[row] : self.first[row + 1]])
        return torch.from_numpy(found).view(torch.bfloat16)

    def _missing(self, batch_size: int) -> Iterator[Sequence[int]]:
        for start in range(self.done, self.part.stop, batch_size):
            yield range(start, min(start + batch_size, self.part.stop))

    def check_whole(self) -> None:
        """Raises a `ValueError` if the part of another process is not in this file, once all of them have written."""
        for part in self._parts:
            place = self._place(part)
            if not (place.exists() and read_json(place)["done"] == part.stop):
                raise ValueError(
                    f"{self.path} lacks the hidden states of rollouts {part.start} to {part.stop}, which another "
                    "process has written elsewhere: give an output_dir that all nodes share, or set "
                    "cache_hidden_states=False."
                )

    def _place(self, part: range) -> Path:
        return self.path.with_name(f"{self.path.name}.{part.start}-{part.stop}.json")

    def _say(self, done: int) -> None:
        write_json(self._place(self.part), {"about": self._about, "done": done})


@dataclass
class HiddenStateCollator:
    """Rollouts with the column `row` as one row of their states, instead of their tokens.

    Args:
        states ([`HiddenStates`]): of all of them.

    Returns:
        `dict[str, torch.Tensor]`: as of [`~lenvm_rl.pretraining.LengthValueCollator`], with `hidden_states` `(1, C, H)`
        in the place of ids and positions.
    """

    states: HiddenStates

    def __call__(self, rollouts: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = [self.states.of(rollout[ROW_COLUMN]) for rollout in rollouts]
        batch = blank_batch(1, sum(map(len, found)), len(rollouts), 0)
        del batch["input_ids"]
        batch["hidden_states"] = torch.cat(found).unsqueeze(0)
        start = 0
        for index, (rollout, each) in enumerate(zip(rollouts, found, strict=True)):
            write_labels(batch, 0, start, index, rollout, self.states.truncated)
            start += len(each)
        return batch


def with_rows(rollouts: Dataset) -> Dataset:
    """Rollouts with the columns that a collator reads, and the place of each."""
    return rollouts.select_columns(COLUMNS).add_column(ROW_COLUMN, list(range(len(rollouts))))


def decoder_digest(model: LengthValueModel) -> str:
    """A digest that changes with the config of a decoder and with its weights: of a few numbers of each."""
    config = model.backbone.config.to_dict()
    config = {name: value for name, value in config.items() if name not in _OF_SAVING}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.backbone.named_parameters():
        digest.update(name.encode())
        digest.update(weight.detach().flatten()[:: max(1, weight.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def remove_hidden_states(folder: str | Path) -> None:
    """Deletes the files of hidden states in a folder, and what is beside them."""
    for path in Path(folder).glob(FILE.format("*") + "*"):
        path.unlink()
