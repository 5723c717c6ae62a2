"""Estimators of the gradient that shortens: each turns a batch of graded completions into advantages `(N, T)`.

All are to be multiplied with ``grad log pi(a_t | s_t)`` and summed; a larger advantage makes a token likelier. Groups
are runs of `group_size` rows; where each is of one completion, the whole batch stands for the group in every baseline,
for nothing else is there to compare with. What a completion gets as a whole is the same number at each of its tokens
and has the group's mean for a baseline, as in GRPO (arXiv 2402.03300) and its variant without the division (arXiv
2503.20783). The mean of the *others* (arXiv 2402.14740) differs by the factor ``K / (K - 1)`` only, so its
signal-to-noise ratio is the same. Of the rules in `reward.rules` these are the ones that need no target or longest
length, for on that their direction would depend; where a penalty contains the task reward, it is taken out.

Returns are as in `lenvm_rl.returns`. Without a model a cut completion is taken for one that ended at the cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lenvm_rl.advantages import length_advantage
from lenvm_rl.trainers.streams import WHITEN_EPSILON, Completions, Outcomes, Processes, centered_gated_advantage
from reward.rules import LENGTH_RULES

TASK, SEQUENCE, GROUP, LENVM = "task", "sequence", "group", "LenVM"
PLAIN, CONTROL, GATE = "no baseline", "control", "gate"
# Names that the report looks for.
TASK_GRADIENT = "task: correctness"
LENGTH_GRADIENT = "length return to go"
LENVM_GRADIENT = "LenVM, lambda 1"
VALUE_SPACE = "length return of the whole"
NEEDED = (TASK_GRADIENT, LENGTH_GRADIENT, LENVM_GRADIENT, VALUE_SPACE, "length penalty")
# The name of values of a model that was fitted to correct completions only.
OF_CORRECT = "correct"


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
        others (mapping of [`LengthValues`]): of other length value models, by name; [`OF_CORRECT`] is one that was
            fitted to correct completions only.
    """

    completions: Completions
    correct: Tensor
    group_size: int
    max_length: int
    length: LengthValues
    others: Mapping[str, LengthValues] = field(default_factory=dict)

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

    @property
    def compared(self) -> int:
        """Completions that are compared with each other: a group, or the batch where groups are of one."""
        return self.group_size if self.group_size > 1 else len(self.correct)

    def per_group(self, numbers: Tensor) -> Tensor:
        """The mean of a number per completion over those that it is compared with, for each completion: `(N,)`."""
        return numbers.view(-1, self.compared).mean(dim=1).repeat_interleave(self.compared)

    def at_tokens(self, numbers: Tensor) -> Tensor:
        """A number per completion at each of its tokens: `(N, T)`."""
        return torch.where(self.completions.actions, numbers.unsqueeze(1), 0.0)


@dataclass(frozen=True)
class Estimator:
    """A way to estimate.

    Args:
        name (`str`): unique.
        kind (`str`): `"task"`, `"sequence"`, `"group"`, `"LenVM"`, `"no baseline"`, `"control"` or `"gate"`.
        advantages (`Callable`): takes a [`GradedBatch`], returns `(N, T)`.
        least_group (`int`): fewest completions of a prompt with which it means anything.
    """

    name: str
    kind: str
    advantages: Callable[[GradedBatch], Tensor]
    least_group: int = 1


def centred(batch: GradedBatch, rewards: Callable[[GradedBatch], Tensor], scaled: bool = False) -> Tensor:
    """Rewards `(N,)` less their group's mean, at every token.

    `scaled` divides by the group's standard deviation, as TRL does by default (arXiv 2402.03300, eq. 3).
    """
    paid = rewards(batch)
    advantages = batch.at_tokens(paid - batch.per_group(paid))
    if not scaled:
        return advantages
    deviation = paid.view(-1, batch.compared).std(dim=1).repeat_interleave(batch.compared)
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
    kept = torch.where(counted, batch.returns, 0.0).view(-1, batch.compared, mask.shape[1])
    running = counted.view(kept.shape).sum(dim=1, keepdim=True)
    mean = (kept.sum(dim=1, keepdim=True) / running.clamp(min=1)).expand(kept.shape).reshape(mask.shape)
    return torch.where(counted, batch.returns - mean, 0.0)


def constant_values(batch: GradedBatch) -> LengthValues:
    """The mean of V over the tokens of the batch at every state: a baseline that knows neither prompt nor token."""
    states, mask = batch.length.states, batch.completions.mask
    return LengthValues(torch.full_like(states, float(states[:, :-1][mask].mean())), batch.length.gamma)


def borrowed_values(batch: GradedBatch) -> LengthValues:
    """V of the group's next rollout at the same place, or at its last token: what the prompt says, not the tokens."""
    states = of_next_in_group(batch.length.states, batch.completions.mask, batch.group_size)
    return LengthValues(states, batch.length.gamma)


