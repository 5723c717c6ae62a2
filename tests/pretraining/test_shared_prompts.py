"""Completions that share a prompt's computation: values and gradients are those of the completions alone."""

import pytest
import torch
from datasets import Dataset
from ragged import EOS, make_rollout, random_rollouts
from test_pretraining import GAMMA, make_args, naive_gradient
from tiny import tiny_length_value_model, tiny_llama, tiny_qwen2, tiny_qwen3

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.batches import unpack
from lenvm_rl.pretraining.loss import CUT, FINISHED, IGNORED
from lenvm_rl.pretraining.shared_prompts import SharedPromptCollator, check_sharing, model_inputs, sibling_mask
from lenvm_rl.pretraining.trainer import LengthValueTrainer


def siblings(prompts=4, samples=3, prompt_tokens=9, seed=0):
    """Ragged completions of a few prompts, some of them cut; one prompt has a single token."""
    rollouts = random_rollouts(prompts * samples, seed)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 64, (prompts, prompt_tokens), generator=draw).tolist()
    ids[0] = ids[0][:1]
    return [
        {**rollout, "prompt_ids": ids[index // samples], "group": index // samples}
        for index, rollout in enumerate(rollouts)
    ]


def test_a_batch_by_hand():
    rollouts = [
        make_rollout([10, 11, 12], [13, EOS], group=4),
        make_rollout([20], [21, EOS], group=5),
        make_rollout([10, 11, 12], [14, 15], "length", group=4),
    ]
    batch = SharedPromptCollator(row_length=20)(rollouts)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 12, 14, 15, 20, 21]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 2, 1, 2, 1, IGNORED, 2, 1]]
    assert batch["endings"].tolist() == [[FINISHED] * 4 + [CUT] * 2 + [FINISHED] * 3]
    assert batch["blocks"].tolist() == [[0, 0, 0, 0, 0, 0, 0, 1, 1]]
    assert batch["siblings"].tolist() == [[0, 0, 1, 1, 2, 2, 2, 1, 1]]
    assert batch["sequences"].tolist() == [[0, 2, 2, 1, 4, 3], [0, 7, 2, 1, 5, 1], [0, 4, 2, 0, 4, 3]]
    seen = sibling_mask(batch["blocks"], batch["siblings"], "sdpa", torch.float32)[0, 0]
    assert seen[5].tolist() == [True, True, False, False, True, True, False, False, False]
    assert seen[8].tolist() == [False] * 7 + [True, True]
    added = sibling_mask(batch["blocks"], batch["siblings"], "eager", torch.float32)[0, 0]
    assert torch.equal(added == 0, seen) and float(added.min()) == torch.finfo(torch.float32).min


def test_a_prompt_is_counted_once_where_its_completions_fit():
    rollouts = [make_rollout(range(6, 46), [7, 8, EOS]) for _ in range(16)]
    tokens = SharedPromptCollator(row_length=200)(rollouts)["blocks"].ge(0).sum()
    assert tokens == 39 + 16 * 3
    narrow = SharedPromptCollator()(rollouts)
    assert narrow["input_ids"].shape[1] <= 2 * 42 and narrow["blocks"].ge(0).sum() == 2 * 39 + 16 * 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", [tiny_llama, tiny_qwen2, tiny_qwen3])
@pytest.mark.parametrize("row_length", [None, 200])
def test_values_are_those_of_the_completion_alone(backbone, attention, row_length):
    model = tiny_length_value_model(backbone(attn_implementation=attention))
    check_sharing(model)
    rollouts = siblings()
    batch = SharedPromptCollator(row_length=row_length)(rollouts)
    row_of, first, lengths = batch["sequences"].unbind(1)[:3]
    with torch.no_grad():
        shared = unpack(model(**model_inputs(batch, model)).values, row_of, first, lengths)
        for index, rollout in enumerate(rollouts):
            ids = torch.tensor([rollout["prompt_ids"] + rollout["completion_ids"]])
            alone = model(ids).values[0, len(rollout["prompt_ids"]) - 1 : -1]
            torch.testing.assert_close(shared[index, : lengths[index]], alone, atol=1e-5, rtol=0)
            assert len(alone) < 3 or alone.std() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 12},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
        # Micro-batches that tear prompts apart.
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
    ],
)
def test_a_step_is_that_of_the_completions_alone(tmp_path, backbone, attention, split):
    rollouts = siblings()
    model = LengthValueModel.from_backbone(backbone(attn_implementation=attention), gamma=GAMMA)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss, gradient = naive_gradient(model, rollouts)
    step = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0, "max_steps": 1}
    args = make_args(tmp_path, share_prompts=True, **step, **split)
    result = LengthValueTrainer(model, args, train_dataset=Dataset.from_list(rollouts)).train()
    assert result.training_loss == pytest.approx(loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - parameter.detach(), gradient[name], atol=2e-6, rtol=1e-4)


def test_what_is_not_tested_is_refused_by_name(tmp_path, monkeypatch):
    args = make_args(tmp_path, share_prompts=True)
    windows = tiny_qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match="share_prompts.*qwen2 with sdpa and windows"):
        LengthValueTrainer(LengthValueModel.from_backbone(windows, gamma=GAMMA), args)
    model = LengthValueModel.from_backbone(tiny_llama(attn_implementation="eager"), gamma=GAMMA)
    model.backbone.config.model_type = "mixtral"
    with pytest.raises(ValueError, match="mixtral.*share_prompts"):
        LengthValueTrainer(model, args)
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    original = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda attention_mask=None, **kwargs: original(**kwargs))
    with pytest.raises(ValueError, match="share_prompts=False"):
        LengthValueTrainer(model, args)
