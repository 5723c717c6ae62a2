"""Length guidance as a request to a server states it: flat keys, `length_` before the names of its fields.

    {"length_mode": "equal_to", "length_target": 100, "length_top_k": 15}
    {"length_strength": 4.0, "length_top_k": 15, "length_candidate_mass": 0.95}

Servers hand on numbers, texts and truth values under such keys (`vllm_xargs` of vLLM, `extra_body` of OpenAI's client).
Temperature and the most tokens are the request's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lenvm_rl.decoding.guidance import AT_MOST, EQUAL_TO, TILT, LengthGuidance

PREFIX = "length_"
# From key to field: `length_target` for `target_length`, the prefix before all others.
KEYS = {
    PREFIX + field.name.removesuffix("_length"): field.name
    for field in fields(LengthGuidance)
    if field.name != "temperature"
}
# More candidates than these in a row, at every step, are surely a mistake in a request to a server.
MOST_CANDIDATES = 256


def keys_of_guidance(guidance: LengthGuidance) -> dict[str, Any]:
    """Keys and values of a request that asks for a guidance: [`guidance_of_request`] the other way round."""
    stated = {key: getattr(guidance, field) for key, field in KEYS.items()}
    return {key: value for key, value in stated.items() if value is not None}


def guidance_of_request(
    given: Mapping[str, Any],
    temperature: float,
    max_tokens: int | None = None,
    min_tokens: int = 0,
    vocab_size: float = math.inf,
) -> LengthGuidance | None:
    """The guidance that a request asks for, `None` if none of its keys is of length guidance.

    Args:
        given (mapping): keys and values of the request; other keys are somebody else's.
        temperature (`float`): of the request; 0 is greedy.
        max_tokens (`int`, *optional*): the most tokens of a completion, end-of-sequence counted.
        min_tokens (`int`, *optional*, defaults to `0`): tokens before which the end is barred.
        vocab_size (`float`, *optional*): where it is known and small, all tokens may be candidates.

    Raises:
        ValueError: a key is not known, a value is out of its bounds, or two settings exclude each other.
    """
    stated = {key: value for key, value in given.items() if key.startswith(PREFIX)}
    if not stated:
        return None
    unknown = sorted(set(stated) - set(KEYS))
    if unknown:
        raise ValueError(f"{unknown[0]} is no setting of length guidance: there are {', '.join(sorted(KEYS))}.")
    settings = {KEYS[key]: value for key, value in stated.items()}
    if settings.get("enforce") in (0, 1):
        # Where truth values come as numbers.
        settings["enforce"] = bool(settings["enforce"])
    guidance = LengthGuidance(temperature=temperature, **settings)
    if guidance.mode == TILT and "strength" not in settings:
        raise ValueError("length_strength is missing: without it, mode 'tilt' does nothing.")
    if guidance.needs_values and min(guidance.top_k or math.inf, vocab_size) > MOST_CANDIDATES:
        raise ValueError(
            f"length_top_k must lie in [1, {MOST_CANDIDATES}], the candidates scored at every step. 15 is usual."
        )
    if guidance.mode == TILT:
        return guidance
    target = guidance.target_length
    if max_tokens is not None and max_tokens < target + 1:
        raise ValueError(
            f"length_target={target} needs max_tokens of at least {target + 1} (the end-of-sequence token is one "
            f"more), got {max_tokens}."
        )
    if guidance.mode in (EQUAL_TO, AT_MOST) and min_tokens > target:
        raise ValueError(f"min_tokens={min_tokens} bars the end beyond length_target={target}: lower it.")
    return guidance
