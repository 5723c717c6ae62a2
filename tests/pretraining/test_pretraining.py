"""Value pretraining: one loss however a step is split, a law it must find, honest metrics, exact resumption."""

import json
import math

import pytest
import torch
from datasets import Dataset
from launched import run_two
from places import PATHS
from ragged import EOS, make_rollout, random_rollouts
from tiny import tiny_llama, tiny_tokenizer

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.batches import LengthValueCollator, unpack
from lenvm_rl.pretraining.loss import IGNORED
from lenvm_rl.pretraining.metrics import length_value_metrics
from lenvm_rl.pretraining.references import reference_metrics
from lenvm_rl.pretraining.trainer import (
    LengthValueTrainer,
    LengthValueTrainingArguments,
    fit_gamma_to_rollouts,
    make_length_value_model,
    prepare_rollouts,
    pretrain,
)
from lenvm_rl.rollouts.record import RolloutMetadata
from lenvm_rl.tokenization import tokenizer_fingerprint

GAMMA = 0.9


def make_metadata(tokenizer, truncated_share=0.0):
    return RolloutMetadata("policy", tokenizer_fingerprint(tokenizer), {}, 0, [EOS], truncated_share=truncated_share)


def make_args(tmp_path, **changes):
    settings = {
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
    }
    return LengthValueTrainingArguments(str(tmp_path / "out"), **{**settings, **changes})


def test_a_backbone_that_mixes_packed_sequences_is_refused(tmp_path, monkeypatch):
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    original = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda position_ids=None, **kwargs: original(**kwargs))
    with pytest.raises(ValueError, match="packing=False"):
        LengthValueTrainer(model, make_args(tmp_path))
    LengthValueTrainer(model, make_args(tmp_path, packing=False))


# The loss of an optimizer step


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
    "padded, uneven": {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3, "packing": False},
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_token_mean_is_the_same_however_the_step_is_split(tmp_path, split, side):
    rollouts = random_rollouts(12)
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss, gradient = naive_gradient(model, rollouts)
    args = make_args(
        tmp_path,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        max_steps=1,
        **SPLITS[split],
    )
    trainer = LengthValueTrainer(model, args, train_dataset=Dataset.from_list(rollouts))
    trainer.data_collator.padding_side = side
    result = trainer.train()
    assert result.training_loss == pytest.approx(loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - parameter.detach(), gradient[name], atol=2e-6, rtol=1e-4)


