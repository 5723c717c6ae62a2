"""Refresh: what a re-fit fits, when it happens, that nothing else moves, and that a checkpoint holds it."""

from array import array

import pytest
import torch
from peft import LoraConfig
from test_sharing import make_model
from test_trainers_coefficient import table
from tiny import tiny_llama, tiny_tokenizer
from trainer_parts import (
    VOCAB,
    counts_of_w8,
    first_is_w8,
    grpo,
    logged,
    no_reward,
    ppo,
    ppo_whose_first_is_best,
    prompts,
    random_lenvm,
    same_weights,
    scripted_lenvm,
    weights,
)

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer, refresh
from lenvm_rl.trainers.refresh import LengthValueRefresh, refit, squared_errors
from lenvm_rl.trainers.streams import Completions


def row(prompt, completion, finished=True, correct=True, actions=None):
    return {
        "prompt_ids": array("i", prompt), "completion_ids": array("i", completion), "group": 0,
        "action_mask": array("b", actions or [1] * len(completion)),
        "finish_reason": "stop" if finished else "length", "correct": correct,
    }  # fmt: skip


ROWS = [
    row([6, 7], [8, 9, 1]),
    row([7], [9, 9, 9, 9, 1]),
    row([6], [8, 1], correct=False),
    row([9, 6, 7], [7, 7], False),
]


def arguments(tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "refresh_steps": 2, "refresh_learning_rate": 1e-2,
        "num_generations": 4, "per_device_train_batch_size": 4,
    }  # fmt: skip
    return LenVMGRPOConfig(**{**settings, **changes})


def test_squared_errors_by_hand():
    """gamma = 1/2, V = -0.8 after w8 and -0.5 elsewhere. A finished completion of 2 tokens has G = -3/4, -1/2; one that
    was cut after 2 goes on with V(s_2) = -0.8: G = -3/4 - 1/4 * 0.8 = -0.95 and -1/2 - 1/2 * 0.8 = -0.9. A token that
    nobody chose is no state and costs nothing: G = -1/2 at the one action before it."""
    rows = [row([6], [7, 1]), row([6, 6], [7, 8], finished=False), row([8], [7, 9, 1], actions=[1, 0, 0])]
    lenvm = scripted_lenvm({8: -0.8})
    for one, expected, states in zip(rows, (0.25**2, 0.45**2 + 0.4**2, 0.3**2), (2, 2, 1), strict=True):
        errors, count = squared_errors(lenvm, [one], 0.5, "cpu")
        assert (errors.item(), int(count)) == (pytest.approx(expected), states)
    together, count = squared_errors(lenvm, rows, 0.5, "cpu")
    assert (together.item(), int(count)) == (pytest.approx(0.25**2 + 0.45**2 + 0.4**2 + 0.3**2), 5)


def test_a_cut_behind_tool_output_goes_on_where_the_row_ends():
    """V = -0.8 after w8: G = -.95 and -.9 at the two actions, with a tool between."""
    cut = row([6], [7, 9, 9, 8], finished=False, actions=[1, 0, 0, 1])
    errors, count = squared_errors(scripted_lenvm({8: -0.8}), [cut], 0.5, "cpu")
    assert (errors.item(), int(count)) == (pytest.approx(0.45**2 + 0.4**2), 2)


def test_a_step_is_one_of_adam_on_the_token_mean(tmp_path):
    args = arguments(tmp_path)
    ours, theirs = random_lenvm(), random_lenvm()
    losses = refit(ours.freeze(), ours, ROWS, args, seed=0, chunk_size=2)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=args.refresh_learning_rate, weight_decay=0.0)
    errors, count = squared_errors(theirs, ROWS, theirs.config.gamma, "cpu")
    loss = errors / count
    loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    optimizer.step()
    assert losses == [pytest.approx(loss.item(), rel=1e-5)]
    for ours_, theirs_ in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_, theirs_, atol=2e-5, rtol=1e-4)


def test_how_rows_are_cut_into_forwards_does_not_matter(tmp_path):
    models = [random_lenvm(), random_lenvm()]
    for model, chunk in zip(models, (1, 4), strict=True):
        refit(model, model, ROWS, arguments(tmp_path), seed=0, chunk_size=chunk)
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-4)


def test_it_finds_the_values_of_what_it_is_fitted_to(tmp_path, monkeypatch):
    """Completions of 2 or 6 tokens with equal chance: at the prompt V is the mean of the two returns."""
    model = random_lenvm(gamma=0.8)
    rows = [row([6], [8, 1]), row([6], [9, 9, 9, 9, 9, 1])] * 8 * 150
    monkeypatch.setattr(refresh, "BATCH_SIZE", 16)
    # As many of either kind in each step.
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    args = arguments(tmp_path)
    losses = refit(model, model, rows, args, seed=0, chunk_size=16)
    mean = -(1 - 0.8**2 + 1 - 0.8**6) / 2
    value = model(torch.tensor([[6]])).values.item()
    assert value == pytest.approx(mean, abs=0.01)
    # What is left of the loss is the variance that the prompt cannot tell, on two of the eight tokens.
    assert losses[-1] == pytest.approx(((1 - 0.8**2) - (1 - 0.8**6)) ** 2 / 4 * 2 / 8, rel=0.05) and losses[0] > 0.03


