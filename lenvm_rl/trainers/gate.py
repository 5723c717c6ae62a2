"""What is correct: which reward function says so, and what it says of each completion.

Whoever pays by correctness asks here: the gate of the length stream, `accuracy_floor`, a refresh on correct completions
only, the metrics of correct completions, and the recipes. A completion that the function did not score (`None`) is
neither correct nor wrong: it is *not judged*, and left out of every share.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lenvm_rl.reward_functions import FLAG_THRESHOLD, correctness_values, judge_of
from lenvm_rl.trainers.config import LenVMConfig
from lenvm_rl.trainers.streams import Outcomes

logger = logging.getLogger(__name__)

# Generation batches in a row after which a gate that never opens, or never closes, is worth a warning.
LONG = 20


def gate_index(
    args: LenVMConfig, functions: Sequence[Callable], names: Sequence[str], users: Sequence[str] = ()
) -> int | None:
    """Which reward function says what is correct: the one called `gate_reward`, or the only one there is.

    A penalty around a task reward, beside that task reward, counts as one with it: both say the same.

    Args:
        args ([`~lenvm_rl.trainers.config.LenVMConfig`]): of the run.
        functions, names: the reward functions (`torch.nn.Module` for a reward model), and what TRL calls them.
        users (sequence of `str`, *optional*): settings that need the answer, beside those of `args`.

    Returns:
        `int` or `None`: `None` where nobody says it and nothing in the run needs it.

    Raises:
        `ValueError`: no function is called `gate_reward`, or several are. Or something needs to know what is correct,
            and there are several functions, or none, or a reward model whose scores nothing says how to read.
    """
    if args.gate_reward is not None:
        if names.count(args.gate_reward) != 1:
            found = "several of them are called that" if args.gate_reward in names else "none of them is called that"
            raise ValueError(
                f"gate_reward='{args.gate_reward}' has to name one of the reward functions ({', '.join(names)}), but "
                f"{found}."
            )
        return names.index(args.gate_reward)
    judges = [judge_of(function) for function in functions]
    doubt = _doubt(args, judges, names)
    if doubt is None:
        # The task reward itself where it is there: its numbers are the ones that TRL logs.
        return next((index for index, function in enumerate(functions) if function == judges[0]), 0)
    users = [*args.gate_users, *users]
    if users:
        raise ValueError(f"{' and '.join(users)} must know which completions are correct, {doubt}")
    logger.info("length/correct and length/mean_correct stay empty: they must know which are correct, %s", doubt)
    return None


def _doubt(args: LenVMConfig, judges: list[Callable], names: Sequence[str]) -> str | None:
    """Why these functions do not say what is correct, and what to change; `None` if they do."""
    instead = "or leave out what needs it (length_gate='all' pays every completion for length)"
    if not judges:
        return f"and there is no reward function: give one that pays 1 for correct and 0 for others, {instead}."
    if any(judge != judges[0] for judge in judges):
        return (
            f"and there are several reward functions ({', '.join(names)}): set gate_reward to the name of the one that "
            f"says it, {instead}."
        )
    if isinstance(judges[0], nn.Module) and args.gate_threshold == type(args).gate_threshold:
        return (
            f"but the reward model {names[0]} gives scores, not 0 or 1: set gate_threshold to the score above which a "
            f"completion counts as correct (gate_reward='{names[0]}' keeps {args.gate_threshold}), {instead}."
        )
    return None


class Gate:
    """What a run knows of which completions are correct.

    Args:
        args ([`~lenvm_rl.trainers.config.LenVMConfig`]): of the run.
        functions, names: as in [`gate_index`].

    Attributes:
        index (`int` or `None`): as [`gate_index`] gives it.

    Raises:
        `ValueError`: what [`gate_index`] refuses.
    """

    def __init__(self, args: LenVMConfig, functions: Sequence[Callable], names: Sequence[str]):
        self._args, self._names = args, list(names)
        self.index = gate_index(args, functions, names)
        self._warned = False
        self._closed, self._open, self._never_closed = 0, 0, True

    def outcomes(self, rewards: Tensor, functions: Sequence[Callable], weights: Tensor, rows: slice) -> Outcomes:
        """What the reward functions said about the completions of this process.

        Args:
            rewards (`torch.Tensor` of shape `(N, F)`):
                Raw rewards of all processes, one column per function, NaN where it returned `None`.
            functions: the reward functions, right after they were called.
            weights (`torch.Tensor` of shape `(F,)`): of the functions, in the weighted sum.
            rows (`slice`): of this process, `B` of the `N`.

        Raises:
            `ValueError`: a penalty's flags are not those of the completions.
        """
        mine = rewards[rows]
        weighted = (mine * weights.to(mine.device)).nansum(dim=1)
        return Outcomes(weighted, ~torch.isnan(mine).all(dim=1), *self._correct_and_judged(mine, functions))

    def _correct_and_judged(self, rewards: Tensor, functions: Sequence[Callable]) -> tuple[Tensor, Tensor]:
        if self.index is None:
            nothing = torch.zeros(len(rewards), dtype=torch.bool, device=rewards.device)
            return nothing, nothing
        paid = [None if math.isnan(value) else value for value in rewards[:, self.index].tolist()]
        said, threshold = correctness_values(functions[self.index], paid, self._args.gate_threshold)
        values = torch.tensor([math.nan if value is None else value for value in said], device=rewards.device)
        judged = ~torch.isnan(values)
        self._check_flags(values[judged], threshold)
        return values > threshold, judged

    def _check_flags(self, values: Tensor, threshold: float) -> None:
        """Warn, once, of values that are neither 0 nor 1 and that nobody said how to read."""
        if self._warned or not self._args.gate_users or threshold != FLAG_THRESHOLD:
            return
        odd = values[(values != 0.0) & (values != 1.0)]
        if len(odd):
            self._warned = True
            logger.warning(
                "the reward function '%s' says what is correct, but it gives values such as %g, neither 0 nor 1; they "
                "are read as correct above %g. Set gate_threshold to the value above which a completion is correct, or "
                "gate_reward to a function that pays 1 for correct completions and 0 for others.",
                self._names[self.index],
                float(odd[0]),
                threshold,
            )

    def watch(self, correct_share: float, is_paid: bool) -> None:
        """Warn where a gate has not opened for long, or has never closed.

        Args:
            correct_share (`float`): of a generation batch of training, of all processes; NaN if none was judged.
            is_paid (`bool`): whether its length stream pays anybody.
        """
        if not self._args.gate_users:
            return
        users = " and ".join(self._args.gate_users)
        is_open = correct_share > 0.0 and is_paid
        self._closed = 0 if is_open else self._closed + 1
        self._never_closed = self._never_closed and correct_share == 1.0
        self._open = self._open + 1 if self._never_closed else 0
        if self._closed == LONG:
            logger.warning(
                "%s: in %d generation batches in a row no completion was both correct and paid for length "
                "(length/correct is %g in the last one; nan: none was judged). Check that '%s' says what is correct "
                "(gate_reward), that gate_threshold=%g fits its values, and that the policy can do the task at all.",
                users,
                LONG,
                correct_share,
                self._names[self.index],
                self._args.gate_threshold,
            )
        if self._open == LONG:
            logger.warning(
                "%s: every completion of the first %d generation batches counts as correct. If the task is not that "
                "easy, '%s' does not say what is correct: set gate_reward, or gate_threshold.",
                users,
                LONG,
                self._names[self.index],
            )
