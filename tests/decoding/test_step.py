"""Rows of a step that differ in guidance and in what they have written, beside the processor of a single call."""

import math
import random

import pytest
import torch
from tiny import EOS, tiny_length_value_model

from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.decoding.processor import LengthGuidedLogitsProcessor
from lenvm_rl.decoding.scoring import SlotScorer
from lenvm_rl.decoding.step import GuidedRow, guide_rows

VOCABULARY = 64
GUIDANCES = [
    LengthGuidance(strength=40.0, top_k=5),
    LengthGuidance(strength=-40.0, top_k=9, top_p=0.9, temperature=0.7),
    LengthGuidance(strength=30.0, top_k=12, candidate_mass=0.6),
    LengthGuidance(strength=25.0, min_p=0.02),
    LengthGuidance(top_k=3),
    LengthGuidance(mode="equal_to", target_length=6, rule="patient", top_k=8),
    LengthGuidance(mode="equal_to", target_length=4, rule="paper", top_k=8, enforce=True),
    LengthGuidance(mode="at_most", target_length=3, top_k=8, enforce=True),
    LengthGuidance(mode="at_least", target_length=7, top_k=8, enforce=True),
    LengthGuidance(mode="at_least", target_length=5, top_k=8, temperature=0.0),
]


def policy_scores(ids):
    """Scores that depend on the whole prefix, the end among the likely ones now and then."""
    generator = torch.Generator().manual_seed(hash(tuple(ids)) % 2**31)
    scores = 3 * torch.randn(VOCABULARY, generator=generator)
    scores[EOS] += 3.0 * (len(ids) % 3)
    return scores


def alone(model, guidance, prompt, completion):
    """What the processor says step by step, for a row by itself."""
    processor = LengthGuidedLogitsProcessor(model, guidance, eos_token_id=EOS)
    said = []
    for written in range(len(completion) + 1):
        ids = prompt + completion[:written]
        said.append(processor(torch.tensor([ids]), policy_scores(ids)[None])[0])
    return said


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_of_a_step_are_guided_as_each_alone(seed):
    """Requests come one after the other, each with its own guidance, prompt and number of tokens written."""
    rng = random.Random(seed)
    model = tiny_length_value_model()
    requests = []
    for guidance in GUIDANCES:
        prompt = [rng.randrange(6, VOCABULARY) for _ in range(rng.randrange(1, 7))]
        completion = [rng.randrange(6, VOCABULARY) for _ in range(8)]
        requests.append((guidance, prompt, completion, rng.randrange(6), alone(model, guidance, prompt, completion)))
    scorer, slots = SlotScorer(model), {}
    for time in range(14):
        live = [(n, each, time - each[3]) for n, each in enumerate(requests) if 0 <= time - each[3] <= len(each[2])]
        rng.shuffle(live)
        rows, scores = [], []
        for number, (guidance, prompt, completion, _, _), written in live:
            if number not in slots:
                slots[number] = scorer.add(prompt)
            elif written:
                scorer.append(slots[number], [completion[written - 1]])
            rows.append(GuidedRow(guidance, (EOS,), written, slots[number]))
            scores.append(policy_scores(prompt + completion[:written]))
        if not rows:
            continue
        step = guide_rows(rows, torch.stack(scores), scorer, model.config.gamma)
        for (number, each, written), found in zip(live, step.scores, strict=True):
            expected = each[4][written].log_softmax(0)
            assert torch.equal(torch.isfinite(found), torch.isfinite(expected)), (number, written)
            torch.testing.assert_close(found.log_softmax(0).exp(), expected.exp(), atol=2e-5, rtol=0)


def test_a_hard_bound_says_how_much_it_overruled():
    """The end is put: what the guided distribution gave to everything else. It is barred: what it had given the end."""
    model = tiny_length_value_model()
    scorer = SlotScorer(model)
    scores = torch.full((2, VOCABULARY), -math.inf)
    scores[:, EOS], scores[:, 7] = math.log(0.25), math.log(0.75)
    put = LengthGuidance(mode="at_most", target_length=0, top_k=2, enforce=True)
    barred = LengthGuidance(mode="at_least", target_length=2, top_k=2, enforce=True)
    rows = [GuidedRow(put, (EOS,), 0, scorer.add([8])), GuidedRow(barred, (EOS,), 0, scorer.add([8]))]
    step = guide_rows(rows, scores, scorer, model.config.gamma)
    assert step.scores.isfinite().nonzero().tolist() == [[0, EOS], [1, 7]]
    # At most 0 tokens: the end alone fits, whether it is put or not. At least 2: by prediction, or by the bound.
    assert float(step.overruled[0]) == 0.0 and 0.0 <= float(step.overruled[1]) <= 1.0
    put_later = LengthGuidance(mode="at_most", target_length=9, top_k=2, enforce=True)
    step = guide_rows([GuidedRow(put_later, (EOS,), 9, scorer.add([8]))], scores[:1], scorer, model.config.gamma)
    assert step.scores.isfinite().nonzero().tolist() == [[0, EOS]]


def test_rows_that_values_have_no_say_in_need_no_slot():
    scores = torch.randn(1, VOCABULARY)
    row = GuidedRow(LengthGuidance(top_k=3, temperature=0.5), (EOS,), 0)
    step = guide_rows([row], scores, SlotScorer(tiny_length_value_model()), 0.9)
    expected = torch.full_like(scores, -math.inf).scatter(1, *reversed_pair(scores.topk(3)))
    torch.testing.assert_close(step.scores.softmax(1), (expected / 0.5).softmax(1))


def reversed_pair(top):
    """Dimension, places and values, as `scatter` takes them after the dimension."""
    return top.indices, top.values
