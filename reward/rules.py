"""Length rules: what a completion is paid for its length, as pure functions of a batch, each with its paper.

A rule maps ``(lengths, correct, group, **knobs)`` to rewards `(N,)`, float32. `lengths` `(N,)` are tokens, as
[`reward.length_reward.LengthReward`] counts them; `correct` `(N,)` holds 0 or 1; `group` `(N,)` holds integers that
completions of one prompt share, in any order, and may be `None` for rules that look at no group. In the formulas `L` is
a completion's length and `C` its correctness.

Default everywhere but in [`cosine`]: the length of a wrong answer does not matter to its own reward, since charging for
it teaches to fail fast. Where a paper lets wrong answers pay, `penalize_wrong=True` is the paper's form. A
`target_length` is one number of tokens for all or `(N,)`, one for each. Every rule but Kimi's contains the task reward
and stands in its place; Kimi's is to be added to it.

A rule is not told whether a completion ended or was cut, nor how well it is formed. What papers have for these is in
the task reward's hands: a cut answer that it calls wrong, as the sandbox's does, gets what wrong ones get and is out of
statistics over correct ones.

A prompt with one completion has nothing to compare it with: a correct one then gets 0 from Kimi's rule,
``1 - alpha / 2`` from Arora's, `alpha` from ShorterBetter, ``1 / (1 + alpha)`` from GR³ and ``1 - coefficient`` by the
pass rate, whatever its length.

A rule of your own is one function under [`length_rule`]; `LengthReward` then knows it by name:

    @length_rule(scope="completion")
    def halved(lengths, correct, group, *, limit):
        return correct * (1.0 - 0.5 * (lengths > limit))

DAPO's soft overlong punishment (arXiv 2503.14476) is TRL's own, `trl.rewards.get_soft_overlong_punishment`; so is a
cosine, `trl.rewards.get_cosine_scaled_reward`, without the branch for answers that are too long.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """A rule and what it has to be given.

    Args:
        rewards (`Callable`): the function.
        scope (`str`):
            What a reward depends on: the completion alone (`"completion"`; `group` is then `None`), all of its prompt
            (`"group"`), or a state that all completions of a batch move (`"batch"`).
        least_generations (`int`): with fewer completions of a prompt, length makes no difference.
        state (`Callable`, *optional*):
            Makes, of the knobs, what the rule remembers from batch to batch, the same on every process: a
            [`~lenvm_rl.reward_functions.StatefulReward`] with `knobs()`, the rule's keyword arguments as they stand,
            `shown()`, numbers to log by name, and `move(sampled, lengths, correct, group)`, which takes in the lengths
            of all that was sampled, and what the rule was called with.
    """

    rewards: Callable[..., Tensor]
    scope: Literal["completion", "group", "batch"]
    least_generations: int
    state: Callable[..., Any] | None


# Every rule by its name: the one list of what `LengthReward` takes.
LENGTH_RULES: dict[str, Rule] = {}


def length_rule(
    *,
    scope: Literal["completion", "group", "batch"] = "group",
    least_generations: int = 1,
    state: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a function a rule of its name: it gets checked lengths and flags, float32, and groups as indices from 0."""

    def registered(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(formula)
        def rewards(lengths: Tensor, correct: Tensor, group: Tensor | None = None, **knobs: Any) -> Tensor:
            if scope == "group" and group is None:
                raise ValueError(f"{formula.__name__} needs `group`: the prompt that each completion belongs to.")
            return formula(*_checked(lengths, correct, group), **knobs)

        LENGTH_RULES[formula.__name__] = Rule(rewards, scope, least_generations, state)
        return rewards

    return registered


@length_rule(scope="completion")
def linear(lengths: Tensor, correct: Tensor, group: Tensor | None, *, alpha: float, max_length: int) -> Tensor:
    """Correct answers earn less the longer they are: ``C * (1 - alpha * min(L, L_max) / L_max)``.

    The simplest gated penalty; no paper of its own. ``alpha = 0.5``, ``L_max = 100``: 40 tokens earn 0.8, 100 or more
    0.5, a wrong answer 0.

    Args:
        alpha (`float`): share of the reward lost at `max_length`, in [0, 1].
        max_length (`int`): `L_max` in tokens; longer completions are treated as this long.
    """
    _check("alpha", alpha, 0, 1)
    _check("max_length", max_length, 1)
    return correct * (1.0 - alpha * (lengths / max_length).clamp(max=1.0))


@length_rule(scope="completion")
def truncation(lengths: Tensor, correct: Tensor, group: Tensor | None, *, limit: int) -> Tensor:
    """Correct answers count only up to a limit: ``C * 1(L <= limit)``.

    DLER, arXiv 2510.15110. In its authors' scripts the limit is the cap of sampling, 4000 tokens, and an answer that
    was cut there earns nothing; here one of exactly `limit` tokens counts, ended or cut. Its lesson is that the
    optimizer matters more than the penalty's form: the group's mean is the baseline and only the deviation is the
    batch's (`scale_rewards="batch"`, which takes the rewards' deviation, theirs that of the centred ones),
    `epsilon_high=0.28`, and groups whose rewards are all equal are dropped. ``limit = 100``: 100 and 101 tokens earn 1
    and 0.
    """
    _check("limit", limit, 1)
    return correct * (lengths <= limit)


@length_rule(scope="completion")
def cosine(
    lengths: Tensor,
    correct: Tensor,
    group: Tensor | None,
    *,
    max_length: int,
    margin: int = 16,
    correct_rewards: tuple[float, float] = (2.0, 1.0),
    wrong_rewards: tuple[float, float] = (-10.0, 0.0),
    exceed_reward: float = -10.0,
) -> Tensor:
    """Half a cosine between two rewards: ``end + (start - end) / 2 * (1 + cos(pi * L / L_max))``.

    From `start` at no tokens to `end` at `L_max`, a pair for correct answers and one for wrong ones; whatever the
    answer, ``L + margin >= L_max`` earns `exceed_reward`. Yeo et al., arXiv 2502.03373, numbers from the authors' code
    with ``L_max = 14336``, `margin` from copies of it. The form is the paper's, in which wrong answers earn by being
    *longer*, up to the margin; ``wrong_rewards=(0, 0)`` makes their length count nothing below it. There is no penalty
    for repetition, for which a rule would have to see text. Against TRL's `get_cosine_scaled_reward`: that one lacks
    the last branch and grades mathematics itself. ``L_max = 200``, ``margin = 20``: correct answers of 0, 100, 150 and
    180 tokens earn 2, 1.5, 1.1464 and -10, wrong ones -10, -5, -1.4645 and -10.

    Args:
        max_length (`int`): `L_max`, the cap of sampling.
        margin (`int`, *optional*, defaults to 16): tokens before `max_length` from which an answer is too long.
        correct_rewards (pair of `float`, *optional*, defaults to `(2, 1)`): of a correct answer, start and end.
        wrong_rewards (pair of `float`, *optional*, defaults to `(-10, 0)`): of a wrong answer, start and end.
        exceed_reward (`float`, *optional*, defaults to -10): of an answer that is too long.
    """
    _check("max_length", max_length, 1)
    _check("margin", margin, 0)
    start, end = (
        torch.where(correct.bool(), right, wrong) for right, wrong in zip(correct_rewards, wrong_rewards, strict=True)
    )
    rewards = end + 0.5 * (start - end) * (1.0 + torch.cos(math.pi * lengths / max_length))
    return torch.where(lengths + margin >= max_length, exceed_reward, rewards)


@length_rule(scope="completion")
def l1_exact(
    lengths: Tensor,
    correct: Tensor,
    group: Tensor | None,
    *,
    target_length: Tensor | int,
    alpha: float = 3e-4,
    penalize_wrong: bool = False,
) -> Tensor:
    """Every token away from the wanted length costs: ``C * max(0, 1 - alpha * |n - L|)``.

    L1 (LCPO-Exact), arXiv 2503.04697, `alpha` from there; the prompt names `n`, 100 to 4000 there. The paper's form,
    ``C - alpha * |n - L|``, lets wrong answers pay, too. ``n = 100``, ``alpha = 0.01``: 100, 80 and 300 tokens earn 1,
    0.8 and 0 (-1 with `penalize_wrong`), a wrong answer of 80 tokens 0 (-0.2).
    """
    _check("alpha", alpha, 0)
    cost = alpha * (_checked_target(target_length, lengths) - lengths).abs()
    return correct - cost if penalize_wrong else correct * (1.0 - cost).clamp(min=0.0)


@length_rule(scope="completion")
def l1_max(
    lengths: Tensor,
    correct: Tensor,
    group: Tensor | None,
    *,
    target_length: Tensor | int,
    alpha: float = 1.5e-4,
    delta: float = 0.5,
) -> Tensor:
    """Correct answers earn more the further they stay under a budget: ``C * clip(alpha * (n - L) + delta, 0, 1)``.

    L1 (LCPO-Max), arXiv 2503.04697, which gives this formula, `delta` and ``alpha = 3e-4``; the prompt names `n`. The
    released code computes ``(clip(alpha * (n - L), -1, 1) + 1) / 2``, so that a token is worth half as much: that half
    is the default here. ``n = 100``, ``alpha = 0.01``: 50, 100, 125 and 150 tokens earn 1, 0.5, 0.25 and 0.

    Args:
        alpha (`float`, *optional*, defaults to 1.5e-4): what a token is worth.
        delta (`float`, *optional*, defaults to 0.5): reward of a correct answer of exactly `n` tokens.
    """
    _check("alpha", alpha, 0)
    return correct * (alpha * (_checked_target(target_length, lengths) - lengths) + delta).clamp(0.0, 1.0)


@length_rule(least_generations=2)
def kimi(lengths: Tensor, correct: Tensor, group: Tensor, *, penalize_wrong: bool = False) -> Tensor:
    """Length term of Kimi k1.5 (arXiv 2501.12599, section 2.3.3): shorter than the group's middle gains, longer loses.

    With ``lam = 0.5 - (L - L_min) / (L_max - L_min)`` over the completions of a prompt, 0 where all are equally long:
    ``lam`` if correct, ``min(0, lam)`` if wrong in the paper's form, 0 here. To be *added* to the task reward with a
    weight; the paper turns it on only after a while of training without it. A group of 10, 20 and 30 tokens, the first
    two correct: 0.5, 0 and 0 (-0.5 with `penalize_wrong`).
    """
    shortest, longest = _lowest(lengths, group), -_lowest(-lengths, group)
    spread = longest - shortest
    lam = torch.where(spread > 0, 0.5 - (lengths - shortest) / spread.clamp(min=1.0), torch.zeros_like(lengths))
    wrong = lam.clamp(max=0.0) if penalize_wrong else torch.zeros_like(lam)
    return torch.where(correct.bool(), lam, wrong)


@length_rule(least_generations=2)
def arora(lengths: Tensor, correct: Tensor, group: Tensor, *, alpha: float = 0.1) -> Tensor:
    """Correct answers lose by how long they are among the correct ones: ``C * (1 - alpha * sigmoid(z))``.

    ``z = (L - mean) / (std + 1e-7)`` over the prompt's *correct* completions, with the population's deviation: one that
    alone is correct has z = 0. Arora and Zanette, arXiv 2502.04463, form and `alpha` (0.05 to 0.4 were tried) from the
    authors' code. There an answer without an end-of-sequence earns 0 and is out of the statistics; here only if the
    task reward calls it wrong. ``alpha = 0.2``, correct answers of 10 and 30 tokens: z = -1 and 1, so
    1 - 0.2 * 0.2689 = 0.9462 and 0.8538; one alone earns 0.9.

    Args:
        alpha (`float`, *optional*, defaults to 0.1): the most that a correct answer can lose, in [0, 1].
    """
    _check("alpha", alpha, 0, 1)
    count = _sum(correct, group).clamp(min=1.0)
    away = lengths - _sum(correct * lengths, group) / count
    deviation = (_sum(correct * away**2, group) / count).sqrt()
    return correct * (1.0 - alpha * torch.sigmoid(away / (deviation + 1e-7)))


@length_rule()
def alp(lengths: Tensor, correct: Tensor, group: Tensor, *, beta: float = 1e-7, penalize_wrong: bool = False) -> Tensor:
    """Every token costs, more so where the prompt is easy: ``C * max(0, 1 - beta * L * max(p, 1/K))``.

    `p` is the share of the prompt's `K` completions that are correct. ALP's form, arXiv 2506.05256, second hand, where
    all answers pay, ``C - beta / N * L * max(p, 1/K)``: what N is differs between readings, here it is 1. `beta` as
    reported of its runs (K from 16 to 32) acts only where all of a group are correct and `scale_rewards="group"`
    magnifies what tells them apart. Anything else is ALP's form at a scale of one's own: choose `beta` so that a usual
    length costs a few hundredths. ``beta = 0.01``; 10, 20, 30 and 40 tokens, the first correct: p = 1/4 = 1/K, so
    0.975, 0, 0, 0 (with `penalize_wrong` 0.975, -0.05, -0.075, -0.1). All correct: 0.9, 0.8, 0.7, 0.6.

    Args:
        beta (`float`, *optional*, defaults to 1e-7): price of a token of a prompt that is always solved.
    """
    _check("beta", beta, 0)
    cost = beta * lengths * _sum(correct, group).clamp(min=1.0) / _sum(torch.ones_like(correct), group)
    return correct - cost if penalize_wrong else correct * (1.0 - cost).clamp(min=0.0)


@length_rule(least_generations=2)
def pass_rate(lengths: Tensor, correct: Tensor, group: Tensor, *, coefficient: float = 0.25) -> Tensor:
    """Correct answers pay by relative length, more so where the prompt is easy: ``C - k * C * p * L / L_max``.

    `p` is the share of the prompt's completions that are correct, `L_max` the length of the longest of them, correct or
    not, `k` the coefficient. ALP's idea (arXiv 2506.05256) as prime-rl has it, `k` from there, second hand; no paper of
    its own. Theirs takes graded rewards, this one flags, and without the gate on success every answer paid there.
    ``k = 0.25``; 10 and 30 tokens correct, 40 wrong: p = 2/3, so 1 - 0.25 * 2/3 * 1/4 = 0.9583, 0.875 and 0.

    Args:
        coefficient (`float`, *optional*, defaults to 0.25): the most that a correct answer can lose, in [0, 1].
    """
    _check("coefficient", coefficient, 0, 1)
    share = _sum(correct, group) / _sum(torch.ones_like(correct), group)
    longest = -_lowest(-lengths, group)
    # Where all lengths are 0, so is the longest.
    return correct * (1.0 - coefficient * share * lengths / longest.clamp(min=1.0))


@length_rule(least_generations=2)
def shorter_better(
    lengths: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 1e-3,
    penalize_wrong: bool = False,
) -> Tensor:
    """Every token away from the group's best length costs: ``C * max(0, alpha - beta * |L - L*|)``.

    `L*` is the length of the prompt's shortest correct completion, or the mean of all where none is correct.
    ShorterBetter, arXiv 2504.21370, `alpha` and `beta` from the authors' code; there all answers pay,
    ``alpha * C - beta * |L - L*|``. ``beta = 0.01``, 100 and 150 tokens correct, 50 wrong: 2, 1.5 and 0 (-0.5).
    """
    _check("alpha", alpha, 0)
    _check("beta", beta, 0)
    best = _lowest(torch.where(correct.bool(), lengths, torch.full_like(lengths, torch.inf)), group)
    mean = _sum(lengths, group) / _sum(torch.ones_like(correct), group)
    cost = beta * (lengths - torch.where(best.isinf(), mean, best)).abs()
    return alpha * correct - cost if penalize_wrong else correct * (alpha - cost).clamp(min=0.0)


@length_rule(least_generations=2)
def gr3(lengths: Tensor, correct: Tensor, group: Tensor, *, alpha: float = 0.33) -> Tensor:
    """The task reward, divided by relative length: ``C / (1 + alpha * L / L_mean)``.

    `L_mean` is over all completions of the prompt. GR³, arXiv 2603.10535, form and `alpha` as in prime-rl's code; the
    baseline is the mean of these rescaled rewards, which is GRPO's. ``alpha = 1``, 50 and 150 tokens correct, 100
    wrong: 1 / 1.5, 1 / 2.5 and 0.
    """
    _check("alpha", alpha, 0)
    mean = _sum(lengths, group) / _sum(torch.ones_like(correct), group)
    # Where all lengths are 0, so is the mean.
    return correct / (1.0 + alpha * lengths / torch.where(mean > 0, mean, torch.ones_like(mean)))


@length_rule(scope="completion")
def laser(
    lengths: Tensor, correct: Tensor, group: Tensor | None, *, target_length: Tensor | int, bonus: float = 0.5
) -> Tensor:
    """A bonus for correct answers within a target: ``C + bonus * C * 1(L <= L_T)``.

    LASER, arXiv 2505.15612, `bonus` from the authors' code; `L_T` is 2048 to 8192 tokens in its runs. Its base is no
    flag but 1 for a correct answer, -0.5 for a wrong one and -1 for bad format, which a rule cannot see: as a share of
    what being correct is worth, its bonus is 1/3, and ``1.5 * (C + 1/3 * C * 1(L <= L_T)) - 0.5`` is its reward.
    ``L_T = 100``: 100 and 101 tokens earn 1.5 and 1, a wrong answer 0.
    """
    _check("bonus", bonus, 0)
    return correct * (1.0 + bonus * (lengths <= _checked_target(target_length, lengths)))


# LASER-D's tiers by the group's pass rate: easy from 2/3 on, medium from 1/3 on, hard below.
TIERS = ("easy", "medium", "hard")


def difficulty(correct: Tensor, group: Tensor) -> Tensor:
    """The tier of each completion's prompt, an index into [`TIERS`], from `correct` and `group` `(N,)`."""
    # In whole numbers: 2 of 3 must not fall below 2/3 by rounding.
    index = torch.unique(group, return_inverse=True)[1]
    solved, count = _sum(correct.float(), index).long(), _sum(torch.ones_like(index), index)
    return (3 * solved < 2 * count).long() + (3 * solved < count).long()


def adaptive_targets(
    within: Tensor, completions: Tensor, candidates: Sequence[int], num_generations: int
) -> list[int | None]:
    """For each difficulty, the smallest target that still lets a correct answer be expected.

    LASER-D (arXiv 2505.15612) expects ``ECR = P(L <= l) * n`` correct answers within `l` tokens, `n` being the fewest
    of the `K` completions of a prompt that its tier has correct: ``floor(2K/3)`` of an easy one, ``floor(K/3)`` of a
    medium one, 1 of a hard one, as in its released code (at least 1 here, which matters below K = 3). A hard prompt's
    target is therefore one that *all* completions of the tier stay within.

    Worked example: K = 6, so n = 4, 2, 1. Of 8 completions each, 2, 4 and 4 stay within 100 tokens and all within 200:
    ECR(100) = 1, 1 and 0.5: the targets are 100, 100, 200.

    Args:
        within (`torch.LongTensor` of shape `(3, M)`): completions of each tier that stay within each candidate.
        completions (`torch.LongTensor` of shape `(3,)`): completions of each tier.
        candidates (sequence of `M` `int`): target lengths to choose from, ascending.
        num_generations (`int`): `K`.

    Returns:
        `list` of `int` or `None`: a target for each tier; `None` without completions, or where no candidate will do.
    """
    fewest = (max(1, 2 * num_generations // 3), max(1, num_generations // 3), 1)
    targets: list[int | None] = []
    for tier, count in enumerate(completions.tolist()):
        inside = zip(candidates, within[tier].tolist(), strict=True)
        # In whole numbers: share * n >= 1.
        enough = (length for length, some in inside if count and some * fewest[tier] >= count)
        targets.append(next(enough, None))
    return targets


class LaserTargets:
    """LASER-D's targets, which follow the policy: the state of a rule.

    It counts, by difficulty, how many completions stay within each candidate, and after every `every` calls takes the
    smallest candidate that still lets a correct answer be expected ([`adaptive_targets`], `K` being the mean size of
    the counted groups, rounded down). A difficulty that did not occur keeps its target; one that no candidate is long
    enough for takes the longest. The paper's code counts on 500 training problems, sampled anew every 20 steps; a
    reward function cannot sample, so here the training batches since the last change are counted.

    Args:
        candidates (sequence of `int`):
            Target lengths to choose from, ascending; 4096 to 16384 by 1024 in that code. The longest should be
            `max_completion_length`; all targets start there.
        every (`int`, *optional*, defaults to 20): calls between two changes, from there.
        knobs: further keyword arguments of the rule.
    """

    def __init__(self, *, candidates: Sequence[int], every: int = 20, **knobs: Any):
        self.candidates = [int(length) for length in candidates]
        if not self.candidates or any(b <= a for a, b in zip(self.candidates, self.candidates[1:], strict=False)):
            raise ValueError(f"candidates must be ascending lengths, at least one, got {self.candidates}.")
        _check("the shortest of candidates", self.candidates[0], 1)
        if every < 1:
            raise ValueError(f"every must be at least 1 call, got {every}.")
        self.every, self.fixed = every, knobs
        self.reset()

    def knobs(self) -> dict[str, Any]:
        return {**self.fixed, "targets": self.targets}

    def shown(self) -> dict[str, float]:
        return {f"target_{tier}": float(target) for tier, target in zip(TIERS, self.targets, strict=True)}

    def move(self, sampled: Sequence[int], lengths: Tensor, correct: Tensor, group: Tensor | None) -> None:
        tier = difficulty(correct, group)
        of_tier = torch.nn.functional.one_hot(tier, len(TIERS)).long()
        inside = (lengths[:, None] <= torch.tensor(self.candidates)).long()
        groups = torch.bincount(torch.unique(torch.stack([group, tier]), dim=1)[1], minlength=len(TIERS))
        counts = torch.cat([of_tier.T @ inside, of_tier.sum(0)[:, None], groups[:, None]], dim=1)
        self.counts = (torch.tensor(self.counts) + counts).tolist()
        self.calls += 1
        if self.calls == self.every:
            self._change()

    def _change(self) -> None:
        within, completions, groups = torch.tensor(self.counts).split([len(self.candidates), 1, 1], dim=1)
        if groups.any():
            size = int(completions.sum() // groups.sum())
            for tier, target in enumerate(adaptive_targets(within, completions[:, 0], self.candidates, size)):
                if groups[tier]:
                    self.targets[tier] = self.candidates[-1] if target is None else target
        self._start_counting()

    def _start_counting(self) -> None:
        self.calls = 0
        # By tier: completions that stay within each candidate, all completions, and their groups.
        self.counts = [[0] * (len(self.candidates) + 2) for _ in TIERS]

    def state_dict(self) -> dict[str, Any]:
        counts = [list(row) for row in self.counts]
        return {"targets": list(self.targets), "calls": self.calls, "counts": counts, "candidates": self.candidates[:]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_state(self, state, "candidates", self.candidates)
        self.targets, self.calls = list(state["targets"]), state["calls"]
        self.counts = [list(row) for row in state["counts"]]

    def reset(self) -> None:
        self.targets = [self.candidates[-1]] * len(TIERS)
        self._start_counting()


@length_rule(state=LaserTargets)
def laser_d(lengths: Tensor, correct: Tensor, group: Tensor, *, targets: Sequence[float], bonus: float = 0.5) -> Tensor:
    """[`laser`] with a target for each difficulty: ``C + bonus * C * 1(L <= L_A)``.

    `L_A` is `targets[0]` where at least 2/3 of the prompt's completions are correct, `targets[1]` from 1/3 on, and
    `targets[2]` below. LASER-D, arXiv 2505.15612, `bonus` and tiers from there and its released code, whose base is
    [`laser`]'s; as a reward function its targets come from [`LaserTargets`]. LASER-DE, which also pays 0.5 for a wrong
    answer that is long and does not repeat itself, is not here. Targets 50, 100 and 200, three completions of 80
    tokens, two of them correct: p = 2/3 is easy, 80 is over 50: 1, 1, 0. With one correct, p = 1/3 is medium: 1.5, 0,
    0.

    Args:
        targets (sequence of three `float`): target lengths in tokens of easy, medium and hard prompts.
        bonus (`float`, *optional*, defaults to 0.5): what staying within the target is worth.
    """
    _check("bonus", bonus, 0)
    if len(targets) != len(TIERS):
        raise ValueError(f"targets must be three lengths, for easy, medium and hard prompts, got {list(targets)}.")
    for tier, target in zip(TIERS, targets, strict=True):
        _check(f"targets of {tier} prompts", target, 1)
    target = torch.tensor([float(one) for one in targets])[difficulty(correct, group)]
    return correct * (1.0 + bonus * (lengths <= target))


class LeashMultiplier:
    """Leash's multiplier, the state of a rule: ``lam <- clip(lam + rate * (mean(L) / L_t - 1), bounds)`` per batch.

    Dual ascent on the constraint that the mean length of all that is sampled is at most `L_t` (Leash, arXiv
    2512.21540). lam = 0.5, rate 0.1, L_t = 100: a mean of 150 gives 0.55, one of 80 gives 0.48. The last three defaults
    are from a public implementation of the rule for DAPO; the paper's own step and bounds were not found.

    Args:
        target_length (`int`): wanted mean length in tokens; the paper's runs use 4000, 8000 and 12000.
        multiplier (`float`, *optional*, defaults to 0.01): at the start.
        rate (`float`, *optional*, defaults to 0.02): how fast it moves.
        bounds (pair of `float`, *optional*, defaults to `(0, 2)`): what it is kept within.
        knobs: further keyword arguments of the rule.
    """

    def __init__(
        self,
        *,
        target_length: int,
        multiplier: float = 0.01,
        rate: float = 0.02,
        bounds: tuple[float, float] = (0.0, 2.0),
        **knobs: Any,
    ):
        _check("rate", rate, 0)
        if not 0 <= bounds[0] <= multiplier <= bounds[1]:
            raise ValueError(f"multiplier={multiplier} must lie within bounds={bounds}, which begin at 0 or above.")
        # Plain numbers, which a checkpoint can hold.
        self.target_length = int(target_length) if float(target_length).is_integer() else float(target_length)
        self.start, self.rate, self.fixed = float(multiplier), float(rate), knobs
        self.bounds = (float(bounds[0]), float(bounds[1]))
        self.reset()

    def knobs(self) -> dict[str, Any]:
        return {**self.fixed, "target_length": self.target_length, "multiplier": self.multiplier}

    def shown(self) -> dict[str, float]:
        return {"multiplier": self.multiplier}

    def move(self, sampled: Sequence[int], lengths: Tensor, correct: Tensor, group: Tensor | None) -> None:
        if sampled:
            over = sum(sampled) / len(sampled) / self.target_length - 1.0
            low, high = self.bounds
            self.multiplier = min(max(self.multiplier + self.rate * over, low), high)

    def state_dict(self) -> dict[str, Any]:
        return {"multiplier": self.multiplier, "target_length": self.target_length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_state(self, state, "target_length", self.target_length)
        self.multiplier = float(state["multiplier"])

    def reset(self) -> None:
        self.multiplier = self.start


@length_rule(scope="batch", state=LeashMultiplier)
def leash(
    lengths: Tensor, correct: Tensor, group: Tensor | None, *, target_length: Tensor | int, multiplier: float
) -> Tensor:
    """Length over a target costs, at a price that changes: ``clip(2C - 1 - lam * max(0, L / L_t - 1), -1, 1)``.

    Leash, arXiv 2512.21540: reward as great as can be with a mean length of at most `L_t`; `lam` is the constraint's
    multiplier, as a reward function from [`LeashMultiplier`]. The form is second hand: ``clip(r - lam * Delta, -1,
    1)``, with `Delta` the hinge. What numbers the task reward `r` has there was not found; here they are 1 and -1, the
    ends of the clip, so that a wrong answer has -1 already and does not pay for its length; with ``r = C`` it would.
    One-sided: shorter than `L_t` earns nothing. ``L_t = 100``, ``lam = 0.5``: correct answers of 100, 200 and 700
    tokens earn 1, 0.5 and -1.
    """
    _check("multiplier", multiplier, 0)
    over = (lengths / _checked_target(target_length, lengths) - 1.0).clamp(min=0.0)
    return (2.0 * correct - 1.0 - multiplier * over).clamp(-1.0, 1.0)


def _checked(lengths: Tensor, correct: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    for name, given in (("correct", correct), ("group", group)):
        if given is not None and given.shape != lengths.shape:
            raise ValueError(f"{name} must be shaped like lengths, {tuple(lengths.shape)}, got {tuple(given.shape)}.")
    flags = correct.float()
    others = flags[(flags != 0) & (flags != 1)]
    if len(others):
        raise ValueError(
            f"correct must hold 0 or 1: pass a correctness flag, not a shaped reward (found {float(others[0]):g})."
        )
    return lengths.float(), flags, None if group is None else torch.unique(group, return_inverse=True)[1]


def _checked_target(target_length: Tensor | int, lengths: Tensor) -> Tensor:
    target = torch.as_tensor(target_length, dtype=torch.float32)
    if target.ndim and target.shape != lengths.shape:
        raise ValueError(
            f"target_length must be a number or shaped like lengths, {tuple(lengths.shape)}, got {tuple(target.shape)}."
        )
    if bool((~(target >= 1)).any()):
        raise ValueError(f"target_length must be at least 1 token, got {float(target.min()):g}.")
    return target


def _check(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high or value == math.inf:
        raise ValueError(f"{name} must be a number from {low} to {high}, got {value}.")


def _check_state(rule_state: Any, state: Mapping[str, Any], name: str, value: Any) -> None:
    """Raise a `ValueError` if a state lacks something or was made with another value of `name`."""
    missing = sorted(set(rule_state.state_dict()) - set(state))
    if missing:
        raise ValueError(f"This is no state of {type(rule_state).__name__}: it has no {', '.join(missing)}.")
    if state[name] != value:
        raise ValueError(
            f"The state was made with {name}={state[name]}, but it is {value} now: take the setting back, or start a "
            "new run."
        )


def _sum(values: Tensor, index: Tensor) -> Tensor:
    """The sum over each completion's group, for each completion."""
    count = int(index.max()) + 1 if index.numel() else 0
    return values.new_zeros(count).scatter_add(0, index, values)[index]


def _lowest(values: Tensor, index: Tensor) -> Tensor:
    """The lowest value in each completion's group, for each completion."""
    count = int(index.max()) + 1 if index.numel() else 0
    return values.new_zeros(count).scatter_reduce(0, index, values, "amin", include_self=False)[index]
