"""What the value models of a run read of a batch: its tokens, and the pictures in its prompts.

TRL keeps the pictures of a batch beside its tokens, in the layout of the policy's processor: patches of all pictures in
a row (Qwen-VL), one row per picture, per tile or per completion. A value model whose decoder is of the policy's kind
takes the same fields, so its values are what they are of what the policy has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from trl import GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from lenvm_rl.modeling.backbones import embedding_rows
from lenvm_rl.modeling.completions import completion_logits
from lenvm_rl.trainers.config import LenVMConfig

# How many pictures and tiles each row has: they say where to cut, and are no inputs of a model.
_COUNTS = ("num_images", "num_tiles")
# One number per token: they stay where a row has no picture.
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
_PICTURES = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
)


def value_logits(
    model: nn.Module, what: str, batch: dict, trainer: GRPOTrainer, chunk_size: int | None = None
) -> torch.Tensor:
    """Logits of a value model at every state of a batch: `(B, T + 1)`.

    Args:
        model (`torch.nn.Module`), what (`str`): the model, as the run calls it, and what errors call it.
        batch (`dict`): TRL's, of a generation or of a step.
        trainer (`trl.GRPOTrainer`): of the run.
        chunk_size (`int`, *optional*): rows per forward; all at once when omitted.

    The step is stopped with a `ValueError` where the batch holds tokens that the model does not embed, or the model
    gave NaN or infinity: when the trainer reads what it has not read yet ([`~lenvm_rl.trainers.unread`]).
    """
    prompt_ids, completion_ids = embedded_ids(model, what, batch, trainer)
    tokens = (prompt_ids, batch["prompt_mask"], completion_ids, batch["completion_mask"])
    logits = completion_logits(model, *tokens, chunk_size=chunk_size, further_inputs=picture_inputs(batch))
    check_finite(logits, what, batch, trainer)
    return logits


def picture_inputs(batch: dict) -> Callable[[slice], dict] | None:
    """What a model takes beside the tokens of a batch, for any of its rows.

    Args:
        batch (`dict`): TRL's, of a generation or of a step.

    Returns:
        `Callable[[slice], dict]`: the model's further arguments for these rows; `None` if the batch has no pictures.

    Raises:
        `ValueError`: a row that was left out of the loss has pictures in its completion, whose tokens are then masked.
    """
    fields = {name: batch[name] for name in (*_COUNTS, *_TOKEN_TYPES, *_PICTURES) if name in batch}
    if "pixel_values" not in fields:
        return None
    _check_none_is_masked(batch)
    by_row = split_pixel_values_by_grid(fields)

    def of_rows(rows: slice) -> dict:
        part = {name: values[rows] for name, values in by_row.items()}
        # Decoders stumble over pictures that are none.
        names = (*_TOKEN_TYPES, *_PICTURES) if sum(part["num_images"]) > 0 else _TOKEN_TYPES
        part = unsplit_pixel_values_by_grid(part)
        return {name: part[name] for name in names if name in part}

    return of_rows


def check_sees_pictures(model: nn.Module, trainer: GRPOTrainer, what: str) -> None:
    """Raise a `ValueError` if a value model could not read what a policy with pictures has read."""
    config, policy = model.config.backbone_config, trainer.accelerator.unwrap_model(trainer.model).config
    if config.get_text_config(decoder=True) is config:
        raise ValueError(
            f"The policy's processing class is a multimodal processor, but the {what} reads text alone: give one whose "
            f"decoder is of the policy's kind ('{policy.model_type}'), pass the tokenizer of a text model as "
            f"`processing_class`, or train without `length_value_model`."
        )
    if config.model_type != policy.model_type:
        raise ValueError(
            f"The decoder of the {what} is of type '{config.model_type}', and the processor makes pictures for the "
            f"policy's, '{policy.model_type}': give one of that type."
        )


def check_text_only_arguments(args: LenVMConfig) -> None:
    """Raise a `ValueError` where an argument of a run with a multimodal processor would lose the pictures."""
    if args.refresh_steps > 0:
        raise ValueError(
            "refresh_steps keeps the tokens of completions and not their pictures, which the policy has: set "
            "refresh_steps=0, and pretrain the length value model again now and then."
        )
    if args.rollout_guidance is not None:
        raise ValueError(
            "rollout_guidance scores candidates from tokens alone, and the policy has pictures: leave it out."
        )


def _check_none_is_masked(batch: dict) -> None:
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    for name in _TOKEN_TYPES:
        if name in batch and bool(((batch[name] != 0) & (mask == 0)).any()):
            raise ValueError(
                "A completion that was cut holds pictures (of a tool), and mask_truncated_completions hides their "
                "tokens from the value models: set mask_truncated_completions=False."
            )


def embedded_ids(model: nn.Module, what: str, batch: dict, trainer: GRPOTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of prompts and completions as a value model reads them: 0 for a token that it does not embed, which stops the
    step on every process with a `ValueError` once that is read.

    Looked for only where the policy has more rows than the model, as models of one family but of several sizes do.

    Args:
        model (`torch.nn.Module`), what (`str`): the value model, and what the error calls it.
        batch (`dict`): with `prompt_ids`, `prompt_mask`, `completion_ids` and `completion_mask`.
        trainer (`trl.GRPOTrainer`): has the policy.
    """
    ids = (batch["prompt_ids"], batch["completion_ids"])
    unwrap = trainer.accelerator.unwrap_model
    rows, policy_rows = embedding_rows(unwrap(model)), embedding_rows(unwrap(trainer.model))
    if rows is None or policy_rows is None or rows >= policy_rows:
        return ids

    def stop(largest: list[float]) -> None:
        if max(largest) >= rows:
            raise ValueError(
                f"The policy embeds {policy_rows} tokens and wrote the one of id {int(max(largest))}, and the {what} "
                f"embeds {rows}: give one with as many rows, or keep the policy from such tokens (`generation_kwargs` "
                f"of `args`, {{'suppress_tokens': [...]}})."
            )

    masks = (batch["prompt_mask"], batch["completion_mask"])
    masked = torch.cat([each * mask for each, mask in zip(ids, masks, strict=True)], dim=1)
    trainer.unread.add_own(masked.max().reshape(1), stop)
    return tuple(each.masked_fill(each >= rows, 0) for each in ids)


