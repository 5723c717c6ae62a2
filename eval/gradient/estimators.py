"""Estimators of the gradient that shortens: each turns a batch of graded completions into advantages `(N, T)`.

All are to be multiplied with ``grad log pi(a_t | s_t)`` and summed; a larger advantage makes a token likelier. Groups
are runs of `group_size` rows. What a completion gets as a whole is the same number at each of its tokens and has the
group's mean for a baseline, as in GRPO (arXiv 2402.03300) and its variant without the division (arXiv 2503.20783). The
mean of the *others* (arXiv 2402.14740) differs by the factor ``K / (K - 1)`` only, so its signal-to-noise ratio is the
same. Of the rules in `reward.rules` these are the ones that need no target or longest length, for on
that their direction would depend; where a penalty contains the task reward, it is taken out.

Returns are as in `lenvm_rl.returns`. Without a model a cut completion is taken for one that ended at the cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lenvm_rl.advantages import length_advantage
from lenvm_rl.trainers.streams import WHITEN_EPSILON, Completions, Outcomes, Processes, centered_gated_advantage
from reward.rules import LENGTH_RULES

TASK, SEQUENCE, GROUP, LENVM, PLAIN, GATE = "task", "sequence", "group", "LenVM", "no baseline", "gate"
# Names that the report looks for.
TASK_GRADIENT = "task: correctness"
LENGTH_GRADIENT = "length return to go"
LENVM_GRADIENT = "LenVM, lambda 1"
VALUE_SPACE = "length return of the whole"


@dataclass(frozen=True)
class LengthValues:
    """What a length value model says about a batch.

    Args:
        states (`torch.Tensor` of shape `(N, T + 1)`): V at every state, the one after the last token included.
        gamma (`float`): the model's discount.
    """

    states: Tensor
    gamma: float


@dataclass(frozen=True)
class GradedBatch:
    """Completions of a batch with all that an estimator may know of them; arrays in float64.

    Args:
        completions ([`~lenvm_rl.trainers.streams.Completions`]): which tokens exist, and which completions finished.
        correct (`torch.Tensor` of shape `(N,)`): 1 where the task reward calls the completion correct, else 0.
        group_size (`int`): completions of one prompt, neighbours.
        max_length (`int`): most tokens of a completion.
        length ([`LengthValues`]): of the frozen length value model.
        length_of_correct ([`LengthValues`], *optional*): of one that was fitted to correct completions only.
    """

    completions: Completions
    correct: Tensor
    group_size: int
    max_length: int
    length: LengthValues
    length_of_correct: LengthValues | None = None

    @property
    def tokens(self) -> Tensor:
        """Tokens of each completion, end-of-sequence counted, as length penalties count them: `(N,)`."""
        return self.completions.mask.sum(dim=1).double()

    @property
    def groups(self) -> Tensor:
        """Index of each completion's group: `(N,)`."""
        return torch.arange(len(self.correct), device=self.correct.device) // self.group_size

    @property
    def returns(self) -> Tensor:
        """``G_t = -(1 - gamma^(L - t))`` at every token: `(N, T)`."""
        mask = self.completions.mask
        return length_advantage(torch.zeros(mask.shape, dtype=torch.float64), mask, self.length.gamma)

    def per_group(self, numbers: Tensor) -> Tensor:
        """The group's mean of a number per completion, for each completion: `(N,)`."""
        means = numbers.view(-1, self.group_size).mean(dim=1, keepdim=True)
        return means.expand(-1, self.group_size).reshape(-1)

    def at_tokens(self, numbers: Tensor) -> Tensor:
        """A number per completion at each of its tokens: `(N, T)`."""
        return torch.where(self.completions.actions, numbers.unsqueeze(1), 0.0)


@dataclass(frozen=True)
class Estimator:
    """A way to estimate.

    Args:
        name (`str`): unique.
        kind (`str`): `"task"`, `"sequence"`, `"group"`, `"LenVM"`, `"no baseline"` or `"gate"`.
        advantages (`Callable`): takes a [`GradedBatch`], returns `(N, T)`.
    """

    name: str
    kind: str
    advantages: Callable[[GradedBatch], Tensor]


