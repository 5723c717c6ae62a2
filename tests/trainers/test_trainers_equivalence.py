"""Ten steps that must be the same: however a batch is split over forwards and processes, however prompts are padded,
and, with all coefficients at 0, stock GRPO.

Completions follow from the prompt and the step alone, so no random number depends on the layout. What differs is the
order of float32 sums, 1e-7 of a value. SGD keeps it so small: Adam divides a gradient by its own size, so that a
rounding error in place of a gradient of 0 is a whole step (measured: weights 3e-4 apart after ten steps, not 2e-7).
"""

import random

import pytest
import torch
from launched import run_two
from places import PATHS
from resume_runs import differences, is_time
from tiny import EOS, tiny_gpt2, tiny_length_value_model, tiny_llama, tiny_tokenizer
from trainer_parts import VOCAB, counts_of_w8, first_is_w8, grpo, ppo, prompts, random_lenvm, settings, weights
from trl import GRPOConfig, GRPOTrainer

from lenvm_rl.modeling.completions import completion_logits
from lenvm_rl.modeling.critic import TaskCritic
from lenvm_rl.trainers import LenVMGRPOTrainer, LenVMPPOTrainer

COMMON = {"max_steps": 10, "optim": "sgd", "learning_rate": 0.3, "length_coef": 0.3, "shaping_coef": 0.5}
KINDS = {
    "grpo": (grpo, LenVMGRPOTrainer, {"length_gate": "correct", "length_gate_center": True}),
    "ppo": (ppo, LenVMPPOTrainer, {"length_gate": "all", "critic_learning_rate": 0.3, "whiten": "streams"}),
}
# TRL's mean over the tokens of each forward batch, of which the mean is logged, whatever their numbers of tokens.
PER_BATCH = ("entropy",)
CLIPPED = tuple(f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean"))


def scripted_rollout(prompts, trainer):
    """Completions of one to six tokens that follow from prompt, step and place in the group."""
    first, size = trainer.accelerator.process_index * len(prompts), trainer.num_generations
    completions = []
    for i, prompt in enumerate(prompts):
        dice = random.Random(f"{prompt}|{trainer.state.global_step}|{(first + i) % size}")
        ids = [dice.randint(6, VOCAB - 1) for _ in range(dice.randint(1, 6))]
        if len(ids) < 6 or dice.random() < 0.5:
            ids[-1] = EOS
        completions.append(ids)
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": completions,
        "logprobs": [[0.0] * len(ids) for ids in completions],
    }


def run(kind, folder, **changes):
    """The outcome of a run with scripted completions: weights and logs, times left out."""
    make, trainer_class, own = KINDS[kind]

    class Scripted(trainer_class):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, rollout_func=scripted_rollout, **options)

    trainer = make(folder, first_is_w8, random_lenvm(), Scripted, **{**COMMON, **own, **changes})
    trainer.train()
    return outcome(trainer)


def outcome(trainer):
    found = {"policy": weights(trainer.model), "log": log_of(trainer)}
    if getattr(trainer, "critic", None) is not None:
        found["critic"] = weights(trainer.accelerator.unwrap_model(trainer.critic))
    return found


def log_of(trainer):
    return [
        {key: value for key, value in entry.items() if not is_time(key)} for entry in trainer.state.log_history[:-1]
    ]


def assert_same(one, other, without=()):
    """The same up to the order of sums, and neither stood still."""
    assert len(one["log"]) == len(other["log"]) == 10
    for ours, theirs in zip(one["log"], other["log"], strict=True):
        assert ours.keys() == theirs.keys()
        for key in set(ours) - set(without):
            wanted = theirs[key] if theirs[key] is None else pytest.approx(theirs[key], rel=2e-5, abs=1e-6)
            assert ours[key] == wanted, (ours["step"], key)
    for part in one.keys() - {"log"}:
        for name, weight in one[part].items():
            torch.testing.assert_close(weight, other[part][name], rtol=0, atol=2e-6)
    start = tiny_llama(VOCAB, seed=1).state_dict()
    assert max(float((one["policy"][name] - start[name]).abs().max()) for name in start) > 0.02
    assert len({entry["reward"] for entry in one["log"] if "reward" in entry}) > 2


SPLITS = {
    "a step of eight rows": ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
    # Two steps of four rows in a generation of eight.
    "two steps of a generation": (
        {"per_device_train_batch_size": 4, "steps_per_generation": 2},
        {"per_device_train_batch_size": 1, "steps_per_generation": 8, "gradient_accumulation_steps": 4},
    ),
}


