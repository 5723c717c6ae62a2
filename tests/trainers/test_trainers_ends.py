"""How the completions of a run end: several ids, budgets, words of others, and one token that ends and pads."""

import math

import pytest
import torch
import trl.trainer.grpo_trainer as trl_grpo
from tiny import EOS, tiny_llama, tiny_tokenizer
from trainer_parts import (
    VOCAB,
    batch_of,
    first_is_w8,
    grpo,
    logged,
    ppo,
    prompts,
    random_lenvm,
    same_weights,
    scripted,
    scripted_lenvm,
    settings,
    weights,
)
from trl import GRPOConfig, GRPOTrainer

from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer, LenVMPPOConfig, LenVMPPOTrainer
from lenvm_rl.trainers.streams import read_completions

TURN = 9


def writing(rows, pad=0):
    """A policy that writes `rows`, padded as `generate` pads them, whatever it is asked."""
    policy = tiny_llama(VOCAB, seed=1)
    width = max(map(len, rows))

    def generate(input_ids, **arguments):
        written = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
        return torch.cat([input_ids, written], dim=1)

    policy.generate = generate
    return policy


@pytest.mark.parametrize("make", [grpo, ppo])
def test_every_end_of_the_generation_settings_ends_a_row(tmp_path, make):
    rows = [[6, 8, 13, TURN], [8] * 12, [6, EOS], [8, 10, 11, 12, 13, TURN]] * 2
    trainer = make(
        tmp_path, first_is_w8, random_lenvm(), policy=writing(rows), length_coef=0.5, length_gate="all",
        max_completion_length=12, generation_kwargs={"eos_token_id": [EOS, TURN]},
    )  # fmt: skip
    batch = batch_of(trainer)
    assert batch["completion_mask"].sum(dim=1).tolist() == [4, 12, 2, 6] * 2
    # 3, 12, 1 and 5 tokens without the end, and one of four rows was cut.
    assert trainer._metrics["train"]["length/mean"] == [(3 + 12 + 1 + 5) / 4]
    assert trainer._metrics["train"]["length/truncated"] == [0.25]
    assert not batch["advantages"][batch["completion_mask"] == 0].any()


