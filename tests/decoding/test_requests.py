"""Flat keys of a request become the guidance that they name, or a sentence about the key."""

import pytest

from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.decoding.requests import KEYS, guidance_of_request, keys_of_guidance


@pytest.mark.parametrize(
    ("given", "guidance"),
    [
        ({}, None),
        ({"other": 3, "lengthy": 1}, None),
        ({"length_strength": 4.0, "length_top_k": 15}, LengthGuidance(strength=4.0, top_k=15, temperature=0.7)),
        (
            {"length_mode": "equal_to", "length_target": 50, "length_top_k": 8, "length_enforce": 1, "other": 2},
            LengthGuidance(mode="equal_to", target_length=50, top_k=8, enforce=True, temperature=0.7),
        ),
        # Without values there is nothing to score, and so no need to bound it.
        ({"length_strength": 0.0, "length_min_p": 0.1}, LengthGuidance(min_p=0.1, temperature=0.7)),
    ],
)
def test_keys_name_the_fields(given, guidance):
    assert guidance_of_request(given, temperature=0.7, max_tokens=64) == guidance


def test_every_field_has_a_key_but_the_temperature():
    assert set(KEYS.values()) == set(LengthGuidance.__dataclass_fields__) - {"temperature"}
    assert KEYS["length_target"] == "target_length" and KEYS["length_top_k"] == "top_k"


@pytest.mark.parametrize(
    "guidance",
    [
        LengthGuidance(strength=-2.0, top_k=8, top_p=0.9, candidate_mass=0.5, temperature=0.7),
        LengthGuidance(mode="equal_to", target_length=9, rule="patient", tolerance=0.2, top_k=3, enforce=True),
        LengthGuidance(mode="at_least", target_length=9, top_k=3, min_p=0.1, enforce=False),
    ],
)
def test_a_guidance_goes_through_its_keys(guidance):
    keys = keys_of_guidance(guidance)
    assert guidance_of_request(keys, guidance.temperature) == guidance
    assert None not in keys.values()


TARGET = {"length_mode": "at_most", "length_target": 20, "length_top_k": 8}


@pytest.mark.parametrize(
    ("given", "further", "named"),
    [
        ({"length_strenght": 1.0}, {}, "length_strenght"),
        ({"length_temperature": 1.0}, {}, "length_temperature"),
        ({"length_top_k": 8}, {}, "length_strength"),
        ({"length_strength": 1.0}, {}, "length_top_k"),
        ({"length_strength": 1.0, "length_top_k": 257}, {}, "length_top_k"),
        ({"length_strength": "strong", "length_top_k": 8}, {}, "strength"),
        ({**TARGET, "length_mode": "exactly"}, {}, "mode"),
        ({**TARGET, "length_strength": 2.0}, {}, "strength"),
        (TARGET, {"max_tokens": 20}, "length_target=20.*max_tokens"),
        (TARGET, {"min_tokens": 21}, "min_tokens=21"),
    ],
)
def test_what_makes_no_sense_is_told_by_its_name(given, further, named):
    with pytest.raises(ValueError, match=named):
        guidance_of_request(given, temperature=1.0, **further)
    # At its bound, the last two are fine.
    if given is TARGET:
        assert guidance_of_request(
            given, 1.0, **{name: value + (1, -1)[name == "min_tokens"] for name, value in further.items()}
        )
