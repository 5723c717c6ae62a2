"""Value pretraining: targets and metrics against hand counts, one loss for every split of a batch, and a law it must find."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import tiny_llama, tiny_qwen2, tiny_tokenizer

from lenvm_rl.collation import LengthValueCollator, check_isolation
from lenvm_rl.modeling import LengthValueModel
from lenvm_rl.packing import unpack
from lenvm_rl.pretraining import (
    LengthValueTrainer,
    LengthValueTrainingArguments,
    fit_gamma_to_rollouts,
    length_value_loss,
    make_length_value_model,
    prepare_rollouts,
    pretrain,
)
from lenvm_rl.rollouts import RolloutMetadata
from lenvm_rl.targets import CUT, ENDLESS, FINISHED, IGNORED, value_targets
from lenvm_rl.tokenization import tokenizer_fingerprint

GAMMA = 0.9
EOS = 1


def make_rollout(prompt, completion, reason="stop", group=0, **extra):
    return {
        "prompt": "",
        "prompt_ids": list(prompt),
        "completion_ids": list(completion),
        "finish_reason": reason,
        "group": group,
        **extra,
    }


def random_rollouts(count, seed=0, longest=12, cut_share=0.3):
    """Ragged rollouts over ids 6..63, some of them cut."""
    draw = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(6, 64, (length,), generator=draw).tolist()

    rollouts = []
    for index in range(count):
        prompt = ids(int(torch.randint(1, 7, (), generator=draw)))
        completion = ids(int(torch.randint(1, longest, (), generator=draw)))
        cut = bool(torch.rand((), generator=draw) < cut_share)
        rollouts.append(make_rollout(prompt, completion if cut else [*completion, EOS], "length" if cut else "stop", index // 2))
    return rollouts


def make_metadata(tokenizer, truncated_share=0.0):
    return RolloutMetadata("policy", tokenizer_fingerprint(tokenizer), {}, 0, [EOS], truncated_share=truncated_share)


def make_args(tmp_path, **changes):
    settings = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    return LengthValueTrainingArguments(str(tmp_path / "out"), **{**settings, **changes})


# Targets


def test_targets_by_hand():
    # Columns: one finished completion of 3 tokens, then one cut after 2 tokens whose last state is worth -0.4.
    remaining = torch.tensor([[IGNORED, 3, 2, 1, IGNORED, 2, 1, IGNORED]])
    values = torch.tensor([[9.0, -0.1, -0.2, -0.3, 9.0, -0.5, -0.6, -0.4]])
    endings = torch.tensor([[FINISHED] * 5 + [CUT] * 2 + [FINISHED]])
    finished = [-0.875, -0.75, -0.5]
    cut = [-0.75 - 0.25 * 0.4, -0.5 - 0.5 * 0.4]
    expected = torch.tensor([[0.0, *finished, 0.0, *cut, 0.0]])
    torch.testing.assert_close(value_targets(values, remaining, endings, 0.5), expected)
    endless = torch.where(endings == CUT, ENDLESS, endings)
    torch.testing.assert_close(value_targets(values, remaining, endless, 0.5)[0, 5:7], torch.tensor([-1.0, -1.0]))
    # One step of temporal difference: -0.5 + 0.5 V(next).
    td = [-0.5 - 0.5 * 0.2, -0.5 - 0.5 * 0.3, -0.5]
    expected = torch.tensor([[0.0, *td, 0.0, -0.5 - 0.5 * 0.6, -0.5 - 0.5 * 0.4, 0.0]])
    torch.testing.assert_close(value_targets(values, remaining, endings, 0.5, lam=0.0), expected)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 0.9999999])
@pytest.mark.parametrize("truncated", ["bootstrap", "infinite", "finished"])
def test_lambda_returns_equal_a_loop(lam, truncated):
    rollouts = random_rollouts(9, longest=40)
    batch = LengthValueCollator(truncated=truncated)(rollouts)
    values = -torch.rand(batch["labels"].shape, dtype=torch.double)
    targets = value_targets(values, batch["labels"], batch["endings"], GAMMA, lam)
    for rollout, (row, first, length, finished, _) in zip(rollouts, batch["sequences"].tolist(), strict=True):
        cut_value = {"bootstrap": values[row, min(first + length, values.shape[1] - 1)], "infinite": -1.0, "finished": 0.0}
        target = 0.0 if finished else cut_value[truncated]
        following = target
        for step in reversed(range(length)):
            target = -(1 - GAMMA) + GAMMA * ((1 - lam) * following + lam * target)
            following = values[row, first + step]
            assert targets[row, first + step] == pytest.approx(float(target), abs=1e-12)
        assert length == len(rollout["completion_ids"])
    if lam > 0.99:
        torch.testing.assert_close(targets, value_targets(values, batch["labels"], batch["endings"], GAMMA), atol=1e-5, rtol=0)


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_poison_where_there_is_no_state_changes_nothing(lam):
    batch = LengthValueCollator(row_length=16)(random_rollouts(7, longest=9))
    states = batch["labels"] != IGNORED
    # The value at a cut is read, though it is not fitted.
    read = states.clone()
    for row, first, length, finished, _ in batch["sequences"].tolist():
        if not finished:
            read[row, first + length] = True
    clean = -torch.rand(states.shape)
    losses, gradients = [], []
    for poison in (0.0, float("nan"), 999.0):
        values = torch.where(read, clean, torch.full_like(clean, poison)).requires_grad_()
        targets = value_targets(values, batch["labels"], batch["endings"], GAMMA, lam)
        assert not targets.requires_grad
        loss = length_value_loss(values, targets, states)
        loss.backward()
        losses.append(loss.item())
        gradients.append(values.grad)
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    assert not gradients[0][~states].any()


# Collation


def test_a_batch_by_hand():
    rollouts = [
        make_rollout([10, 11], [12, 13, EOS], group=4),
        make_rollout([20], [21, 22], "length", group=5),
    ]
    batch = LengthValueCollator(row_length=8)(rollouts)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 20, 21, 22]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 3, 2, 1, 2, 1, IGNORED]]
    assert batch["endings"][0, 4:6].tolist() == [CUT, CUT]
    assert batch["sequences"].tolist() == [[0, 1, 3, 1, 4], [0, 4, 2, 0, 5]]
    assert "attention_mask" not in batch
    # Nothing is read after the last state unless the cut is bootstrapped.
    assert LengthValueCollator(truncated="finished")(rollouts)["input_ids"].tolist() == [[10, 11, 12, 13, 20, 21]]
    left = LengthValueCollator(packing=False, padding_side="left", pad_token_id=0)(rollouts)
    assert left["input_ids"].tolist() == [[10, 11, 12, 13], [0, 20, 21, 22]]
    assert left["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert left["labels"].tolist() == [[IGNORED, 3, 2, 1], [IGNORED, 2, 1, IGNORED]]
    assert left["sequences"].tolist() == [[0, 1, 3, 1, 4], [1, 1, 2, 0, 5]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("layout", [{}, {"row_length": 300}, {"flatten": True}, {"packing": False, "padding_side": "left"}])
def test_values_in_a_row_are_those_of_the_sequence_alone(backbone, attention, layout):
    model = LengthValueModel.from_backbone(backbone(attn_implementation=attention), gamma=GAMMA)
    assert model.backbone.config._attn_implementation == attention
    check_isolation(model)
    rollouts = random_rollouts(12)
    batch = LengthValueCollator(**layout)(rollouts)
    row_of, first, lengths, _, _ = batch["sequences"].unbind(1)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
    with torch.no_grad():
        packed = unpack(model(**inputs).values, row_of, first, lengths)
        for index, rollout in enumerate(rollouts):
            ids = torch.tensor([rollout["prompt_ids"] + rollout["completion_ids"]])
            alone = model(ids).values[0, len(rollout["prompt_ids"]) - 1 : -1]
            torch.testing.assert_close(packed[index, : lengths[index]], alone, atol=1e-5, rtol=0)
            # A backbone whose values hardly vary would hide a leak.
            assert len(alone) < 3 or alone.std() > 1e-3


def test_a_backbone_that_mixes_packed_sequences_is_refused(tmp_path, monkeypatch):
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    original = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda position_ids=None, **kwargs: original(**kwargs))
    with pytest.raises(ValueError, match="does not keep packed sequences apart.*packing=False"):
        LengthValueTrainer(model, make_args(tmp_path))
    LengthValueTrainer(model, make_args(tmp_path, packing=False))


# The loss of an optimiser step


def naive_gradient(model, rollouts, truncated="bootstrap"):
    """Sum of squared errors over the states of each sequence alone, over the number of states of all of them."""
    total, states = 0.0, 0
    for rollout in rollouts:
        prompt, completion = rollout["prompt_ids"], rollout["completion_ids"]
        values = model(torch.tensor([prompt + completion])).values[0, len(prompt) - 1 :]
        end = 0.0 if rollout["finish_reason"] == "stop" else values[-1].item()
        for step in range(len(completion)):
            discount = GAMMA ** (len(completion) - step)
            total = total + (values[step] - (-(1 - discount) + discount * end)) ** 2
            states += 1
    loss = total / states
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


SPLITS = {
    "one batch": {"per_device_train_batch_size": 12},
    "accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    "one by one": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12},
    "padded": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "packing": False},
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_token_mean_is_the_same_however_the_step_is_split(tmp_path, split, side):
    rollouts = random_rollouts(12)
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss, gradient = naive_gradient(model, rollouts)
    args = make_args(tmp_path, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0, max_steps=1, **SPLITS[split])
    trainer = LengthValueTrainer(model, args, train_dataset=Dataset.from_list(rollouts))
    trainer.data_collator.padding_side = side
    result = trainer.train()
    assert result.training_loss == pytest.approx(loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - parameter.detach(), gradient[name], atol=2e-6, rtol=1e-4)


DISTRIBUTED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from datasets import Dataset
from test_pretraining import GAMMA, LengthValueModel, LengthValueTrainer, LengthValueTrainingArguments, random_rollouts
from tiny import tiny_llama
from transformers import set_seed
args = LengthValueTrainingArguments(
    {folder!r}, report_to="none", save_strategy="no", disable_tqdm=True, optim="sgd", learning_rate=1.0, use_cpu=True,
    lr_scheduler_type="constant", max_grad_norm=0, max_steps=1, per_device_train_batch_size=3,
    gradient_accumulation_steps=2, per_device_eval_batch_size=3,
)
rollouts = Dataset.from_list(random_rollouts(12))
held_out = Dataset.from_list(random_rollouts(7, seed=1))
set_seed(0)
model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
trainer = LengthValueTrainer(model, args, train_dataset=rollouts, eval_dataset=held_out)
assert args.world_size == 2
loss = torch.tensor(trainer.train().training_loss)  # of this process: the mean over processes is the step's
loss = trainer.accelerator.reduce(loss, "mean").item()
metrics = trainer.evaluate()
evaluated = LengthValueTrainer(LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA), args, rollouts, held_out)
evaluated.evaluate()
try:
    evaluated.train()
except ValueError as error:
    assert "eval_on_start" in str(error)
else:
    raise AssertionError("a model that was prepared for evaluation only went into training")
if args.process_index == 0:
    torch.save({{"loss": loss, "metrics": metrics, "weights": model.state_dict()}}, {path!r})
"""


