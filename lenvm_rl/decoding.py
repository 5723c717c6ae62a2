"""Length-guided decoding: a frozen length value model leans a policy's next token towards a length.

[`LengthGuidance`] says how, see `lenvm_rl.guidance` for the rules. [`generate_guided`] is `model.generate` under it,
[`LengthGuidedLogitsProcessor`] acts inside any `generate`. The rows of a batch may be guided differently.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lenvm_rl.guidance import TILT, LengthGuidance, tilt
from lenvm_rl.logits_processor import GuidanceReport, LengthGuidedLogitsProcessor, as_list
from lenvm_rl.tokenization import check_same_tokenizer

__all__ = [
    "GuidanceReport",
    "LengthGuidance",
    "LengthGuidedLogitsProcessor",
    "generate_guided",
    "mean_length_at",
    "tilt",
]

# What `generate` would apply after the guidance, and the value at which it does nothing.
REFUSED_WARPERS = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}
REFUSED_MODES = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate", "penalty_alpha", "inputs_embeds")


def generate_guided(
    model: PreTrainedModel,
    length_value_model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    guidance: LengthGuidance | Sequence[LengthGuidance],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scoring: str = "cached",
    generation_config: GenerationConfig | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    return_report: bool = False,
    **generate_kwargs,
):
    """`model.generate` under length guidance.

    `do_sample`, `temperature`, `top_k`, `top_p` and `min_p` come from the guidance, whatever the model's own generation
    config says; as arguments they are refused unless they say the same. Everything else (`max_new_tokens`,
    `stopping_criteria`, …) is passed on. `repetition_penalty` and processors given here belong to the policy.

    Args:
        model (`transformers.PreTrainedModel`): the policy.
        length_value_model (`LengthValueModel`): frozen, in eval mode, with the policy's tokenizer.
        inputs (`torch.Tensor` of shape `(B, S)` or mapping): prompts padded on the left, ids or with `attention_mask`.
        guidance ([`LengthGuidance`] or sequence of them): how to guide; one for all prompts, or one for each.
        tokenizer (*optional*): the policy's, to be compared; without it, only the sizes of the vocabularies are.
        scoring (*optional*): see [`LengthGuidedLogitsProcessor`].
        generation_config (*optional*), logits_processor (*optional*), generate_kwargs: as for `generate`.
        return_report (`bool`, *optional*, defaults to `False`): also return what guidance did to each row.

    Returns:
        What `generate` returns: ids `(B * num_return_sequences, S + T)` or an object; with `return_report`, `(that,
        report)`, see [`GuidanceReport`].

    Raises:
        ValueError: on arguments that contradict the guidance, no room for `target_length`, or tokenizers that differ.
    """
    inputs = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    several = as_list(guidance)
    merged = _merged_generation_config(model, several, generation_config, generate_kwargs)
    _check_call(several, merged, generation_config, inputs, generate_kwargs)
    if tokenizer is not None:
        check_same_tokenizer(length_value_model.config.tokenizer_fingerprint, tokenizer)
    processor = LengthGuidedLogitsProcessor(
        length_value_model,
        several,
        eos_token_id=merged.eos_token_id,
        attention_mask=inputs.get("attention_mask"),
        pad_token_id=merged.pad_token_id,
        scoring=scoring,
        same_tokenizer=tokenizer is not None,
        record=return_report,
    )
    output = model.generate(
        **inputs,
        **_passed_on(generate_kwargs, merged, tokenizer),
        generation_config=merged,
        logits_processor=LogitsProcessorList([*logits_processor, processor]),
    )
    sequences = output if isinstance(output, Tensor) else output.sequences
    return (output, processor.finish(sequences)) if return_report else output


def _passed_on(arguments: Mapping, merged: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None) -> dict:
    """The arguments of `generate` that are no settings, which stand in the merged ones."""
    passed_on = {name: value for name, value in arguments.items() if not hasattr(merged, name)}
    if tokenizer is not None and merged.stop_strings is not None:
        passed_on["tokenizer"] = tokenizer
    return passed_on


def mean_length_at(
    model: PreTrainedModel,
    length_value_model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    guidance: LengthGuidance,
    *,
    seed: int,
    **generate_kwargs,
) -> Callable[[float], float]:
    """What [`~lenvm_rl.controllers.calibrate_strength`] measures: the mean length of sampled completions by strength.

    Args:
        model, length_value_model, inputs: as in [`generate_guided`]; the prompts are the sample.
        guidance ([`LengthGuidance`]): a tilt, whose strength is replaced.
        seed (`int`): of every measurement; the global random state is left as it was.
        generate_kwargs: as in [`generate_guided`].

    Returns:
        callable: from a strength to the mean number of tokens, end-of-sequence not counted.
    """
    if guidance.mode != TILT:
        raise ValueError(f"mode={guidance.mode!r} has no strength to be found: give a guidance with mode='tilt'.")
    ids = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
    devices = [ids.device] if ids.device.type == "cuda" else []

    def measure(strength: float) -> float:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            _, report = generate_guided(
                model,
                length_value_model,
                inputs,
                replace(guidance, strength=strength),
                return_report=True,
                **generate_kwargs,
            )
        return float(report.lengths.float().mean())

    return measure


def _merged_generation_config(
    model: PreTrainedModel,
    guidance: list[LengthGuidance],
    generation_config: GenerationConfig | None,
    arguments: Mapping,
) -> GenerationConfig:
    """The settings that `generate` is to use: what guidance owns, then arguments, the given config, and the model's."""
    merged = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    merged.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    sampled = any(each.temperature > 0 for each in guidance)
    owned = {"do_sample": sampled, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    # Unset, so that `generate` makes no warper for it, unless it would then fill in the model's own.
    owned["min_p"] = None if model.generation_config.min_p is None else 0.0
    merged.update(**{**arguments, **owned})
    return merged


def _check_call(
    guidance: list[LengthGuidance],
    merged: GenerationConfig,
    given: GenerationConfig | None,
    inputs: Mapping,
    arguments: Mapping,
) -> None:
    """Refuses what cannot be done; says what to change."""
    rows, width = inputs["input_ids"].shape
    if len(guidance) not in (1, rows):
        raise ValueError(f"{len(guidance)} guidances do not fit {rows} prompts: give one, or one for each.")
    for each in dict.fromkeys(guidance):
        _check_settings(each, len(set(guidance)) == 1, given, arguments)
        _check_room(each, merged, width)
    _check_generation(merged, {**arguments, **inputs})


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


def _check_room(guidance: LengthGuidance, merged: GenerationConfig, prompt_width: int) -> None:
    """Refuses a target that the longest completion cannot reach; the end takes a token, too."""
    if guidance.mode == TILT:
        return
    room = merged.max_new_tokens
    if room is None:
        room = (merged.max_length or 0) - prompt_width
    if room < guidance.target_length + 1:
        raise ValueError(
            f"target_length={guidance.target_length} needs max_new_tokens of at least {guidance.target_length + 1} "
            f"(the end-of-sequence token is one more), got {room}."
        )


def _check_generation(merged: GenerationConfig, arguments: Mapping) -> None:
    """Refuses what would act on the guided scores, or breaks the order of rows."""
    for name, neutral in REFUSED_WARPERS.items():
        if getattr(merged, name) not in (None, neutral):
            raise ValueError(f"{name} would act on the guided distribution: unset it, or use top_k, top_p or min_p.")
    for name in REFUSED_MODES:
        if arguments.get(name) is not None:
            raise ValueError(f"{name} cannot be combined with length guidance: leave it out.")
    if merged.num_beams not in (None, 1):
        raise ValueError(f"num_beams={merged.num_beams}: beam search cannot be guided, use num_beams=1.")
    if merged.eos_token_id is None:
        raise ValueError("the policy has no eos_token_id: set it in model.generation_config, or pass eos_token_id=.")
