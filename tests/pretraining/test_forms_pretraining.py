"""Pretraining of the three forms of a length value model: the loss falls, and nothing else moves."""

import math

import pytest
import torch
from datasets import Dataset
from ragged import random_rollouts
from safetensors.torch import load_file
from test_sharing import GAMMA, SHARED, assert_unchanged, make_policy, weights_of
from tiny import assert_same_weights, tiny_llama, tiny_tokenizer

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.trainer import LengthValueTrainer, LengthValueTrainingArguments


def loss_of(model, rollouts):
    errors, states = 0.0, 0
    for rollout in rollouts:
        ids = torch.tensor([rollout["prompt_ids"] + rollout["completion_ids"]])
        first, length = len(rollout["prompt_ids"]) - 1, len(rollout["completion_ids"])
        with torch.no_grad():
            values = model.eval()(ids).values[0, first : first + length]
        errors += sum((value + 1 - GAMMA ** (length - t)) ** 2 for t, value in enumerate(values.tolist()))
        states += length
    return errors / states


@pytest.mark.parametrize("form", ["full", *SHARED])
def test_pretraining_fits_each_form_and_changes_nothing_else(form, tmp_path):
    rollouts = random_rollouts(40, cut_share=0.0)
    policy = make_policy(tiny_llama(layers=1))
    base = policy if form != "full" else tiny_llama(layers=1)
    before, trainable = weights_of(base), [name for name, weight in base.named_parameters() if weight.requires_grad]
    model = LengthValueModel.from_backbone(base, gamma=GAMMA, form=form, tokenizer=tiny_tokenizer())
    start = weights_of(model)
    first = loss_of(model, rollouts)
    args = LengthValueTrainingArguments(
        str(tmp_path / "out"),
        report_to="none",
        save_strategy="steps",
        save_steps=20,
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_steps=20,
        per_device_train_batch_size=20,
    )
    trainer = LengthValueTrainer(model, args, train_dataset=Dataset.from_list(rollouts))
    trainer.train()
    last = loss_of(model, rollouts)
    assert last < 0.8 * first and math.isfinite(last)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, start[name])}
    assert changed == {name for name in start if name != "head.output.bias"} | (changed & {"head.output.bias"})
    if form != "full":
        assert_unchanged(base, before)
        assert all(weight.grad is None for weight in base.parameters())
        assert [n for n, w in base.named_parameters() if w.requires_grad] == trainable
    saved = load_file(tmp_path / "out" / "checkpoint-20" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    again = {} if form == "full" else {"base": tiny_llama(layers=1)}
    loaded = LengthValueModel.from_pretrained(tmp_path / "out" / "checkpoint-20", **again)
    assert_same_weights(model, loaded)
