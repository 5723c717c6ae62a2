"""What a reward function says of correctness: its rewards, or the flags of a penalty that shapes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from lenvm_rl.reward_functions import name_of, unwrapped

# Between the flags 0 and 1.
FLAG_THRESHOLD = 0.5


@runtime_checkable
class ShapedReward(Protocol):
    """A reward function that pays for more than being correct, such as a length penalty, and knows what is correct.

    Attributes:
        unshaped_flags (`list[float | None]` or `None`):
            1 where a completion of the last call in this process was correct, 0 where it was not, `None` where that
            was not judged. `None` before the first call.
    """

    unshaped_flags: list[float | None] | None


@runtime_checkable
class WrappingReward(Protocol):
    """A reward function around another one, which says what is correct.

    Attributes:
        task_reward (`Callable`): the other one.
    """

    task_reward: Callable


def judge_of(function: Callable) -> Callable:
    """The function that a reward function leaves it to, to say what is correct: itself, or the one that it wraps."""
    # A `functools.partial` stays what it is: another one of the same function may judge otherwise.
    bare = unwrapped(function)
    return bare.task_reward if isinstance(bare, WrappingReward) else function


def correctness_values(
    function: Callable, paid: Sequence[float | None], threshold: float = FLAG_THRESHOLD
) -> tuple[Sequence[float | None], float]:
    """What a reward function says of the correctness of the completions that it was just called with.

    Args:
        function (`Callable`): the reward function, right after the call.
        paid (sequence of `float` or `None`): what it returned, one entry per completion.
        threshold (`float`, *optional*, defaults to `0.5`): above which its rewards say that a completion is correct.

    Returns:
        `tuple[Sequence[float | None], float]`: one value per completion, `None` where it was not judged, and the
        threshold above which a value says correct. For a [`ShapedReward`] its flags and 0.5, otherwise what was given.

    Raises:
        `ValueError`: the flags are not those of the completions.
    """
    function = unwrapped(function)
    if not isinstance(function, ShapedReward):
        return paid, threshold
    flags = function.unshaped_flags
    if flags is None or len(flags) != len(paid):
        raise ValueError(
            f"The reward function '{name_of(function)}' says in `unshaped_flags` which completions are correct: it has "
            f"to hold one flag for each of the {len(paid)} completions of its last call, but holds "
            f"{'none' if flags is None else len(flags)}."
        )
    return flags, FLAG_THRESHOLD


def are_correct(function: Callable, paid: Sequence[float | None], threshold: float = FLAG_THRESHOLD) -> list[bool]:
    """Which completions are correct, from the arguments of [`correctness_values`]; what was not judged is not."""
    values, threshold = correctness_values(function, paid, threshold)
    return [value is not None and value > threshold for value in values]