DISTRIBUTED = """
import sys
sys.path[:0] = {paths!r}
import torch

from datasets import Dataset
from test_pretraining import GAMMA, LengthValueModel, LengthValueTrainer, LengthValueTrainingArguments, random_rollouts
from tiny import tiny_llama
from transformers import set_seed
rollouts = Dataset.from_list(random_rollouts(12))
held_out = Dataset.from_list(random_rollouts(7, seed=1))
results = []
for packing in (True, False):
    args = LengthValueTrainingArguments(
        {folder!r}, report_to="none", save_strategy="no", disable_tqdm=True, optim="sgd", learning_rate=1.0,
        lr_scheduler_type="constant", max_grad_norm=0, max_steps=1, per_device_train_batch_size=3,
        gradient_accumulation_steps=2, per_device_eval_batch_size=3, packing=packing, use_cpu=True,
    )
    set_seed(0)
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    trainer = LengthValueTrainer(model, args, train_dataset=rollouts, eval_dataset=held_out)
    assert args.world_size == 2
    loss = torch.tensor(trainer.train().training_loss)  # of this process: the mean over processes is the step's
    loss = trainer.accelerator.reduce(loss, "mean").item()
    results.append({{"loss": loss, "metrics": trainer.evaluate(), "weights": model.state_dict()}})
evaluated = LengthValueTrainer(LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA), args, rollouts, held_out)
evaluated.evaluate()
try:
    evaluated.train()
except ValueError as error:
    assert "eval_on_start" in str(error)
else:
    raise AssertionError("a model that was prepared for evaluation only went into training")
if args.process_index == 0:
    torch.save(results, {path!r})
"""


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    path = tmp_path / "result.pt"
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED.format(paths=PATHS, folder=str(tmp_path / "out"), path=str(path)))
    run_two(script)

    original = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA).state_dict()
    held_out = Dataset.from_list(random_rollouts(7, seed=1))
    for result in torch.load(path):
        model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
        model.load_state_dict(original)
        loss, gradient = naive_gradient(model, random_rollouts(12))
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        for name, parameter in model.named_parameters():
            step = parameter.detach() - result["weights"][name]
            torch.testing.assert_close(step, gradient[name], atol=2e-6, rtol=1e-4)
        model.load_state_dict(result["weights"])
        for name, value in LengthValueTrainer(model, make_args(tmp_path), eval_dataset=held_out).evaluate().items():
            if not name.endswith(("runtime", "per_second", "preparation_time", "epoch")):
                assert result["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name


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
        tmp_path,
        per_device_train_batch_size=64,
        learning_rate=5e-3,
        num_train_epochs=3,
        gamma=GAMMA,
        truncated=truncated,
        lam=lam,
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


# Stages and refusals


def test_gamma_comes_from_the_lengths_and_says_which():
    rollouts = Dataset.from_list([make_rollout([6], [7] * (length - 1) + [EOS]) for length in range(1, 102)])
    gamma, fit = fit_gamma_to_rollouts(rollouts)
    assert gamma == pytest.approx(0.01 ** (1 / 100))
    assert fit["percentiles"] == {"1": 2, "10": 11, "25": 26, "50": 51, "75": 76, "90": 91, "99": 100, "100": 101}
    assert (fit["completions"], fit["mean"], fit["truncated_share"]) == (101, 51.0, 0.0)


def test_the_selection_of_completions(tmp_path):
    rollouts = Dataset.from_list(
        [
            make_rollout([6], [7, EOS], correct=True),
            make_rollout([6], [7, 8], "length", correct=True),
            make_rollout([6], [9, EOS], correct=False),
        ]
    )
    assert prepare_rollouts(rollouts, make_args(tmp_path)).to_list() == rollouts.to_list()
    assert prepare_rollouts(rollouts, make_args(tmp_path, truncated="drop"))["completion_ids"][:] == [
        [7, EOS],
        [9, EOS],
    ]
    # A prompt with a cut completion is known for one in an evaluation.
    assert len(prepare_rollouts(rollouts, make_args(tmp_path, truncated="drop"), held_out=True)) == 3
    assert len(prepare_rollouts(rollouts, make_args(tmp_path, only_correct=True))) == 2
    with pytest.raises(ValueError, match="only_correct"):
        prepare_rollouts(rollouts.select([1]), make_args(tmp_path))
    with pytest.raises(ValueError, match="only_correct.*`correct`"):
        prepare_rollouts(rollouts.remove_columns("correct"), make_args(tmp_path, only_correct=True))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"truncated": "ignore"}, "truncated must be one of bootstrap"),
        ({"lam": 1.5}, "lam must be in"),
        ({"gamma": 1.0}, "gamma must lie strictly"),
        ({"average_tokens_across_devices": False}, "must stay true"),
        ({"share_prompts": True, "packing": False}, "needs packing=True"),
        ({"bf16_full_eval": True}, "bf16_full_eval"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, change, problem):
    with pytest.raises(ValueError, match=problem):
        make_args(tmp_path, **change)


def test_bad_rollouts_and_models_are_refused(tmp_path):
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    args = make_args(tmp_path)
    with pytest.raises(ValueError, match="Rollout 1 .*token 64"):
        LengthValueTrainer(model, args, Dataset.from_list([make_rollout([6], [EOS]), make_rollout([6], [64, EOS])]))
    with pytest.raises(ValueError, match="Rollout 0 .*513.*512"):
        LengthValueTrainer(model, args, eval_dataset=Dataset.from_list([make_rollout([6], [7] * 511 + [EOS])]))
    # A context that is stretched to four times what the decoder was trained on.
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 512}
    stretched = LengthValueModel.from_backbone(tiny_llama(rope_parameters=yarn), gamma=GAMMA)
    LengthValueTrainer(stretched, args, eval_dataset=Dataset.from_list([make_rollout([6], [7] * 511 + [EOS])]))
    with pytest.raises(ValueError, match="Rollout 0 .*2049.*2048"):
        LengthValueTrainer(stretched, args, eval_dataset=Dataset.from_list([make_rollout([6], [7] * 2047 + [EOS])]))
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        LengthValueTrainer(tiny_llama(), args)
    rollouts = Dataset.from_list([make_rollout([6], [EOS])])
    with pytest.raises(ValueError, match="tokenizer"):
        make_length_value_model(tiny_llama(), rollouts, make_metadata(tiny_tokenizer(60)), args, tiny_tokenizer())


