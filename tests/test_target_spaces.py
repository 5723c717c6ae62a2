"""Targets for ablation: by hand, there and back, the same lengths after saving, and no values for anything else."""

import math

import pytest
import torch
from datasets import Dataset
from ragged import EOS, make_rollout, random_rollouts
from test_pretraining import make_args, make_metadata
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer

from lenvm_rl.modeling import LengthValueConfig, LengthValueModel
from lenvm_rl.pretraining import LengthValueTrainer, pretrain
from lenvm_rl.returns import logits_from_remaining, remaining_from_logits
from lenvm_rl.scoring import CandidateScorer
from lenvm_rl.target_spaces import TARGETS, TargetSpace
from lenvm_rl.targets import CUT, ENDLESS, FINISHED, IGNORED, predictions_and_targets, value_targets

GAMMA = 0.9
ALTERNATIVES = TARGETS[1:]


def space(target, gamma=GAMMA, scale=50.0):
    return TargetSpace(target, gamma, scale if target == "normalized_length" else None)


@pytest.mark.parametrize(
    ("target", "predicted", "of_3_tokens", "tokens"),
    [
        ("return", -0.5, -(1 - GAMMA**3), math.log(2) / -math.log(GAMMA)),
        ("length", math.log(2), 3.0, math.log(2)),
        ("normalized_length", 0.5, 3 / 50, 25.0),
        ("log_length", math.log(2), math.log(4), 1.0),
    ],
)
def test_a_logit_of_0_by_hand(target, predicted, of_3_tokens, tokens):
    assert float(space(target).predict(torch.tensor(0.0))) == pytest.approx(predicted)
    assert float(space(target).encode(torch.tensor(3.0))) == pytest.approx(of_3_tokens)
    assert float(space(target).remaining(torch.tensor(0.0))) == pytest.approx(tokens, abs=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_predicted_and_what_is_read_off_are_the_same_length(target):
    logits = torch.linspace(-3, 3, 50, dtype=torch.double)
    each = space(target)
    torch.testing.assert_close(each.predict(logits), each.encode(each.remaining(logits)))
    same = remaining_from_logits(each.return_logits(logits), GAMMA)
    torch.testing.assert_close(same, each.remaining(logits))


@pytest.mark.parametrize("target", ALTERNATIVES)
def test_targets_by_hand(target):
    # One completion that ended after 3 tokens, then one cut after 2, at whose cut the model says some length.
    remaining = torch.tensor([[IGNORED, 3, 2, 1, IGNORED, 2, 1, IGNORED]])
    endings = torch.tensor([[FINISHED] * 5 + [CUT] * 2 + [FINISHED]])
    logits = torch.randn(1, 8, requires_grad=True)
    predictions, targets = predictions_and_targets(logits, remaining, endings, space(target))
    more = float(space(target).remaining(logits[0, 7].detach()))
    tokens = torch.tensor([3.0, 2.0, 1.0, 2 + more, 1 + more])
    torch.testing.assert_close(targets[0, [1, 2, 3, 5, 6]], space(target).encode(tokens))
    assert not targets.requires_grad and not targets[0, [0, 4, 7]].any()
    torch.testing.assert_close(predictions, space(target).predict(logits))
    with pytest.raises(ValueError, match="target='return' only"):
        predictions_and_targets(logits, remaining, torch.full_like(endings, ENDLESS), space(target))
    with pytest.raises(ValueError, match="target='return' only"):
        predictions_and_targets(logits, remaining, endings, space(target), lam=0.5)


def test_the_return_is_what_it_was():
    remaining, endings = torch.tensor([[2, 1, IGNORED]]), torch.tensor([[CUT, CUT, FINISHED]])
    logits = torch.randn(1, 3)
    predictions, targets = predictions_and_targets(logits, remaining, endings, space("return"), lam=0.5)
    torch.testing.assert_close(predictions, -torch.sigmoid(logits))
    torch.testing.assert_close(targets, value_targets(-torch.sigmoid(logits), remaining, endings, GAMMA, 0.5))


@pytest.mark.parametrize("target", ALTERNATIVES)
def test_every_target_learns_a_length_that_is_the_same_everywhere(tmp_path, target):
    """Completions of 8 tokens, numbered by their ids: tokens to come at 0 %, read off the saved model, are 8."""
    ids = [10, 11, 12, 13, 14, 15, 16, EOS]
    rollouts = Dataset.from_list([make_rollout([6 + index % 3], ids, group=index) for index in range(64)])
    tokenizer = tiny_tokenizer()
    args = make_args(tmp_path, target=target, learning_rate=2e-2, per_device_train_batch_size=8, num_train_epochs=12)
    policy = tiny_llama(layers=1, initializer_range=0.05)
    _, metrics = pretrain(policy, rollouts, make_metadata(tokenizer), args, tokenizer, rollouts.select(range(8)))
    loaded = LengthValueModel.from_pretrained(args.output_dir)
    config = loaded.config
    assert (config.target, config.target_scale) == (target, 8 if target == "normalized_length" else None)
    with torch.no_grad():
        outputs = loaded(torch.tensor([[6, *ids]]))
    lengths = TargetSpace(target, config.gamma, config.target_scale).remaining(outputs.logits)[0, :8]
    # A sigmoid reaches the longest length only in the limit.
    torch.testing.assert_close(lengths, torch.arange(8.0, 0, -1), atol=0.8, rtol=0)
    assert metrics["eval_length_mae_at_50"] < 0.8 and metrics["eval_explained_variance"] > 0.9


@pytest.mark.parametrize("target", ALTERNATIVES)
def test_metrics_are_those_of_a_return_model_that_says_the_same_lengths(tmp_path, target):
    rollouts = Dataset.from_list(random_rollouts(9, cut_share=0.0))
    model = tiny_length_value_model()
    model.config.target, model.config.target_scale = target, 50.0 if target == "normalized_length" else None
    metrics = LengthValueTrainer(model, make_args(tmp_path, target=target), eval_dataset=rollouts).evaluate()
    errors = []
    for rollout in rollouts:
        ids = torch.tensor([rollout["prompt_ids"] + rollout["completion_ids"]])
        logit = model(ids).logits[0, len(rollout["prompt_ids"]) - 1]
        errors.append(abs(float(space(target).remaining(logit.detach())) - len(rollout["completion_ids"])))
    assert metrics["eval_length_mae_at_0"] == pytest.approx(sum(errors) / 9, rel=1e-4)


@pytest.mark.parametrize("target", ALTERNATIVES)
def test_a_model_without_values_is_refused_by_name(target):
    model = tiny_length_value_model()
    model.config.target, model.config.target_scale = target, 50.0 if target == "normalized_length" else None
    refusal = f"fitted to target='{target}'.*pretrain one with target='return'"
    with pytest.raises(ValueError, match=refusal):
        _ = model(torch.tensor([[6, 7]])).values
    with pytest.raises(ValueError, match=refusal):
        model.freeze()
    with pytest.raises(ValueError, match=refusal):
        CandidateScorer(model)


def test_a_scale_belongs_to_the_normalised_length():
    settings = {"backbone_config": tiny_llama().config, "gamma": GAMMA}
    for wrong in ({"target": "normalized_length"}, {"target_scale": 3.0}, {"target": "x"}):
        with pytest.raises(ValueError, match="target"):
            LengthValueConfig(**settings, **wrong)
    with pytest.raises(ValueError, match="above 0"):
        LengthValueConfig(**settings, target="normalized_length", target_scale=0.0)
    assert LengthValueConfig(**settings).target == "return"
    assert float(logits_from_remaining(torch.tensor(1.0), 0.5)) == pytest.approx(0.0, abs=1e-6)
