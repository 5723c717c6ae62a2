"""What a guided generation is given: read, and refused where the two models would not see the same prompt, or settings
contradict the guidance.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, MaxLengthCriteria, PreTrainedModel, StoppingCriteria

from lenvm_rl.backbones import CACHE_NAMES
from lenvm_rl.guidance import AT_MOST, EQUAL_TO, TILT, LengthGuidance

# What `generate` would apply after the guidance, and the value at which it does nothing.
REFUSED_WARPERS = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}
# What makes `generate` go on otherwise than by one token for each row, or read other ids than it is given.
REFUSED_MODES = (
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "use_mtp",
    "custom_generate",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "token_healing",
)
PLAIN_MODES = ("sample", "greedy_search")
# Inputs that the length value model reads too, and arguments of `generate` that are inputs of no model.
READ_BY_BOTH = ("input_ids", "attention_mask")
NO_INPUTS = ("tokenizer", "assistant_tokenizer", "logits_to_keep", "use_model_defaults", "trust_remote_code")
# What `generate` takes for `max_new_tokens` where nothing names a length.
DEFAULT_NEW_TOKENS = 20


def read_inputs(inputs: Tensor | Mapping[str, Tensor], arguments: Mapping) -> tuple[dict[str, Tensor], dict]:
    """Inputs by name, and the arguments that are none: a mask may be given either way.

    Raises:
        ValueError: there are no ids `(B, S)` of at least one token, or one thing is given twice.
    """
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    if not isinstance(inputs, Mapping):
        raise ValueError(f"inputs are ids (B, S) or a mapping that holds input_ids, got a {type(inputs).__name__}.")
    inputs, arguments = dict(inputs), dict(arguments)
    for name in READ_BY_BOTH:
        given = arguments.pop(name, None)
        if given is None:
            continue
        if inputs.get(name) is not None:
            raise ValueError(f"{name} is given twice, in the inputs and beside them: leave one out.")
        inputs[name] = given
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError(
            f"{', '.join(sorted(inputs))} without input_ids: the length value model reads token ids, give it these."
        )
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.shape[1] or ids.is_floating_point():
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids are token ids of shape (B, S), at least one for each prompt, got {shape}.")
    return inputs, arguments


def prompt_mask(
    input_ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None, end_ids: Sequence[int]
) -> Tensor:
    """Which prompt tokens exist: what is given, or else what `generate` makes of the ids, so that both see the same.

    There, every pad token is padding, unless it is an end as well: then all tokens count, for nobody can tell.

    Args:
        input_ids (`torch.Tensor` of shape `(B, S)`): prompts.
        attention_mask (`torch.Tensor`, *optional*): `(B, S)`, or one row for each prompt of which there are several.
        pad_token_id (`int`, *optional*), end_ids (`Sequence[int]`): of the generation.

    Returns:
        `torch.Tensor` of shape `(B, S)`.

    Raises:
        ValueError: the mask does not fit the ids.
    """
    if attention_mask is None:
        if pad_token_id is None or pad_token_id in end_ids:
            return torch.ones_like(input_ids)
        return (input_ids != pad_token_id).long()
    rows, width = input_ids.shape
    if attention_mask.dim() != 2 or attention_mask.shape[1] != width or rows % attention_mask.shape[0]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} but the prompts {tuple(input_ids.shape)}: make "
            "one processor for each batch of prompts."
        )
    return attention_mask.to(input_ids.device).repeat_interleave(rows // attention_mask.shape[0], dim=0)


def check_call(
    model: PreTrainedModel,
    guidance: list[LengthGuidance],
    merged: GenerationConfig,
    given: GenerationConfig | None,
    inputs: Mapping,
    arguments: Mapping,
) -> None:
    """Refuses what cannot be done; says what to change.

    Args:
        model (`PreTrainedModel`): the policy.
        guidance (list of [`LengthGuidance`]): one for all prompts, or one for each.
        merged (`GenerationConfig`): the settings that `generate` will use.
        given (`GenerationConfig`, *optional*), inputs, arguments: what the caller gave.

    Raises:
        ValueError: names what is wrong.
    """
    rows, width = inputs["input_ids"].shape
    if len(guidance) not in (1, rows):
        raise ValueError(f"{len(guidance)} guidances do not fit {rows} prompts: give one, or one for each.")
    for each in dict.fromkeys(guidance):
        _check_settings(each, len(set(guidance)) == 1, given, arguments)
        _check_room(each, merged, width, arguments.get("stopping_criteria") or ())
    _check_generation(merged, arguments)
    if any(each.needs_values for each in guidance):
        _check_seen(model, merged, {**inputs, **arguments})


def new_tokens(merged: GenerationConfig, prompt_width: int, criteria: Sequence[StoppingCriteria]) -> int:
    """The most tokens that `generate` will write.

    Args:
        merged (`GenerationConfig`): its settings.
        prompt_width (`int`): of the prompts, padding included.
        criteria (sequence of `StoppingCriteria`): what it is given.
    """
    for each in criteria:
        # It takes the place of the one that `generate` would make.
        if type(each) is MaxLengthCriteria:
            return each.max_length - prompt_width
    if merged.max_new_tokens is not None:
        return merged.max_new_tokens
    return DEFAULT_NEW_TOKENS if merged.max_length is None else merged.max_length - prompt_width


def _check_seen(model: PreTrainedModel, merged: GenerationConfig, given: Mapping) -> None:
    """Refuses inputs of the policy that the length value model would not see."""
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: the length value model would not see what its encoder "
            "reads. Give a decoder."
        )
    known = {*READ_BY_BOTH, *NO_INPUTS, *inspect.signature(GenerationMixin.generate).parameters} - {"inputs", "kwargs"}
    unseen = []
    for name, value in given.items():
        empty = name in (*CACHE_NAMES, "cache_params") and value is not None and not value.get_seq_length()
        if value is not None and name not in known and not hasattr(merged, name) and not empty:
            unseen.append(name)
    if unseen:
        raise ValueError(
            f"{', '.join(sorted(unseen))}: an input of the policy that the length value model would not see (it reads "
            "input_ids and attention_mask alone). Leave it out, or generate without guidance."
        )


def _check_settings(guidance: LengthGuidance, alone: bool, given: GenerationConfig | None, arguments: Mapping) -> None:
    """Refuses settings of sampling that contradict the guidance; rows that differ can have none but their own."""
    owned = {"do_sample": guidance.temperature > 0, "top_k": guidance.top_k, "top_p": guidance.top_p}
    owned |= {"min_p": guidance.min_p, "temperature": guidance.temperature}
    stated = {} if given is None else {name: getattr(given, name) for name in owned}
    stated |= {name: arguments[name] for name in owned if name in arguments}
    for name, value in stated.items():
        if value is None:
            continue
        if not alone:
            raise ValueError(f"{name}={value} is for all rows, which are guided differently: set it in LengthGuidance.")
        if value != owned[name]:
            raise ValueError(
                f"{name}={value} contradicts the guidance, which has {owned[name]}: set it in LengthGuidance only."
            )


def _check_room(
    guidance: LengthGuidance, merged: GenerationConfig, prompt_width: int, criteria: Sequence[StoppingCriteria]
) -> None:
    """Refuses a target that completions cannot reach, or not be held to; the end takes a token, too."""
    if guidance.mode == TILT:
        return
    target, room = guidance.target_length, new_tokens(merged, prompt_width, criteria)
    if room < target + 1:
        raise ValueError(
            f"target_length={target} needs max_new_tokens of at least {target + 1} (the end-of-sequence token is one "
            f"more), got {room}."
        )
    name, least = "min_new_tokens", merged.min_new_tokens
    if least is None:
        name, least = "min_length", (merged.min_length or 0) - prompt_width
    if guidance.mode in (EQUAL_TO, AT_MOST) and least > target:
        raise ValueError(
            f"{name} bars the end before {least} tokens, but mode={guidance.mode!r} wants it after target_length="
            f"{target}: lower {name}, or raise target_length."
        )


def _check_generation(merged: GenerationConfig, arguments: Mapping) -> None:
    """Refuses what would act on the guided scores, or breaks the order of rows."""
    for name, neutral in REFUSED_WARPERS.items():
        if getattr(merged, name) not in (None, neutral):
            raise ValueError(f"{name} would act on the guided distribution: unset it, or use top_k, top_p or min_p.")
    if merged.watermarking_config is not None:
        raise ValueError(
            "watermarking_config would act on the guided distribution: unset it, or give "
            "`watermarking_config.construct_processor(…)` as a logits_processor, which acts on the policy's."
        )
    for name in REFUSED_MODES:
        value = arguments[name] if name in arguments else getattr(merged, name, None)
        if value is not None and value is not False and value != 0:
            raise ValueError(f"{name} cannot be combined with length guidance: leave it out.")
    if merged.num_beams not in (None, 1):
        raise ValueError(f"num_beams={merged.num_beams}: beam search cannot be guided, use num_beams=1.")
    mode = merged.get_generation_mode(None)
    if mode not in PLAIN_MODES or merged.cache_implementation == "paged":
        raise ValueError(
            f"the settings lead to {mode.value if mode not in PLAIN_MODES else 'continuous batching'}, which cannot be "
            "guided: leave out what does so."
        )