class Engine:
    """TRL's vLLM, as far as a trainer asks: it stops at strings and ids of its own, and does not say why."""

    rows: list

    def __init__(self, **options):
        self.mode = options["mode"]

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler=None, **options):
        rows = self.rows * (len(prompts) // len(self.rows))
        return prompts, [list(row) for row in rows], [[[-1.0] for _ in row] for row in rows], None


def advantages_of_vllm(tmp_path, monkeypatch, make, rows, **changes):
    engine = type("Engine", (Engine,), {"rows": rows})
    monkeypatch.setattr(trl_grpo, "VLLMGeneration", engine)
    trainer = make(
        tmp_path, first_is_w8, scripted_lenvm({8: -0.6, 10: -0.4}), use_vllm=True, length_coef=1.0, length_gate="all",
        vllm_importance_sampling_correction=False, max_completion_length=4, **changes,
    )  # fmt: skip
    return batch_of(trainer), trainer._metrics["train"]


@pytest.mark.parametrize("generation_kwargs", [{"stop_token_ids": [10]}, {"stop": ["w10"]}, {"stop": "w10"}])
@pytest.mark.parametrize("make", [grpo, ppo])
def test_stopping_is_no_cut(tmp_path, monkeypatch, make, generation_kwargs):
    short, full = [8, 8, 10], [8, 8, 8, 10]
    ended = [[8, 8, EOS], [8, 8, 8, EOS]]
    stopped, metrics = advantages_of_vllm(
        tmp_path, monkeypatch, make, [short, full], generation_kwargs=generation_kwargs
    )
    expected, _ = advantages_of_vllm(tmp_path, monkeypatch, make, ended)
    assert metrics["length/truncated"] == [0.0]
    # A stop token is an end as EOS is; a stop string is text that the policy wrote.
    assert metrics["length/mean"] == [2.5 if "stop_token_ids" in generation_kwargs else 3.5]
    if make is grpo:
        assert torch.equal(stopped["advantages"], expected["advantages"])


def test_a_row_that_used_up_its_budget_or_the_context_was_cut(tmp_path, monkeypatch):
    rows = [[8, 8], [8, 8, 8, 8]]
    _, metrics = advantages_of_vllm(tmp_path, monkeypatch, grpo, rows)
    assert metrics["length/truncated"] == [0.5]
    # Prompts of two tokens leave two of a context of four.
    _, metrics = advantages_of_vllm(tmp_path, monkeypatch, grpo, rows, vllm_max_model_length=4)
    assert metrics["length/truncated"] == [1.0]
    _, metrics = advantages_of_vllm(tmp_path, monkeypatch, grpo, rows, generation_kwargs={"max_tokens": 2})
    assert metrics["length/truncated"] == [1.0]


def test_the_critic_of_a_stopped_completion_learns_its_reward_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(trl_grpo, "VLLMGeneration", type("Engine", (Engine,), {"rows": [[8, 8, 10]]}))
    trainer = ppo(
        tmp_path, first_is_w8, use_vllm=True, truncation="bootstrap", vllm_importance_sampling_correction=False
    )
    batch = batch_of(trainer)
    assert torch.allclose(batch["critic_returns"], torch.ones(8, 3))


class Rollouts:
    """A `rollout_func`: an environment that speaks, and says whether each episode is over, if it does."""

    def __init__(self, rows, masks, finished=None):
        self.rows, self.masks, self.finished = rows, masks, finished

    def __call__(self, prompts, trainer):
        times = len(prompts) // len(self.rows)
        output = {
            "prompt_ids": [[6, 7]] * len(prompts),
            "completion_ids": [list(row) for row in self.rows * times],
            "logprobs": [[0.0] * len(row) for row in self.rows * times],
            "env_mask": [list(mask) for mask in self.masks * times],
        }
        return output if self.finished is None else {**output, "finished": self.finished * times}


def with_rollouts(tmp_path, rollouts, make=grpo, trainer=LenVMGRPOTrainer, config=LenVMGRPOConfig, **changes):
    changes = {"length_coef": 1.0, "length_gate": "all", "max_completion_length": 8, **changes}
    return trainer(
        tiny_llama(VOCAB, seed=1), first_is_w8, config(**settings(tmp_path, **changes)), train_dataset=prompts(),
        processing_class=tiny_tokenizer(VOCAB), length_value_model=scripted_lenvm({8: -0.6}), rollout_func=rollouts,
    )  # fmt: skip


def test_text_of_an_environment_ends_nothing_and_has_no_length(tmp_path):
    rows, masks = [[8, 9, 10, EOS], [8, 10, 10, EOS]], [[1, 1, 0, 0], [1, 0, 0, 1]]
    trainer = with_rollouts(tmp_path, Rollouts(rows, masks))
    batch = batch_of(trainer)
    completions = read_completions(batch, [EOS])
    assert completions.lengths.tolist()[:2] == [2, 1] and completions.finished.tolist()[:2] == [False, True]
    # The episode was over before its budget was: its environment ended it.
    assert trainer._metrics["train"]["length/mean"] == [1.5]
    assert trainer._metrics["train"]["length/truncated"] == [0.0]


def test_a_rollout_function_says_what_was_cut(tmp_path):
    rows, masks = [[8, 10], [8, EOS], [8] * 8, [8, 9]], [[1, 1], [1, 1], [1] * 8, [1, 1]]
    said = [False, False, True, True]
    trainer = with_rollouts(tmp_path, Rollouts(rows, masks, said))
    batch_of(trainer)
    assert trainer._metrics["train"]["length/truncated"] == [0.5]
    with pytest.raises(ValueError, match="finished"):
        batch_of(with_rollouts(tmp_path, Rollouts(rows, masks, said[:3])))


@pytest.mark.parametrize("finished", [None, [True, False]])
def test_a_rollout_function_without_a_budget_has_to_say_it(tmp_path, finished):
    rollouts = Rollouts([[8, 10], [8, 9]], [[1, 1], [1, 1]], finished)
    trainer = with_rollouts(tmp_path, rollouts, max_completion_length=None)
    if finished is None:
        with pytest.raises(ValueError, match="finished"):
            batch_of(trainer)
    else:
        batch_of(trainer)
        assert trainer._metrics["train"]["length/truncated"] == [0.5]


def test_where_nothing_asks_for_cuts_a_rollout_function_needs_no_budget(tmp_path):
    rollouts = Rollouts([[8, 10], [8, 9]], [[1, 1], [1, 1]], None)
    trainer = with_rollouts(tmp_path, rollouts, max_completion_length=None, length_coef=0.0)
    batch_of(trainer)
    assert math.isfinite(trainer._metrics["train"]["length/mean"][0])


def test_cuts_that_nobody_can_see_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_time"):
        grpo(tmp_path, lenvm=random_lenvm(), length_coef=0.1, generation_kwargs={"max_time": 2.0})
    with pytest.raises(ValueError, match="max_time"):
        ppo(tmp_path, generation_kwargs={"max_time": 2.0})
    grpo(tmp_path, generation_kwargs={"max_time": 2.0})
    with pytest.raises(ValueError, match="max_completion_length"):
        grpo(
            tmp_path, lenvm=random_lenvm(), shaping_coef=0.1, shaping_potential="length", max_completion_length=None
        )  # fmt: skip


@pytest.mark.parametrize("trainer_class", [LenVMGRPOTrainer, LenVMPPOTrainer])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_one_token_that_ends_and_pads_is_like_two(tmp_path, trainer_class, mask_truncated):
    """A pad that is the end and one that is not: the same batch wherever a token exists, and the same weights."""
    rows = [[8, EOS], [8, 9, 10], [EOS], [10, 8, EOS]] * 2
    config = LenVMGRPOConfig if trainer_class is LenVMGRPOTrainer else LenVMPPOConfig
    results = []
    for pad in ("<pad>", "<eos>", None):
        tokenizer = tiny_tokenizer(VOCAB)
        tokenizer.pad_token = pad
        changes = {
            "length_coef": 0.5, "length_gate": "all", "max_completion_length": 3, "max_steps": 2,
            "mask_truncated_completions": mask_truncated,
        }  # fmt: skip
        trainer = scripted(trainer_class, rows)(
            tiny_llama(VOCAB, seed=1), first_is_w8, config(**settings(tmp_path, **changes)), train_dataset=prompts(),
            processing_class=tokenizer, length_value_model=random_lenvm(),
        )  # fmt: skip
        trainer.train()
        results.append((weights(trainer.model), logged(trainer, "length/mean"), logged(trainer, "length/truncated")))
        # Without their ends: 1, 3, 0 and 2 tokens.
        assert logged(trainer, "length/mean") == [1.5, 1.5] and logged(trainer, "length/truncated") == [0.25, 0.25]
    for model, *measured in results[1:]:
        assert same_weights(results[0][0], model) and measured == list(results[0][1:])


def test_a_policy_that_pads_with_its_end_is_stock_at_zero(tmp_path):
    finals = []
    for trainer_class, config in ((GRPOTrainer, GRPOConfig), (LenVMGRPOTrainer, LenVMGRPOConfig)):
        tokenizer = tiny_tokenizer(VOCAB)
        tokenizer.pad_token = tokenizer.eos_token
        trainer = trainer_class(
            tiny_llama(VOCAB, seed=1), first_is_w8, config(**settings(tmp_path)), train_dataset=prompts(),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        finals.append(weights(trainer.model))
    assert same_weights(*finals)


class TestSingleSamples:
    """PPO needs no groups."""

    @pytest.mark.parametrize("rows", [8, 1])
    @pytest.mark.parametrize(
        "changes", [{}, {"critic": "lenvm", "task_baseline": "batch"}, {"truncation": "bootstrap"}]
    )
    def test_one_completion_of_each_prompt_trains(self, tmp_path, rows, changes):
        trainer = ppo(
            tmp_path, first_is_w8, random_lenvm(), num_generations=1, per_device_train_batch_size=rows,
            length_coef=0.5, **changes,
        )  # fmt: skip
        assert trainer.args.num_generations == trainer.num_generations == 1
        start = weights(trainer.model)
        trainer.train()
        assert trainer.state.global_step == 3
        for tensor in trainer.model.state_dict().values():
            assert bool(torch.isfinite(tensor).all())
        # A single completion with the batch for its baseline has no task advantage, but one of length where correct.
        assert changes.get("critic") == "lenvm" or not same_weights(start, weights(trainer.model))

    def test_its_advantages_are_those_of_the_same_completions_in_groups(self, tmp_path):
        rows = [[8, EOS], [9, 8, 10], [8, 8, EOS], [EOS]]
        batches = []
        for group, count in ((1, 4), (2, 2)):
            trainer = scripted(LenVMPPOTrainer, rows)(
                tiny_llama(VOCAB, seed=1), first_is_w8,
                LenVMPPOConfig(
                    **settings(tmp_path, num_generations=group, per_device_train_batch_size=4, max_completion_length=3)
                ),
                train_dataset=prompts(1).select([0] * count), processing_class=tiny_tokenizer(VOCAB),
            )  # fmt: skip
            batches.append(batch_of(trainer))
        assert torch.equal(batches[0]["advantages"], batches[1]["advantages"])
        assert torch.equal(batches[0]["critic_returns"], batches[1]["critic_returns"])

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"length_gate_center": True}, "length_gate_center"),
            ({"length_gate": "pass_rate"}, "length_gate"),
            ({"critic": "lenvm"}, "task_baseline"),
        ],
    )
    def test_what_compares_within_a_group_is_refused_with_it(self, tmp_path, changes, named):
        with pytest.raises(ValueError, match=f"num_generations.*{named}|{named}.*num_generations"):
            ppo(tmp_path, lenvm=random_lenvm(), num_generations=1, length_coef=0.1, **changes)

    def test_grpo_compares_within_a_group(self, tmp_path):
        with pytest.raises(ValueError, match="at least 2"):
            grpo(tmp_path, num_generations=1)