def test_processes_take_the_same_number_of_steps(tmp_path, monkeypatch):
    """A process with few rows, or none in a step, goes along with the gradients of the others."""
    model = random_lenvm()
    monkeypatch.setattr(refresh, "BATCH_SIZE", 2)
    args = arguments(tmp_path)
    other = [row([7], [9, 1])] * 5
    total = 1 + len(other)
    calls = []

    def reduce(sums):
        calls.append(sums.shape)
        return torch.full_like(sums, total) if len(calls) == 1 else sums

    losses = refit(model, model, [row([6], [8, 1])], args, seed=0, chunk_size=4, num_processes=2, reduce=reduce)
    assert len(losses) == 3


class Step(LenVMGRPOTrainer):
    """Remembers what was done, in order."""

    done: list

    def _generate_single_turn(self, *args, **kwargs):
        self.done.append("generate")
        return super()._generate_single_turn(*args, **kwargs)


@pytest.fixture
def spied(monkeypatch):
    """Every re-fit, with the completions that it was given."""
    done, inner = [], refresh.refit

    def spy(model, placed, rows, *arguments, **options):
        done.append(("refit", len(rows), all(one["correct"] for one in rows)))
        return inner(model, placed, rows, *arguments, **options)

    monkeypatch.setattr(refresh, "refit", spy)
    return done


def test_it_comes_between_phases_and_knows_earlier_batches_only(tmp_path, spied):
    lenvm = random_lenvm()
    start = weights(lenvm)
    trainer = grpo(
        tmp_path, counts_of_w8, lenvm, trainer=Step, length_coef=0.5, refresh_steps=2, refresh_completions=12,
        max_steps=5, refresh_learning_rate=1e-3,
    )  # fmt: skip
    trainer.done = spied
    trainer.train()
    # Eight completions a step: sixteen are there before the third, of which the last twelve are kept.
    generate, fit = "generate", ("refit", 12, False)
    assert trainer.done == [generate, generate, fit, generate, generate, fit, generate]
    assert logged(trainer, "refresh/completions") == [12.0, 12.0]
    assert not same_weights(start, weights(lenvm))
    assert lenvm.frozen and not any(weight.requires_grad for weight in lenvm.parameters()) and not lenvm.training


def test_what_it_says_of_a_batch_does_not_depend_on_its_outcome(tmp_path):
    """The same run up to the third batch, whose reward is another: the values of that batch are the same."""
    seen = []
    for third in (0.0, 1.0):
        calls = []

        def reward(completion_ids, third=third, calls=calls, **kwargs):
            calls.append(1)
            return [third if len(calls) == 3 else ids[0] / 10 for ids in completion_ids]

        trainer = grpo(
            tmp_path / str(third), reward, random_lenvm(), length_coef=0.5, refresh_steps=2, refresh_only_correct=True
        )
        trainer.train()
        seen.append(logged(trainer, "lenvm/value_mean"))
    assert seen[0] == seen[1] and len(set(seen[0])) == 3


def test_only_correct_ones_where_asked(tmp_path, spied):
    grpo(
        tmp_path, first_is_w8, random_lenvm(), length_coef=0.5, refresh_steps=1, refresh_only_correct=True, max_steps=3
    ).train()
    assert spied and all(correct for _, _, correct in spied)


def test_none_correct_leaves_it_as_it_is(tmp_path, spied, caplog):
    lenvm = random_lenvm()
    start = weights(lenvm)
    trainer = grpo(tmp_path, no_reward, lenvm, length_coef=0.5, refresh_steps=1, refresh_only_correct=True)
    trainer.train()
    assert spied == [] and same_weights(start, weights(lenvm))
    assert "none of the last 8 completions is correct" in caplog.text
    assert logged(trainer, "refresh/completions") == [0.0, 0.0]


@pytest.mark.parametrize("form", ["adapter", "head"])
def test_a_shared_base_is_not_moved(tmp_path, form):
    base = tiny_llama(VOCAB, seed=1)
    lenvm = make_model(form, base, tokenizer=tiny_tokenizer(VOCAB))
    start, before = weights(lenvm), weights(base)

    class WithAdapters(LenVMGRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, peft_config=LoraConfig(target_modules=["q_proj"], r=2))

    grpo(tmp_path, lenvm=lenvm, trainer=WithAdapters, policy=base, length_coef=0.5, refresh_steps=1).train()
    assert not same_weights(start, weights(lenvm))
    after = {name.replace(".base_layer", ""): tensor for name, tensor in weights(base).items() if "lora" not in name}
    assert same_weights(before, after)