def check_finite(values: torch.Tensor, what: str, batch: dict, trainer: GRPOTrainer) -> None:
    """Stop the step on every process if any process got NaN or infinity from a value model, and keep its batch: when
    the trainer reads what it has not read yet ([`~lenvm_rl.trainers.unread`]), before its weights move.

    The batch is written to `output_dir` as safetensors: prompt and completion ids, their masks, and the values.

    Args:
        values (`torch.Tensor` of shape `(B, T + 1)`): what the model gave, anything finite where no state exists.
        what (`str`): name of the model, for the error and the file.
        batch (`dict`): with `prompt_ids`, `prompt_mask`, `completion_ids` and `completion_mask`.
        trainer (`transformers.Trainer`): gives the processes, the step and the folder.

    Raises:
        `ValueError`: naming the file.
    """
    values = values.detach()

    def stop(are_bad: list[float]) -> None:
        bad_processes = [process for process, is_bad in enumerate(are_bad) if is_bad]
        if bad_processes:
            _stop_at(bad_processes, values, what, batch, trainer)

    trainer.unread.add_own((~torch.isfinite(values)).any().reshape(1), stop)


def _stop_at(bad_processes: list[int], values: torch.Tensor, what: str, batch: dict, trainer: GRPOTrainer) -> None:
    """Arguments as in [`check_finite`]."""
    bad_rows = (~torch.isfinite(values)).any(dim=1)
    step, rank = trainer.state.global_step, trainer.accelerator.process_index
    stem = f"nonfinite_{what.replace(' ', '_')}_step{step}_rank"
    if rank in bad_processes:
        tensors = {k: batch[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
        tensors["values"] = values
        folder = Path(trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / f"{stem}{rank}.safetensors")
    files = ", ".join(str(Path(trainer.args.output_dir) / f"{stem}{rank}.safetensors") for rank in bad_processes)
    rows = bad_rows.nonzero().flatten().tolist()
    where = f"rows {rows} of this process" if rows else "on another process"
    raise ValueError(
        f"The {what} gave NaN or infinity at step {step} ({where}). The batch is in {files}: load it with "
        "safetensors.torch.load_file and run the model on it; check its weights, its dtype (float16 overflows) and the "
        "learning rate."
    )
