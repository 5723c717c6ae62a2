"""What the trainers log, by hand."""

import math

import pytest
import torch
from test_trainers_coefficient import table
from test_trainers_ppo import scripted_ppo
from trainer_parts import batch_of, grpo, prompts, random_lenvm

from lenvm_rl.returns import wide_dtype
from lenvm_rl.trainers.metrics import BatchMetrics, add_critic


def test_explained_variance_of_equal_targets_is_not_a_number_but_rounding():
    mask = torch.ones(2, 3, dtype=torch.bool)
    values = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    # All returns are 0, up to the rounding of (0 - V) + V.
    returns = torch.tensor([[3e-9, 0.0, -3e-9], [0.0, 3e-9, 0.0]])

    def explained(returns):
        metrics = BatchMetrics()
        add_critic(metrics, values, returns, mask)
        return metrics.read(metrics.sums.tolist())["critic/explained_variance"]

    assert math.isnan(explained(returns))
    # Var(error) = Var(target) / 4 for a critic that gets half of it.
    assert explained(2 * values) == pytest.approx(0.75)


def test_micro_batches_of_a_step_are_pooled():
    """Three tokens of mean 1 and one of 5 have a mean of 2; the mean of the two means is 3."""
    metrics = BatchMetrics()
    for x, mask in ((torch.tensor([0.0, 1.0, 2.0]), torch.ones(3)), (torch.tensor([5.0, 9.0, 9.0]), torch.eye(3)[0])):
        metrics.mean("mean", x, mask)
        metrics.explained_variance("explained", x / 2, x, mask)
    assert metrics.read(metrics.sums.tolist()) == {"mean": 2.0, "explained": pytest.approx(0.75)}


class OnMps(torch.Tensor):
    """A tensor as on Apple's graphics processors: float64 is an error there."""

    device = torch.device("mps")

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_moments_are_exact_where_the_device_has_no_float64():
    # Variance 1/4 around 4096, of which float32 sums of squares keep nothing: 4096² + 1/4 rounds to 4096².
    x, mask = torch.tensor([4095.5, 4096.5, 7.0]), torch.tensor([True, True, False])
    assert (x[:2] ** 2).mean() - x[:2].mean() ** 2 != 0.25
    for kind in (torch.Tensor, OnMps):
        metrics = BatchMetrics()
        x_, y_, mask_ = (each.as_subclass(kind) for each in (x, 2 * x, mask))
        metrics.mean("mean", x_, mask_)
        metrics.deviation("deviation", x_, mask_)
        metrics.slope("slope", x_, y_, mask_)
        assert metrics.read(metrics.sums.tolist()) == {"mean": 4096.0, "deviation": 0.5, "slope": 0.5}


def test_float64_is_computed_with_where_there_is_one():
    assert [wide_dtype(name) for name in ("cpu", "cuda:1", "mps", torch.device("mps:0"))] == [
        torch.float64,
        torch.float64,
        torch.float32,
        torch.float32,
    ]


@pytest.mark.parametrize("changes", [{}, {"task_lam": 0.0}, {"task_lam": 0.5, "critic_lam": 0.0}], ids=str)
@pytest.mark.parametrize(
    ("truncation", "mean", "explained"), [("terminal", 0.7, -0.17578125), ("bootstrap", 4 / 7, 1 - 11.75 / 8.5)]
)
def test_the_critic_is_measured_by_the_return_and_not_by_itself(tmp_path, changes, truncation, mean, explained):
    # Rewards 1, 0, 1, 1/2 over 3, 2, 3, 2 tokens have mean .7 and variance .16; what the values miss, .188125. Row
    # three was cut: where it goes on with the critic's value, nobody knows its return.
    trainer = scripted_ppo(tmp_path, truncation=truncation, **changes)
    batch_of(trainer)
    logged = {name: trainer._metrics["train"][f"critic/{name}"] for name in ("return_mean", "explained_variance")}
    assert logged == {"return_mean": [pytest.approx(mean)], "explained_variance": [pytest.approx(explained)]}
    assert trainer._metrics["train"]["critic/value_mean"] == [pytest.approx(0.375)]


def test_the_return_that_the_critic_is_measured_by_is_discounted(tmp_path):
    # gamma 1/2: 1/4, 1/2, 1 in the rows of reward 1, then 0, 0 and 1/4, 1/2.
    trainer = scripted_ppo(tmp_path, task_gamma=0.5, task_lam=0.3)
    batch_of(trainer)
    assert trainer._metrics["train"]["critic/return_mean"] == [pytest.approx((1.75 + 1.75 + 0.75) / 10)]


def test_the_page_lists_what_guided_rollouts_log(tmp_path):
    lines = []
    for guidance in (None, {"strength": 1.0}):
        trainer = grpo(tmp_path, lenvm=random_lenvm(), max_steps=1, rollout_guidance=guidance)
        trainer.train()
        trainer.evaluate(prompts(4))
        lines.append([set(entry) for entry in trainer.state.log_history])
    (plain, *_, plain_eval), (guided, *_, guided_eval) = lines
    assert guided - plain == table("Guided rollouts") and plain <= guided and plain_eval == guided_eval
