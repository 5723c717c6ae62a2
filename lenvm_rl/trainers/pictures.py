"""Prompts with pictures: what the value models of a run are given of them, cut into the rows of a forward.

TRL keeps the pictures of a batch beside its tokens, in the layout of the policy's processor: patches of all pictures in
a row (Qwen-VL), one row per picture, per tile or per completion. A value model whose decoder is of the policy's kind
takes the same fields, so its values are those of what the policy has seen.
"""

from collections.abc import Callable

import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

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


def check_sees_pictures(model, trainer, what: str) -> None:
    """Raise a `ValueError` if a value model could not read what a policy with pictures has read.

    Args:
        model (`PreTrainedModel`): unwrapped, with `config.backbone_config`.
        trainer (`trl.GRPOTrainer`): constructed.
        what (`str`): what the error calls the model.
    """
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


def check_text_only_arguments(args) -> None:
    """Raise a `ValueError` where an argument of a run with a multimodal processor would lose the pictures.

    Args:
        args (`LenVMConfig`): of the run.
    """
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
