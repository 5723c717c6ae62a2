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
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StopStringCriteria,
)

from lenvm_rl.endings import end_token_ids
from lenvm_rl.guidance import TILT, LengthGuidance, as_list, tilt
from lenvm_rl.guidance_report import GuidanceReport
from lenvm_rl.guided_inputs import check_call, new_tokens, prompt_mask, read_inputs
from lenvm_rl.logits_processor import LengthGuidedLogitsProcessor
from lenvm_rl.tokenization import check_same_tokenizer

__all__ = [
    "GuidanceReport",
    "LengthGuidance",
    "LengthGuidedLogitsProcessor",
    "generate_guided",
    "mean_length_at",
    "tilt",
]


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
            Without a mask, what counts as padding is for `generate` to say ([`~lenvm_rl.guided_inputs.prompt_mask`]).
        guidance ([`LengthGuidance`] or sequence of them): how to guide; one for all prompts, or one for each.
        tokenizer (*optional*): the policy's, to be compared; without it, only the sizes of the vocabularies are.
        scoring (*optional*): see [`LengthGuidedLogitsProcessor`].
        generation_config (*optional*), logits_processor (*optional*), generate_kwargs: as for `generate`.
        return_report (`bool`, *optional*, defaults to `False`): also return what guidance did to each row.

    Returns:
        What `generate` returns: ids `(B * num_return_sequences, S + T)` or an object; with `return_report`, `(that,
        report)`, see [`GuidanceReport`].

    Raises:
        ValueError: see `lenvm_rl.guided_inputs`; on tokenizers that differ, or rows that may outgrow the context.
    """
    inputs, arguments = read_inputs(inputs, generate_kwargs)
    several = as_list(guidance)
    merged = _merged_generation_config(model, several, generation_config, arguments)
    check_call(model, several, merged, generation_config, inputs, arguments)
    criteria = _stopping_criteria(arguments.pop("stopping_criteria", None) or (), merged, tokenizer)
    if tokenizer is not None:
        check_same_tokenizer(length_value_model.config.tokenizer_fingerprint, tokenizer)
    settings = {"scoring": scoring, "same_tokenizer": tokenizer is not None, "record": return_report}
    processor = _processor(length_value_model, several, inputs, merged, criteria, **settings)
    output = model.generate(
        **inputs,
        **_passed_on(arguments, model, merged, tokenizer),
        generation_config=merged,
        stopping_criteria=processor.watch(criteria),
        logits_processor=LogitsProcessorList([*logits_processor, processor]),
    )
    sequences = output if isinstance(output, Tensor) else output.sequences
    return (output, processor.finish(sequences)) if return_report else output


def _processor(
    length_value_model: nn.Module,
    guidance: list[LengthGuidance],
    inputs: Mapping[str, Tensor],
    merged: GenerationConfig,
    criteria: Sequence[StoppingCriteria],
    **settings,
) -> LengthGuidedLogitsProcessor:
    """The processor of one call, which sees the prompts that `generate` will let the policy see."""
    mask, pad = inputs.get("attention_mask"), merged.pad_token_id
    exists = prompt_mask(inputs["input_ids"], mask, pad, end_token_ids(None, merged))
    processor = LengthGuidedLogitsProcessor(
        length_value_model,
        guidance,
        eos_token_id=_ends(merged, criteria),
        attention_mask=exists,
        pad_token_id=pad,
        **settings,
    )
    processor.check_length(int(exists.sum(dim=1).max()) + max(1, new_tokens(merged, exists.shape[1], criteria)))
    return processor


def _stopping_criteria(
    given: Sequence[StoppingCriteria], merged: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None
) -> list[StoppingCriteria]:
    """The given criteria, and that of `merged.stop_strings`, which `generate` then need not make."""
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


def _passed_on(
    arguments: Mapping, model: PreTrainedModel, merged: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict:
    """The arguments of `generate` that are no settings, which stand in the merged ones."""
    passed_on = {name: value for name, value in arguments.items() if not hasattr(merged, name)}
    if tokenizer is not None and model.generation_config.stop_strings is not None:
        # `generate` fills in what the merged settings lack.
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
    devices = [model.device] if model.device.type == "cuda" else []

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
