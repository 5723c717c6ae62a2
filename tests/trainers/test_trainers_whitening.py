"""What PPO whitens: the task, each of the streams, their sum, or nothing; by hand."""

import pytest
import torch
from test_trainers_ppo import LENGTH, MASK, REWARDS, VALUES, scripted_ppo
from trainer_parts import batch_of, settings
from transformers import HfArgumentParser

from lenvm_rl.trainers import LenVMPPOConfig

ACTIONS = MASK.bool()
TASK = (torch.tensor(REWARDS).unsqueeze(1) - VALUES) * MASK
STREAMS = {"length_coef": 2.0, "length_gate": "all"}


def white(stream, counted=ACTIONS):
    kept = stream[counted]
    return torch.where(counted, (stream - kept.mean()) / (kept.std(unbiased=False) + 1e-4), 0.0)


@pytest.mark.parametrize(
    ("whiten", "expected"),
    [
        ("task", white(TASK) + 2.0 * LENGTH),
        ("streams", white(TASK) + 2.0 * white(LENGTH)),
        ("sum", white(TASK + 2.0 * LENGTH)),
        ("none", TASK + 2.0 * LENGTH),
    ],
)
def test_by_hand(tmp_path, whiten, expected):
    trainer = scripted_ppo(tmp_path, whiten=whiten, **STREAMS)
    batch = batch_of(trainer)
    torch.testing.assert_close(batch["advantages"], expected * MASK)
    # The critic's targets know nothing of it.
    torch.testing.assert_close(batch["critic_returns"] * MASK, torch.tensor(REWARDS).unsqueeze(1) * MASK)
    # Streams are logged after whitening, where they are what is whitened.
    task_std, length_std = (trainer._metrics["train"][f"advantage/{name}_std"][0] for name in ("task", "length"))
    assert (task_std == pytest.approx(1.0, abs=1e-3)) == (whiten in ("task", "streams"))
    assert (length_std == pytest.approx(1.0, abs=1e-3)) == (whiten == "streams")


def test_numbers():
    """Tokens 1, 2, 3 and 6 of two rows: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5."""
    stream, counted = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.ones(2, 2, dtype=torch.bool)
    torch.testing.assert_close(white(stream, counted), torch.tensor([[-2.0, -1.0], [0.0, 3.0]]) / (3.5**0.5 + 1e-4))


def test_without_a_length_stream_the_sum_is_the_task(tmp_path):
    ours, theirs = (batch_of(scripted_ppo(tmp_path, whiten=choice))["advantages"] for choice in ("sum", "task"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("whiten", ["streams", "sum"])
def test_what_nobody_scored_is_not_counted(tmp_path, whiten):
    rewards = [1.0, None, 1.0, 0.5]
    batch = batch_of(scripted_ppo(tmp_path, rewards=rewards, whiten=whiten, **STREAMS))
    counted = ACTIONS & torch.tensor([[True], [False], [True], [True]])
    task = torch.where(counted, torch.tensor([1.0, 0.0, 1.0, 0.5]).unsqueeze(1) - VALUES, 0.0)
    length = torch.where(counted, LENGTH, 0.0)
    parts = white(task, counted) + 2.0 * white(length, counted)
    expected = parts if whiten == "streams" else white(task + 2.0 * length, counted)
    torch.testing.assert_close(batch["advantages"], expected)


def test_completions_that_are_not_paid_count_as_zero_in_a_whitened_length_stream(tmp_path):
    batch = batch_of(scripted_ppo(tmp_path, whiten="streams", length_coef=2.0, length_gate="correct"))
    gated = LENGTH * torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    torch.testing.assert_close(batch["advantages"], (white(TASK) + 2.0 * white(gated)) * MASK)


@pytest.mark.parametrize(("text", "meaning"), [("none", "none"), ("sum", "sum"), (None, "task")])
def test_the_command_line(tmp_path, text, meaning):
    arguments = f"--output_dir {tmp_path} --use_cpu --bf16 False".split() + (["--whiten", text] if text else [])
    (config,) = HfArgumentParser(LenVMPPOConfig).parse_args_into_dataclasses(arguments)
    assert config.whiten == meaning


def test_a_choice_that_there_is_not(tmp_path):
    with pytest.raises(ValueError, match="whiten"):
        LenVMPPOConfig(**settings(tmp_path, whiten="both"))