@pytest.mark.parametrize("form", ["full", "adapter", "head"])
def test_a_model_in_memory_is_a_backbone(form, tmp_path):
    rollouts, args = Dataset.from_list(random_rollouts(4)), make_args(tmp_path, form=form)
    model = make_length_value_model(tiny_llama(), rollouts, make_metadata(tiny_tokenizer()), args, tiny_tokenizer())
    assert model.config.form == form


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    trainer = LengthValueTrainer(model, make_args(tmp_path), Dataset.from_list(random_rollouts(4)))
    with torch.no_grad():
        model.head.output.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nan"):
        trainer.train()


@pytest.mark.parametrize("layout", [{}, {"packing": False}, {"share_prompts": True}])
def test_a_run_is_saved_measured_and_resumed_exactly(tmp_path, layout):
    tokenizer = tiny_tokenizer()
    rollouts, held_out = Dataset.from_list(random_rollouts(24)), Dataset.from_list(random_rollouts(6, seed=1))
    metadata = make_metadata(tokenizer, truncated_share=0.25)
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "logging_strategy": "steps",
        "logging_steps": 1,
        **layout,
    }

    def run(folder, resume=False, **changes):
        args = make_args(tmp_path, **{**settings, "save_strategy": "steps", "save_steps": 5, **changes})
        args.output_dir = str(tmp_path / folder)
        return pretrain(tiny_llama(), rollouts, metadata, args, tokenizer, held_out, resume=resume)

    whole, metrics = run("whole")
    loaded = LengthValueModel.from_pretrained(tmp_path / "whole")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    assert loaded.config.gamma == fit_gamma_to_rollouts(rollouts)[0]
    assert loaded.config.gamma_fit["completions"] == 24
    assert (loaded.config.generator, loaded.config.truncated_share) == ("policy", 0.25)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert lines[0] == {"event": "train_begin", "step": 0}
    assert lines[-1]["eval_loss"] == metrics["eval_loss"]

    class Killed(Exception):
        pass

    original = LengthValueTrainer.training_step

    def dies_at_step_11(self, *args, **kwargs):
        if self.state.global_step == 11:
            raise Killed
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LengthValueTrainer, "training_step", dies_at_step_11)
        with pytest.raises(Killed):
            run("broken")
    with pytest.raises(ValueError, match="output_dir"):
        run("broken")
    # As if it had died while it wrote its second checkpoint: the trainer state comes last.
    (tmp_path / "broken" / "checkpoint-10" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="learning_rate 0.001, now 0.002"):
        run("broken", resume=True, learning_rate=2e-3)
    resumed, _ = run("broken", resume=True)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


@pytest.mark.parametrize("layout", [{}, {"packing": False}, {"share_prompts": True}])
def test_metrics_of_a_run_are_those_of_its_completions(tmp_path, layout):
    """Seven ragged completions in batches of three: no padding, no partial batch shows in the numbers."""
    rollouts = random_rollouts(7, seed=3)
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    trainer = LengthValueTrainer(
        model, make_args(tmp_path, per_device_eval_batch_size=3, **layout), eval_dataset=Dataset.from_list(rollouts)
    )
    metrics = trainer.evaluate()
    loss, _ = naive_gradient(model, rollouts)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)

    batch = LengthValueCollator(packing=False)(rollouts)
    row_of, first, lengths, finished, groups, prompts = batch["sequences"].unbind(1)
    with torch.no_grad():
        logits = unpack(model(batch["input_ids"], batch["attention_mask"]).logits, row_of, first, lengths)
    expected = length_value_metrics(logits, lengths, finished, groups, GAMMA)
    expected |= reference_metrics(lengths, prompts, finished, groups, GAMMA)
    for name, value in expected.items():
        if name != "loss":
            assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name