def test_its_state_comes_back(tmp_path):
    args = arguments(tmp_path, refresh_completions=4)

    class One:
        num_processes, process_index, distributed_type = 1, 0, "NO"

        @staticmethod
        def reduce(sums, reduction):
            return sums

    first, second = (LengthValueRefresh(random_lenvm(seed=seed), args, One) for seed in (1, 2))
    first.rollouts.extend(ROWS)
    first.run_if_due(first.model, 2, 4)
    first.save(str(tmp_path / "checkpoint"), is_main_process=True)
    second.load(str(tmp_path / "checkpoint"))
    second.load_state_dict(first.state_dict())
    assert same_weights(weights(first.model), weights(second.model)) and second.last_step == 2
    assert list(first.rollouts) == list(second.rollouts) == ROWS
    assert second.run_if_due(second.model, 3, 4) == {} and second.run_if_due(second.model, 4, 4)
    (tmp_path / "checkpoint" / "refresh" / "completions_rank0.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="by fewer processes"):
        second.load(str(tmp_path / "checkpoint"))


def test_a_second_run_of_the_same_trainer_is_re_fitted_as_well(tmp_path, spied):
    trainer = grpo(
        tmp_path, first_is_w8, random_lenvm(), length_coef=0.1, length_gate="all", refresh_steps=2, max_steps=6
    )
    for _ in range(2):
        trainer.train()
        assert [entry["step"] for entry in trainer.state.log_history if "refresh/completions" in entry] == [3, 5]


def test_the_best_model_comes_with_the_length_value_model_of_its_step(tmp_path):
    trainer = ppo_whose_first_is_best(
        tmp_path, every=2, lenvm=random_lenvm(), length_coef=0.1, length_gate="all", refresh_steps=1,
        refresh_learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    first, last = (
        weights(LengthValueModel.from_pretrained(tmp_path / f"checkpoint-{step}" / "refresh" / "length_value_model"))
        for step in (2, 4)
    )
    assert same_weights(weights(trainer.length_value_model), first) and not same_weights(first, last)


def test_completions_of_a_batch_are_rollouts():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    batch = {
        "prompt_ids": torch.tensor([[0, 6], [7, 8], [0, 9]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1], [0, 1]]),
        "completion_ids": torch.tensor([[8, 9, 1], [7, 0, 0], [7, 7, 7]]),
        "completion_mask": mask,
    }
    finished = torch.tensor([True, False, False])
    completions = Completions(mask, mask, finished, mask.sum(dim=1) - finished.long())
    # A completion that was left out of the loss has no tokens here.
    assert refresh.rollouts_of(batch, completions, torch.tensor([False, True, True])) == [
        row([6], [8, 9, 1], correct=False),
        row([7, 8], [7], finished=False),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refresh_steps": -1}, "refresh_steps=-1"),
        ({"refresh_steps": 0}, "refresh_learning_rate=0.01 is read with refresh_steps"),
        ({"refresh_steps": 1, "refresh_completions": 0}, "refresh_completions=0"),
        ({"refresh_steps": 1, "refresh_learning_rate": 0.0}, "refresh_learning_rate"),
    ],
)
def test_arguments_out_of_bounds(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_what_cannot_be_refreshed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="length_value_model"):
        grpo(tmp_path, refresh_steps=1)
    with pytest.raises(ValueError, match="refresh_steps.*shaping_coef"):
        ppo(tmp_path, lenvm=random_lenvm(), refresh_steps=1, shaping_coef=0.5)
    with pytest.raises(ValueError, match="load it in float32"):
        grpo(tmp_path, lenvm=random_lenvm().to(torch.float16), refresh_steps=1)
    with pytest.raises(ValueError, match="rollout_guidance"):
        grpo(tmp_path, lenvm=random_lenvm(), refresh_steps=1, rollout_guidance={"strength": 1.0})
    for kind in ("FSDP", "DEEPSPEED"):
        fake = type("Accelerator", (), {"distributed_type": kind, "num_processes": 1})
        with pytest.raises(ValueError, match="refresh_steps.*FSDP"):
            LengthValueRefresh(random_lenvm(), arguments(tmp_path), fake)


def test_without_a_critic_shaping_and_refresh_go_together(tmp_path):
    trainer = ppo(tmp_path, lenvm=random_lenvm(), critic="lenvm", refresh_steps=1, shaping_coef=0.5)
    trainer.train()
    assert len(logged(trainer, "refresh/loss_last")) == 2


def test_the_page_lists_what_a_refresh_logs(tmp_path):
    trainer = grpo(tmp_path, lenvm=random_lenvm(), length_coef=0.1, max_steps=2, refresh_steps=1)
    trainer.train()
    trainer.evaluate(prompts(4))
    first, second, *_, evaluation = (set(entry) for entry in trainer.state.log_history)
    assert second - first == table("Refresh") and first <= second
    assert not {name for name in evaluation if "refresh" in name}