def centred(batch: GradedBatch, rewards: Callable[[GradedBatch], Tensor], scaled: bool = False) -> Tensor:
    """Rewards `(N,)` less their group's mean, at every token.

    `scaled` divides by the group's standard deviation, as TRL does by default (arXiv 2402.03300, eq. 3).
    """
    paid = rewards(batch)
    advantages = batch.at_tokens(paid - batch.per_group(paid))
    if not scaled:
        return advantages
    deviation = paid.view(-1, batch.group_size).std(dim=1).repeat_interleave(batch.group_size)
    return advantages / (deviation.unsqueeze(1) + WHITEN_EPSILON)


def shortness(batch: GradedBatch) -> Tensor:
    """``-L``: the simplest penalty, ungated."""
    return -batch.tokens


def whole_return(batch: GradedBatch) -> Tensor:
    """``G_0``, the length return of the whole completion: the penalty in value space."""
    return batch.returns[:, 0]


def rule_term(batch: GradedBatch, rule: str, with_task: bool = True, **knobs: Any) -> Tensor:
    """The length term of a rule by its name in `reward.rules.LENGTH_RULES`.

    `with_task` says that the rule contains the task reward, which is then taken out.
    """
    rewards = LENGTH_RULES[rule].rewards(batch.tokens, batch.correct, batch.groups, **knobs).double()
    return rewards - batch.correct if with_task else rewards


def linear_term(batch: GradedBatch) -> Tensor:
    """``-C L / L_max``."""
    return rule_term(batch, "linear", alpha=1.0, max_length=batch.max_length)


def return_to_go(batch: GradedBatch) -> Tensor:
    """``G_t`` without any baseline: REINFORCE. On finished rows every baseline has its expectation."""
    return batch.returns


def whole_baseline(batch: GradedBatch) -> Tensor:
    """``G_t`` less the group's mean of ``G_0``: one baseline for a whole completion."""
    mean = batch.per_group(batch.returns[:, 0]).unsqueeze(1)
    return torch.where(batch.completions.actions, batch.returns - mean, 0.0)


def position_baseline(batch: GradedBatch, correct_only: bool = False) -> Tensor:
    """``G_t`` less the mean ``G_t`` of the group's completions that are still running at ``t``.

    The completion itself is one of them. So what the mean of the others would give is multiplied by ``(k - 1) / k``,
    with k the number running, which trusts positions less where few run. With `correct_only`, wrong completions neither
    count nor get an advantage.
    """
    mask = batch.completions.actions
    counted = mask & batch.correct.bool().unsqueeze(1) if correct_only else mask
    kept = torch.where(counted, batch.returns, 0.0).view(-1, batch.group_size, mask.shape[1])
    running = counted.view(kept.shape).sum(dim=1, keepdim=True)
    mean = (kept.sum(dim=1, keepdim=True) / running.clamp(min=1)).expand(kept.shape).reshape(mask.shape)
    return torch.where(counted, batch.returns - mean, 0.0)


def position_baseline_of_others(batch: GradedBatch) -> Tensor:
    """As [`position_baseline`], with the mean of the others; where no other runs, as if the end came at once."""
    mask = batch.completions.actions
    returns = batch.returns.view(-1, batch.group_size, mask.shape[1])
    others = mask.view(returns.shape).sum(dim=1, keepdim=True) - mask.view(returns.shape).long()
    mean = (returns.sum(dim=1, keepdim=True) - returns) / others.clamp(min=1)
    mean = torch.where(others > 0, mean, -(1.0 - batch.length.gamma)).view(mask.shape)
    return torch.where(mask, batch.returns - mean, 0.0)


def lenvm(batch: GradedBatch, lam: float = 1.0, values: LengthValues | None = None) -> Tensor:
    """[`~lenvm_rl.advantages.length_advantage`] of the frozen model, ungated."""
    values = values or batch.length
    completions = batch.completions
    following = completions.following(values.states)
    return length_advantage(values.states[:, :-1], completions.mask, values.gamma, lam, following, completions.actions)


def gated(batch: GradedBatch, gate: Callable[[GradedBatch], Tensor]) -> Tensor:
    """[`lenvm`] at lambda 1, each completion's multiplied by a gate `(N,)`."""
    return gate(batch).unsqueeze(1) * lenvm(batch)


def if_correct_by_its_own(batch: GradedBatch) -> Tensor:
    """The correct completions' alone, with the model that was fitted to such only."""
    return batch.correct.unsqueeze(1) * lenvm(batch, values=batch.length_of_correct)


