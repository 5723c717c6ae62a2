"""What a pretraining run was begun with, kept in its folder: it goes on with nothing else."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from transformers import TrainingArguments

from lenvm_rl.files import is_complete, last_complete_checkpoint, read_json
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.sharing import FULL
from lenvm_rl.pretraining.batches import COLUMNS
from lenvm_rl.pretraining.hidden_states import decoder_digest

logger = logging.getLogger(__name__)

RECORD = "pretraining.json"

# Of transformers' arguments, those that the weights depend on; the others say where and how fast a run is made, and
# what is told about it. How a step is split over processes and micro-batches makes no difference.
_OF_TRAINING = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "data_seed", "fp16", "learning_rate", "lr_scheduler_kwargs",
    "lr_scheduler_type", "max_grad_norm", "max_steps", "num_train_epochs", "optim", "optim_args", "seed",
    "warmup_ratio", "warmup_steps", "weight_decay",
)  # fmt: skip


def find_checkpoint(args: TrainingArguments, resume: bool) -> str | None:
    """The checkpoint that a run goes on from, `None` if it begins.

    It is `args.resume_from_checkpoint`, or the last one in `args.output_dir`: one there that nobody said to `resume`
    from is refused.
    """
    last, asked = last_complete_checkpoint(args.output_dir), str(args.resume_from_checkpoint).lower()
    if asked in ("none", "false"):
        if last is not None and not resume:
            raise ValueError(f"There is a checkpoint already, {last}: resume from it, or give another output_dir.")
        return last
    if asked == "true":
        return last
    if not is_complete(args.resume_from_checkpoint):
        raise FileNotFoundError(f"resume_from_checkpoint: '{args.resume_from_checkpoint}' is no whole checkpoint.")
    return os.path.normpath(args.resume_from_checkpoint)


def settings_of(args: TrainingArguments, model: LengthValueModel, train: Dataset) -> dict[str, Any]:
    """All that a run's weights depend on, as JSON gives it back, to be kept in [`RECORD`].

    Args:
        args ([`~lenvm_rl.pretraining.LengthValueTrainingArguments`]): of the run.
        model (`LengthValueModel`): before it is fitted. Of a backbone that is fitted kind and size count, since its
            weights come from the checkpoint once there is one; of a frozen one, which no checkpoint holds, its weights.
        train (`datasets.Dataset`): the completions that are fitted on.
    """
    own = {field.name for field in fields(args)} - {field.name for field in fields(TrainingArguments)}
    given = args.to_dict()
    settings = {name: given[name] for name in (*_OF_TRAINING, *sorted(own - {"domain_column"})) if name in given}
    settings["step"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings["rollouts"] = fingerprint(train)
    settings["gamma"] = model.config.gamma
    settings["backbone"] = [model.config.backbone_config.model_type, sum(p.numel() for p in model.parameters())]
    if model.config.form != FULL:
        settings["decoder"] = decoder_digest(model)
    return json.loads(json.dumps(settings, default=str))


def fingerprint(rollouts: Dataset) -> str:
    """A digest of what is fitted on of rollouts, and in which order."""
    digest = hashlib.sha256()
    table = rollouts.select_columns(COLUMNS).with_format("arrow")[:]
    for name in COLUMNS:
        column = table[name]
        if name.endswith("_ids"):
            for numbers in (pc.list_value_length(column), pc.list_flatten(column)):
                digest.update(numbers.to_numpy().astype("<i8").tobytes())
        else:
            digest.update(json.dumps(column.to_pylist()).encode())
    return digest.hexdigest()[:16]


def check_resumed(folder: str, settings: dict[str, Any]) -> None:
    """Raise a `ValueError` if the run in a folder was begun with other settings; a warning if it does not say."""
    path = Path(folder) / RECORD
    if not path.is_file():
        logger.warning("'%s' is not there: with which settings the run was begun is not known, nor compared", path)
        return
    begun = read_json(path)
    # Records from before the decoder was compared do not name it.
    told = {*begun, *settings} - ({"decoder"} - set(begun))
    names = [name for name in sorted(told) if begun.get(name) != settings.get(name)]
    if names:
        differing = "; ".join(f"{name} {begun.get(name)}, now {settings.get(name)}" for name in names)
        raise ValueError(
            f"The run in {folder} was begun with other settings ({differing}): go on with those, or give another "
            "output_dir."
        )
