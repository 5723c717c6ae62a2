"""Values along completions that are already sampled: by hand on a countdown, and against the model row by row."""

import math
from types import SimpleNamespace

import pytest
import torch
from ragged import make_rollout
from tiny import EOS, tiny_gpt2, tiny_length_value_model, tokens

from eval.viewer.tokens import token_values
from lenvm_rl.returns import discounted_return, remaining_from_logits
from lenvm_rl.sandbox.scripted import START, ScriptedLengthValue, countdown_chain

GAMMA = 0.9


def read(model, prompts, completions, *, finished, **settings):
    ends = ["stop" if end else "length" for end in finished]
    rows = zip(prompts, completions, ends, strict=True)
    return token_values(model, [make_rollout(*row) for row in rows], **settings)


def three():
    return ScriptedLengthValue.from_chain(countdown_chain([0.5, 0.0, 0.5]), GAMMA)


def test_a_countdown_by_hand():
    # One or three tokens are written before the end, with equal chance.
    long, short = [START + 3, START + 2, START + 1, EOS], [START + 1, EOS]
    found = read(three(), [[START]] * 2, [long, short], finished=[True, True])
    value = -(1 - (GAMMA**4 + GAMMA**2) / 2)
    at_start = math.log(1 + value) / math.log(GAMMA)
    torch.testing.assert_close(found[0].remaining, torch.tensor([at_start, 3, 2, 1]).double(), atol=1e-4, rtol=0)
    expected = discounted_return(torch.tensor([3, 2, 1]).double(), GAMMA)
    torch.testing.assert_close(found[0].values, torch.cat([torch.tensor([value]), expected]), atol=1e-6, rtol=0)
    # The first token decides; then nothing is left to chance, and the end is worth exactly what it was expected to be.
    first = (1 - GAMMA) - GAMMA * -(1 - GAMMA**3) + value
    torch.testing.assert_close(found[0].horizon_shift, torch.tensor([first, 0, 0, 0]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        found[0].shift_in_tokens, torch.tensor([3 + 1 - at_start, 0, 0, 0]).double(), atol=1e-4, rtol=0
    )
    first = (1 - GAMMA) - GAMMA * -(1 - GAMMA) + value
    torch.testing.assert_close(found[1].horizon_shift, torch.tensor([first, 0]).double(), atol=1e-6, rtol=0)
    assert first < 0 < found[0].horizon_shift[0]


class Constant(torch.nn.Module):
    """The same logit everywhere, after an end of sequence too."""

    config, device = SimpleNamespace(gamma=GAMMA), torch.device("cpu")

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=torch.zeros(input_ids.shape))


def test_the_value_after_the_end_is_zero_whatever_the_model_says():
    (ended,) = read(Constant().eval(), [[3]], [[4, EOS]], finished=[True])
    assert ended.horizon_shift[-1] == pytest.approx((1 - GAMMA) - 0.5)
    assert ended.shift_in_tokens[-1] == pytest.approx(1 - math.log(0.5) / math.log(GAMMA))
    # A cut one goes on: nothing that the model says of the state after it is known to be wrong.
    (cut,) = read(Constant().eval(), [[3]], [[4, 5]], finished=[False])
    assert cut.horizon_shift[-1] == pytest.approx((1 - GAMMA) + GAMMA * 0.5 - 0.5)
    assert cut.shift_in_tokens[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("max_tokens", [1, 40, 16384])
def test_batches_of_any_size_give_what_each_row_gives_alone(max_tokens):
    # Absolute positions: a row that is shifted by padding would show.
    model = tiny_length_value_model(tiny_gpt2(), gamma=GAMMA).freeze()
    lengths = [(3, 7), (9, 1), (1, 12), (5, 5), (2, 30), (8, 2), (1, 1)]
    pairs = [(tokens(1, p, seed=n)[0].tolist(), tokens(1, c, seed=n + 50)[0].tolist()) for n, (p, c) in
             enumerate(lengths)]  # fmt: skip
    finished = [n % 2 == 0 for n in range(len(pairs))]
    completions = [[*c[:-1], EOS] if end else c for (_, c), end in zip(pairs, finished, strict=True)]
    prompts = [prompt for prompt, _ in pairs]
    found = read(model, prompts, completions, finished=finished, max_tokens=max_tokens)
    for prompt, completion, end, own in zip(prompts, completions, finished, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 :].double()
        remaining, values = remaining_from_logits(logits, GAMMA), -torch.sigmoid(logits)
        if end:
            remaining[-1] = values[-1] = 0.0
        near = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(own.remaining, remaining[:-1], **near)
        torch.testing.assert_close(own.values, values[:-1], **near)
        torch.testing.assert_close(own.horizon_shift, (1 - GAMMA) - GAMMA * values[1:] + values[:-1], **near)
        torch.testing.assert_close(own.shift_in_tokens, remaining[1:] + 1 - remaining[:-1], **near)
        assert own.values.dtype == torch.float64 and len(own.values) == len(completion)


def test_rows_of_similar_length_share_a_forward(monkeypatch):
    shapes = []
    model = three()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **rest: shapes.append(tuple(input_ids.shape))
                        or forward(input_ids, **rest))  # fmt: skip
    long = [START + 3, START + 2, START + 1]
    rows = [long * 4, [START + 1], long * 4, [START + 2], [START + 1]]
    read(model, [[START]] * 5, rows, finished=[False] * 5, max_tokens=26)
    assert shapes == [(2, 13), (3, 2)]


@pytest.mark.parametrize(
    ("prompts", "completions", "finished", "settings", "problem"),
    [
        ([[]], [[4]], [True], {}, "prompt_ids of completions \\[0\\]"),
        ([[3], [3]], [[4], []], [True, True], {}, "completion_ids of completions \\[1\\]"),
    ],
)
def test_what_cannot_be_read_is_refused(prompts, completions, finished, settings, problem):
    with pytest.raises(ValueError, match=problem):
        read(three(), prompts, completions, finished=finished, **settings)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        read(tiny_length_value_model().train(), [[3]], [[4]], finished=[True])
