"""`model.generate` under length guidance: what is passed on to it, what the guidance owns, and what cannot be guided.

[`LengthGuidance`] says how to guide, see `lenvm_rl.decoding.guidance` for the rules. [`LengthGuidedLogitsProcessor`]
acts inside any `generate`; [`generate_guided`] sets that `generate` up and checks it. The rows of a batch may be guided
differently.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StopStringCriteria,
)

from lenvm_rl.decoding.guidance import AT_MOST, EQUAL_TO, TILT, LengthGuidance, as_list
from lenvm_rl.decoding.processor import LengthGuidedLogitsProcessor
from lenvm_rl.endings import end_token_ids
from lenvm_rl.modeling.backbones import CACHE_NAMES
from lenvm_rl.modeling.completions import prompt_mask
from lenvm_rl.tokenization import check_same_tokenizer

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
    **generate_kwargs: Any,
) -> Any:
    """`model.generate` under length guidance.

    `do_sample`, `temperature`, `top_k`, `top_p` and `min_p` come from the guidance, whatever the model's own generation
    config says; as arguments they are refused unless they say the same. Everything else (`max_new_tokens`,
    `stopping_criteria`, …) is passed on. `repetition_penalty` and processors given here belong to the policy.

    Args:
        model (`transformers.PreTrainedModel`): the policy.
        length_value_model (`LengthValueModel`): frozen, in eval mode, with the policy's tokenizer.
        inputs (`torch.Tensor` of shape `(B, S)` or mapping): prompts padded on the left, ids or with `attention_mask`.
            Without a mask, what counts as padding is for `generate` to say
            ([`~lenvm_rl.modeling.completions.prompt_mask`]).
        guidance ([`LengthGuidance`] or sequence of them): how to guide; one for all prompts, or one for each.
        tokenizer (*optional*): the policy's, to be compared; without it, only the sizes of the vocabularies are.
        scoring (*optional*): see [`LengthGuidedLogitsProcessor`].
        generation_config (*optional*), logits_processor (*optional*), generate_kwargs: as for `generate`.
        return_report (`bool`, *optional*, defaults to `False`): also return what guidance did to each row.

    Returns:
        What `generate` returns: ids `(B * num_return_sequences, S + T)` or an object; with `return_report`, a pair of
        this and a [`GuidanceReport`].

    Raises:
        ValueError: the tokenizers differ, rows may outgrow the context, or what is asked for cannot be guided.
    """
    inputs, arguments = _named_inputs(inputs, generate_kwargs)
    several = as_list(guidance)
    merged = _merged_generation_config(model, several, generation_config, arguments)
    _check_call(model, several, merged, generation_config, inputs, arguments)
    criteria = _stopping_criteria(arguments.pop("stopping_criteria", None) or (), merged, tokenizer)
    if tokenizer is not None:
        check_same_tokenizer(length_value_model.config.tokenizer_fingerprint, tokenizer)
    # The processor sees the prompts that `generate` will let the policy see.
    pad = merged.pad_token_id
    exists = prompt_mask(inputs["input_ids"], inputs.get("attention_mask"), pad, end_token_ids(None, merged))
    processor = LengthGuidedLogitsProcessor(
        length_value_model,
        several,
        eos_token_id=_ends(merged, criteria),
        attention_mask=exists,
        pad_token_id=pad,
        scoring=scoring,
        same_tokenizer=tokenizer is not None,
        record=return_report,
    )
    processor.check_length(int(exists.sum(dim=1).max()) + max(1, _new_tokens(merged, exists.shape[1], criteria)))
    # Settings stand in the merged config.
    passed_on = {name: value for name, value in arguments.items() if not hasattr(merged, name)}
    if tokenizer is not None and model.generation_config.stop_strings is not None:
        # `generate` fills in what the merged settings lack.
        passed_on["tokenizer"] = tokenizer
    output = model.generate(
        **inputs,
        **passed_on,
        generation_config=merged,
        stopping_criteria=processor.watch(criteria),
        logits_processor=LogitsProcessorList([*logits_processor, processor]),
    )
    sequences = output if isinstance(output, Tensor) else output.sequences
    return (output, processor.finish(sequences)) if return_report else output


def mean_length_at(
    model: PreTrainedModel,
    length_value_model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    guidance: LengthGuidance,
    *,
    seed: int,
    **generate_kwargs: Any,
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
    devices = [model.device] if model.device.type == "cuda" else []

    def measure(strength: float) -> float:
        guided = replace(guidance, strength=strength)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            _, report = generate_guided(
                model, length_value_model, inputs, guided, return_report=True, **generate_kwargs
            )
        return float(report.lengths.float().mean())

    return measure


def _named_inputs(inputs, arguments: Mapping) -> tuple[dict[str, Tensor], dict]:
    """Inputs by name, and the arguments that are none: a mask may be given either way."""
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


def _merged_generation_config(model, guidance, generation_config, arguments: Mapping) -> GenerationConfig:
    """The settings that `generate` is to use: what guidance owns, then arguments, the given config, and the model's."""
    merged = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    merged.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    sampled = any(each.temperature > 0 for each in guidance)
    owned = {"do_sample": sampled, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    # Unset, so that `generate` makes no warper for it, unless it would then fill in the model's own.
    owned["min_p"] = None if model.generation_config.min_p is None else 0.0
    merged.update(**{**arguments, **owned})
    return merged


def _stopping_criteria(given: Sequence[StoppingCriteria], merged, tokenizer) -> list[StoppingCriteria]:
    """The given criteria, and one of `merged.stop_strings`, which `generate` then need not make."""
    stop_strings, merged.stop_strings = merged.stop_strings, None
    if stop_strings is None or any(type(each) is StopStringCriteria for each in given):
        return list(given)
    if tokenizer is None:
        raise ValueError("stop_strings needs the tokenizer whose text is searched: give tokenizer=.")
    return [*given, StopStringCriteria(tokenizer, stop_strings)]


def _ends(merged: GenerationConfig, criteria: Sequence[StoppingCriteria]) -> list[int]:
    """The ids that end a row: a given criterion takes the place of the one that `generate` would make."""
    given = [each.eos_token_id for each in criteria if type(each) is EosTokenCriteria]
    ends = end_token_ids(None, given[0] if given else merged)
    if not ends:
        raise ValueError("the policy has no eos_token_id: set it in model.generation_config, or pass eos_token_id=.")
    return ends


def _new_tokens(merged: GenerationConfig, prompt_width: int, criteria: Sequence[StoppingCriteria]) -> int:
    """The most tokens that `generate` will write after prompts that are so wide, padding included."""
    for each in criteria:
        # It takes the place of the one that `generate` would make.
        if type(each) is MaxLengthCriteria:
            return each.max_length - prompt_width
    if merged.max_new_tokens is not None:
        return merged.max_new_tokens
    return DEFAULT_NEW_TOKENS if merged.max_length is None else merged.max_length - prompt_width


def _check_call(model, guidance: list[LengthGuidance], merged, given, inputs: Mapping, arguments: Mapping) -> None:
    """Refuses what cannot be done: by the merged settings, the config that was `given`, inputs, and arguments."""
    rows, width = inputs["input_ids"].shape
    if len(guidance) not in (1, rows):
        raise ValueError(f"{len(guidance)} guidances do not fit {rows} prompts: give one, or one for each.")
    for each in dict.fromkeys(guidance):
        _check_settings(each, len(set(guidance)) == 1, given, arguments)
        _check_room(each, merged, width, arguments.get("stopping_criteria") or ())
    _check_generation(merged, arguments)
    if any(each.needs_values for each in guidance):
        _check_seen(model, merged, {**inputs, **arguments})


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


def _check_room(guidance: LengthGuidance, merged: GenerationConfig, prompt_width: int, criteria) -> None:
    """Refuses a target that completions cannot reach, or not be held to; the end takes a token, too."""
    if guidance.mode == TILT:
        return
    target, room = guidance.target_length, _new_tokens(merged, prompt_width, criteria)
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