def if_correct_centred(batch: GradedBatch) -> Tensor:
    """[`~lenvm_rl.trainers.streams.centered_gated_advantage`]: open for correct ones, unbiased for any V."""
    completions, states = batch.completions, batch.length.states
    every = torch.ones_like(completions.finished)
    return centered_gated_advantage(
        states[:, :-1],
        completions,
        batch.length.gamma,
        completions.following(states),
        Outcomes(batch.correct, every, batch.correct.bool(), every),
        Processes(batch.group_size),
    )


def pass_rate_of_group(batch: GradedBatch) -> Tensor:
    """Share of correct ones in a completion's group, `(N,)`."""
    return batch.per_group(batch.correct)


def passes(batch: GradedBatch, threshold: float) -> Tensor:
    """1 where [`pass_rate_of_group`] reaches a threshold, else 0."""
    return (pass_rate_of_group(batch) >= threshold).double()


def pass_rate_of_others(batch: GradedBatch) -> Tensor:
    """Share of correct ones among a completion's group without itself, `(N,)`.

    It knows nothing of the completion's own outcome, so as a gate it leaves V a mere baseline (docs/mathematics.md,
    section 7).
    """
    total = batch.per_group(batch.correct) * batch.group_size
    return (total - batch.correct) / (batch.group_size - 1)


# Kimi's rule is to be added to the task reward, and ShorterBetter's can be given without it. Names without a condition
# are the papers' forms, in which wrong answers pay as well.
PENALTIES = {
    "length penalty": shortness,
    VALUE_SPACE: whole_return,
    "ALP penalty": partial(rule_term, rule="alp", beta=1.0, penalize_wrong=True),
    "ShorterBetter penalty": partial(
        rule_term, rule="shorter_better", with_task=False, alpha=0.0, beta=1.0, penalize_wrong=True
    ),
    "Kimi k1.5 penalty": partial(rule_term, rule="kimi", with_task=False, penalize_wrong=True),
    "Kimi k1.5 penalty, if correct": partial(rule_term, rule="kimi", with_task=False),
    "linear penalty, if correct": linear_term,
    "Arora penalty, if correct": partial(rule_term, rule="arora", alpha=1.0),
    "GR3 penalty, if correct": partial(rule_term, rule="gr3"),
    "pass-rate penalty, if correct": partial(rule_term, rule="pass_rate", coefficient=1.0),
}


def estimators(pass_threshold: float, with_values_of_correct: bool) -> list[Estimator]:
    """All estimators, in the order of the report.

    Args:
        pass_threshold (`float`): share of correct completions at which the hard gate by the group's pass rate opens.
        with_values_of_correct (`bool`): whether batches have `length_of_correct`.
    """
    passed = partial(passes, threshold=pass_threshold)
    found = [
        Estimator(TASK_GRADIENT, TASK, partial(centred, rewards=attrgetter("correct"))),
        Estimator("length penalty / std", SEQUENCE, partial(centred, rewards=shortness, scaled=True)),
        *(Estimator(name, SEQUENCE, partial(centred, rewards=rewards)) for name, rewards in PENALTIES.items()),
        Estimator(LENGTH_GRADIENT, PLAIN, return_to_go),
        Estimator("group baseline per sequence", GROUP, whole_baseline),
        Estimator("group baseline per position", GROUP, position_baseline),
        Estimator("baseline of the others per position", GROUP, position_baseline_of_others),
        Estimator(LENVM_GRADIENT, LENVM, lenvm),
        Estimator("LenVM, lambda 0.95", LENVM, partial(lenvm, lam=0.95)),
        Estimator("LenVM, lambda 0", LENVM, partial(lenvm, lam=0.0)),
        Estimator("LenVM, if correct", GATE, partial(gated, gate=attrgetter("correct"))),
        Estimator("LenVM of correct ones, if correct", GATE, if_correct_by_its_own),
        Estimator("LenVM, if correct, centred", GATE, if_correct_centred),
        Estimator("group baseline per position, if correct", GATE, partial(position_baseline, correct_only=True)),
        Estimator("LenVM x pass rate", GATE, partial(gated, gate=pass_rate_of_group)),
        Estimator("LenVM x pass rate of the others", GATE, partial(gated, gate=pass_rate_of_others)),
        Estimator(f"LenVM, if pass rate >= {pass_threshold:g}", GATE, partial(gated, gate=passed)),
    ]
    return [each for each in found if with_values_of_correct or each.advantages is not if_correct_by_its_own]