def of_next_in_group(values_bt1: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """For each row, the values `(B, T + 1)` of the next row of its group; behind that one's end, of its last token."""
    count, width = values_bt1.shape
    last = (mask.sum(dim=1) - 1).clamp(min=0).unsqueeze(1)
    place = torch.arange(width, device=values_bt1.device).expand(count, width).minimum(last)
    return values_bt1.gather(1, place).view(-1, group_size, width).roll(1, dims=1).reshape(count, width)


def rescaled_values(batch: GradedBatch) -> LengthValues:
    """V, moved and scaled as its regression on the returns of the batch's finished completions says."""
    states, gamma = batch.length.states, batch.length.gamma
    kept = batch.completions.mask & batch.completions.finished.unsqueeze(1)
    if not kept.any():
        return batch.length
    values, returns = states[:, :-1][kept], batch.returns[kept]
    away = values - values.mean()
    slope = float((away * returns).sum() / away.square().sum().clamp(min=1e-12))
    return LengthValues(returns.mean() + slope * (states - values.mean()), gamma)


def lenvm(
    batch: GradedBatch, lam: float = 1.0, values: Callable[[GradedBatch], LengthValues] = attrgetter("length")
) -> Tensor:
    """[`~lenvm_rl.advantages.length_advantage`] with the values of the frozen model, or others; ungated."""
    values = values(batch)
    completions = batch.completions
    following = completions.following(values.states)
    return length_advantage(values.states[:, :-1], completions.mask, values.gamma, lam, following, completions.actions)


def gated(batch: GradedBatch, gate: Callable[[GradedBatch], Tensor]) -> Tensor:
    """[`lenvm`] at lambda 1, each completion's multiplied by a gate `(N,)`."""
    return gate(batch).unsqueeze(1) * lenvm(batch)


def if_correct_by_its_own(batch: GradedBatch) -> Tensor:
    """The correct completions' alone, with the model that was fitted to such only."""
    return batch.correct.unsqueeze(1) * lenvm(batch, values=of_model(OF_CORRECT))


def of_model(name: str) -> Callable[[GradedBatch], LengthValues]:
    """The values of one of the other models."""
    return lambda batch: batch.others[name]


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


def pass_rate_of_others(batch: GradedBatch) -> Tensor:
    """Share of correct ones among a completion's group without itself, `(N,)`.

    It knows nothing of the completion's own outcome, so as a gate it leaves V a mere baseline (docs/mathematics.md,
    section 7).
    """
    total = batch.per_group(batch.correct) * batch.group_size
    return (total - batch.correct) / (batch.group_size - 1)


# Most rules need groups: a completion alone gets the same from them whatever its length. Kimi's is to be added to the
# task reward, and ShorterBetter's can be given without it. Names without a condition are the papers' forms, in which
# wrong answers pay as well.
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


# Those of them that compare nothing.
ALONE = ("length penalty", VALUE_SPACE, "ALP penalty", "linear penalty, if correct")
LAMBDAS = (0.95, 0.9, 0.0)


def estimators(group_size: int, others: Collection[str] = (), pattern: str | None = None) -> list[Estimator]:
    """All estimators that mean something with groups of a size, in the order of the report.

    Args:
        group_size (`int`): completions of a prompt.
        others (collection of `str`): names in `others` of the batches.
        pattern (`str`, *optional*): a regular expression that a name has to hold; those that the report looks for are
            there in any case.
    """
    found = [
        Estimator(TASK_GRADIENT, TASK, partial(centred, rewards=attrgetter("correct"))),
        Estimator("length penalty / std", SEQUENCE, partial(centred, rewards=shortness, scaled=True)),
        *(
            Estimator(name, SEQUENCE, partial(centred, rewards=rewards), 1 if name in ALONE else 2)
            for name, rewards in PENALTIES.items()
        ),
        Estimator(LENGTH_GRADIENT, PLAIN, return_to_go),
        Estimator("group baseline per sequence", GROUP, whole_baseline),
        Estimator("group baseline per position", GROUP, position_baseline),
        Estimator(LENVM_GRADIENT, LENVM, lenvm),
        *(Estimator(f"LenVM, lambda {lam:g}", LENVM, partial(lenvm, lam=lam)) for lam in LAMBDAS),
        *(
            Estimator(f"LenVM {name}, lambda {lam:g}", CONTROL, partial(lenvm, lam=lam, values=of_model(name)))
            for name in others
            if name != OF_CORRECT
            for lam in (1.0, 0.95)
        ),
        *(
            Estimator(f"LenVM rescaled, lambda {lam:g}", CONTROL, partial(lenvm, lam=lam, values=rescaled_values))
            for lam in (1.0, 0.95)
        ),
        Estimator("constant V", CONTROL, partial(lenvm, values=constant_values)),
        Estimator("V of another rollout", CONTROL, partial(lenvm, values=borrowed_values), 2),
        Estimator("LenVM, if correct", GATE, partial(gated, gate=attrgetter("correct"))),
        Estimator("LenVM of correct ones, if correct", GATE, if_correct_by_its_own),
        Estimator("LenVM, if correct, centred", GATE, if_correct_centred, 2),
        Estimator("group baseline per position, if correct", GATE, partial(position_baseline, correct_only=True)),
        Estimator("LenVM x pass rate", GATE, partial(gated, gate=pass_rate_of_group), 2),
        Estimator("LenVM x pass rate of the others", GATE, partial(gated, gate=pass_rate_of_others), 2),
    ]
    return [
        each
        for each in found
        if each.least_group <= group_size
        and (OF_CORRECT in others or each.advantages is not if_correct_by_its_own)
        and (pattern is None or each.name in NEEDED or re.search(pattern, each.name))
    ]