def test_two_processes_take_the_step_of_one(tmp_path):
    path, tests = tmp_path / "result.pt", Path(__file__).resolve().parent
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED.format(tests=str(tests), folder=str(tmp_path / "out"), path=str(path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(path)

    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    loss, gradient = naive_gradient(model, random_rollouts(12))
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach() - result["weights"][name], gradient[name], atol=2e-6, rtol=1e-4)
    model.load_state_dict(result["weights"])
    trainer = LengthValueTrainer(model, make_args(tmp_path), eval_dataset=Dataset.from_list(random_rollouts(7, seed=1)))
    for name, value in trainer.evaluate().items():
        if not name.endswith(("runtime", "per_second", "preparation_time")):
            assert result["metrics"][name] == pytest.approx(value, rel=1e-4, nan_ok=True), name


# What is learned


def geometric_rollouts(count, end_chance, most_tokens=None, seed=0):
    """A policy that ends with the same chance at every step, whatever stands before."""
    draw = torch.Generator().manual_seed(seed)
    rollouts = []
    for index in range(count):
        length = 1 + int(torch.log(torch.rand((), generator=draw)) / math.log(1 - end_chance))
        cut = most_tokens is not None and length > most_tokens
        ids = torch.randint(6, 64, (2 + min(length, most_tokens or length),), generator=draw).tolist()
        completion = ids[2:] if cut else [*ids[2:-1], EOS]
        rollouts.append(make_rollout(ids[:2], completion, "length" if cut else "stop", group=index))
    return Dataset.from_list(rollouts)


def fit_geometric(tmp_path, rollouts, truncated, lam=1.0):
    args = make_args(
        tmp_path, per_device_train_batch_size=64, learning_rate=5e-3, num_train_epochs=3, gamma=GAMMA, truncated=truncated, lam=lam
    )
    tokenizer = tiny_tokenizer()
    # Weights of the usual size: a network that starts out noisy would need long to become constant.
    policy = tiny_llama(layers=1, initializer_range=0.05)
    model, _ = pretrain(policy, rollouts, make_metadata(tokenizer), args, tokenizer)
    batch = LengthValueCollator(packing=False)(geometric_rollouts(200, 0.1, 11, seed=9).to_list())
    with torch.no_grad():
        return model(batch["input_ids"], batch["attention_mask"]).values[batch["labels"] != IGNORED]


@pytest.mark.parametrize(("truncated", "lam"), [("bootstrap", 1.0), ("bootstrap", 0.8)])
def test_a_geometric_policy_has_one_value_everywhere(tmp_path, truncated, lam):
    expected = -(1 - GAMMA) / (1 - GAMMA * 0.9)
    values = fit_geometric(tmp_path, geometric_rollouts(2000, 0.1), truncated, lam)
    assert values.mean() == pytest.approx(expected, abs=0.02)
    assert (values - expected).abs().mean() < 0.03


def test_cut_completions_are_censored_not_short(tmp_path):
    rollouts = geometric_rollouts(2000, 0.1, most_tokens=11)
    cut_share = sum(reason == "length" for reason in rollouts["finish_reason"][:]) / 2000
    assert 0.27 < cut_share < 0.35
    expected = -(1 - GAMMA) / (1 - GAMMA * 0.9)
    values = fit_geometric(tmp_path, rollouts, "bootstrap")
    assert values.mean() == pytest.approx(expected, abs=0.025)
    # Taken for finished, they make the end look near; left out or endless, they bias it as well.
    assert fit_geometric(tmp_path, rollouts, "finished").mean() > expected + 0.06
    assert fit_geometric(tmp_path, rollouts, "drop").mean() > expected + 0.06
    assert fit_geometric(tmp_path, rollouts, "infinite").mean() < expected - 0.06