@pytest.mark.parametrize(("kind", "split"), [
    ("ppo", "a step of eight rows"),
    pytest.param("grpo", "a step of eight rows", marks=pytest.mark.slow),
    pytest.param("ppo", "two steps of a generation", marks=pytest.mark.slow),
    pytest.param("grpo", "two steps of a generation", marks=pytest.mark.slow),
])  # fmt: skip
def test_rows_in_one_forward_or_in_several(tmp_path, kind, split):
    one, several = SPLITS[split]
    # The bounds of the clipped ratio are those of each forward, too.
    without = (*PER_BATCH, *CLIPPED) if "steps_per_generation" in one else PER_BATCH
    assert_same(run(kind, tmp_path / "several", **several), run(kind, tmp_path / "one", **one), without)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_more_padding_on_either_side(tmp_path, kind):
    """Prompts of two or three tokens padded to sixteen on the left, and completions on the right."""
    assert_same(run(kind, tmp_path / "wide", pad_to_multiple_of=16), run(kind, tmp_path / "narrow"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_side_that_the_tokenizer_pads_on_does_not_matter(tmp_path, kind):
    """Sampled, not scripted: prompts are padded on the left whatever the tokenizer says, so not a bit differs."""
    make, trainer_class, own = KINDS[kind]

    def padding(side):
        class Padding(trainer_class):
            def __init__(self, *arguments, processing_class, **options):
                processing_class.padding_side = side
                super().__init__(*arguments, processing_class=processing_class, **options)

        return Padding

    found = {}
    for side in ("left", "right"):
        trainer = make(
            tmp_path / side, first_is_w8, random_lenvm(), padding(side), data=prompts(20), **{**COMMON, **own}
        )
        trainer.train()
        found[side] = outcome(trainer)
    assert differences(found["left"], found["right"]) == []
    assert {len(row["prompt"].split()) for row in prompts(20)} == {2, 3}


@pytest.mark.parametrize("backbone", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("kind", ["length", "task"])
def test_values_of_a_row_know_nothing_of_its_padding(backbone, kind):
    """With positions that are added to the embeddings (GPT-2) a shift of one would show."""
    backbone = backbone(VOCAB, seed=2)
    model = tiny_length_value_model(backbone, seed=2) if kind == "length" else TaskCritic.from_backbone(backbone)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    rows = [([6, 7], [8, 9, EOS]), ([7], [9, 9, 9, 9]), ([6, 8, 9, 7, 6, 10, 11, 12] * 3, [8, EOS])]
    together = completion_logits(model, *padded(rows))
    for i, row in enumerate(rows):
        alone = completion_logits(model, *padded([row]))[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=1e-5, atol=1e-6)
    assert float(together[:, :2].std()) > 0.01


def padded(rows):
    """Prompts padded on the left, completions on the right: ids and mask of each."""
    arrays = []
    for part, side in ((0, "left"), (1, "right")):
        for values in ([row[part] for row in rows], [[1] * len(row[part]) for row in rows]):
            tensors = [torch.tensor(each) for each in values]
            arrays.append(torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side))
    return arrays


def stock(folder, **changes):
    return GRPOTrainer(
        tiny_llama(VOCAB, seed=1),
        counts_of_w8,
        GRPOConfig(**settings(folder, **changes)),
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(VOCAB),
    )


@pytest.mark.parametrize("changes", [
    {"gradient_accumulation_steps": 2, "num_iterations": 2},
    pytest.param({"loss_type": "dr_grpo", "scale_rewards": "none", "pad_to_multiple_of": 8}, marks=pytest.mark.slow),
])  # fmt: skip
def test_at_zero_ten_sampled_steps_are_those_of_stock_grpo_bit_for_bit(tmp_path, changes):
    """Everything that TRL logs, and the weights; PPO without a critic, whose task stream is the group's, as well."""
    changes = {"max_steps": 10, **changes}
    theirs = stock(tmp_path / "stock", **changes)
    theirs.train()
    own = {"length_coef": 0.0, "critic": "lenvm", "whiten": "none"}
    for make, further in ((grpo, {}), (ppo, own)):
        trainer = make(tmp_path / make.__name__, lenvm=random_lenvm(), **changes, **further)
        trainer.train()
        for entry, wanted in zip(log_of(trainer), log_of(theirs), strict=True):
            assert {key: entry[key] for key in wanted} == wanted
        for name, weight in weights(theirs.model).items():
            assert torch.equal(weight, trainer.model.state_dict()[name]), name
    assert len(log_of(theirs)) == 10 and log_of(theirs)[0]["grad_norm"] > 0
    assert len({entry["reward"] for entry in log_of(theirs) if "reward" in entry}) > 3


TWO_PROCESSES = """
import sys
sys.path[:0] = {paths!r}
import torch

from test_trainers_equivalence import LAYOUT, run

found = run({kind!r}, {folder!r}, **dict(LAYOUT, per_device_train_batch_size=12, ddp_backend="gloo"))
if torch.distributed.get_rank() == 0:
    torch.save(found, {result!r})
"""
# Three groups of eight: the second one lies half on each of two processes.
LAYOUT = {"num_generations": 8, "per_device_train_batch_size": 24}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_process_or_two(tmp_path, kind):
    script, result = tmp_path / "two.py", tmp_path / "two.pt"
    script.write_text(TWO_PROCESSES.format(paths=PATHS, kind=kind, folder=str(tmp_path / "two"), result=str(result)))
    run_two(script)
    assert_same(torch.load(result, weights_only=True), run(kind, tmp_path / "one", **LAYOUT))
