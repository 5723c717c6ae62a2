"""Sequence-level length penalties: what people use today to shorten reasoning, and so the baselines to compare with.

Each is a pure function ``(lengths, correct, group, **knobs) -> rewards`` over `N` completions, and a TRL reward
function that wraps a task reward and calls it. The task reward must be a correctness flag, 0 or 1: a shaped number in
its place would silently change what is penalised.

Keep the unshaped reward in view: give TRL the task reward too (with weight 0 in `reward_weights` where the penalty
already contains it), and filter and evaluate on that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def linear_length_reward(
    lengths: Tensor, correct: Tensor, group: Tensor | None = None, *, alpha: float, max_length: int
) -> Tensor:
    """Correct answers earn less the longer they are: ``C * (1 - alpha * min(L, L_max) / L_max)``.

    Gate: only correct answers pay, so failing fast is never rewarded. No paper of its own: the simplest
    correctness-gated penalty. Contains the task reward; use it in its place.

    Worked example: ``alpha = 0.5``, ``L_max = 100``: a correct answer of 40 tokens earns 1 - 0.5 * 0.4 = 0.8, one of
    100 or more earns 0.5, a wrong one 0.

    Args:
        lengths (`torch.Tensor` of shape `(N,)`): `L`, tokens of each completion.
        correct (`torch.Tensor` of shape `(N,)`): `C`, 0 or 1.
        group (`torch.Tensor` of shape `(N,)`, *optional*): not used; every penalty takes it.
        alpha (`float`): share of the reward lost at `max_length`, in [0, 1].
        max_length (`int`): `L_max` in tokens; longer completions are treated as this long.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32.
    """
    lengths, flags, _ = _checked(lengths, correct, group)
    _check_linear_knobs(alpha, max_length)
    return flags * (1.0 - alpha * (lengths / max_length).clamp(max=1.0))


def kimi_length_reward(lengths: Tensor, correct: Tensor, group: Tensor, *, penalize_wrong: bool = True) -> Tensor:
    """Length term of Kimi k1.5 (arXiv 2501.12599, section 2.3.3): shorter than the group's middle gains, longer loses.

    With ``lam = 0.5 - (L - L_min) / (L_max - L_min)`` over the completions of a prompt: ``lam`` if correct,
    ``min(0, lam)`` if wrong; 0 for a group whose completions are all equally long.

    Gate: wrong answers never gain, but long ones lose, which teaches to fail fast. `penalize_wrong=False` spares them
    (not in the paper). To be *added* to the task reward with a weight; the paper turns it on only after a while of
    training without it.

    Worked example: a group of 10, 20 and 30 tokens, the first two correct: 0.5, 0.0 and min(0, -0.5) = -0.5.

    Args:
        lengths (`torch.Tensor` of shape `(N,)`): `L`, tokens of each completion.
        correct (`torch.Tensor` of shape `(N,)`): 0 or 1.
        group (`torch.Tensor` of shape `(N,)`): integers; completions of one prompt share theirs.
        penalize_wrong (`bool`, *optional*, defaults to `True`): whether wrong answers lose by their length.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32, in [-0.5, 0.5].
    """
    lengths, flags, index = _checked(lengths, correct, group)
    if index is None:
        raise ValueError("kimi_length_reward needs `group`: the prompt that each completion belongs to.")
    count = int(index.max()) + 1 if index.numel() else 0
    shortest = lengths.new_zeros(count).scatter_reduce(0, index, lengths, "amin", include_self=False)[index]
    longest = lengths.new_zeros(count).scatter_reduce(0, index, lengths, "amax", include_self=False)[index]
    spread = longest - shortest
    lam = torch.where(spread > 0, 0.5 - (lengths - shortest) / spread.clamp(min=1.0), torch.zeros_like(lengths))
    wrong = lam.clamp(max=0.0) if penalize_wrong else torch.zeros_like(lam)
    return torch.where(flags.bool(), lam, wrong)


class LengthReward:
    """A TRL reward function made of a task reward and a length penalty. Picklable; called as TRL calls any.

    Completions of one prompt must stand together, as TRL has them: runs of equal prompts are the groups. A call sees
    the completions of one process only, so choose a per-device batch that is a multiple of `num_generations` where the
    penalty compares within a group. Lengths are counted in `completion_ids`, end-of-sequence included.

    Args:
        task_reward (`Callable`):
            TRL reward function that returns 0 or 1 for each completion, or `None` where it does not apply; such
            completions get `None` and are left out of their group.
        knobs: keyword arguments of the penalty.
    """

    penalty: Callable[..., Tensor]

    def __init__(self, task_reward: Callable, **knobs):
        if not callable(task_reward):
            raise ValueError(f"task_reward must be a TRL reward function, got {type(task_reward).__name__}.")
        if inspect.iscoroutinefunction(task_reward) or inspect.iscoroutinefunction(type(task_reward).__call__):
            raise ValueError("task_reward is asynchronous: a length penalty needs an ordinary function.")
        self.task_reward = task_reward
        self.knobs = knobs
        self.__name__ = f"{task_reward.__name__}_{type(self).name}"

    name = "length"

    def __call__(self, prompts: Sequence, completions: Sequence, completion_ids: Sequence, **columns) -> list:
        """Rewards of the completions, in order; `None` where the task reward is `None`."""
        flags = self.task_reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        if len(flags) != len(completion_ids):
            raise ValueError(
                f"{self.task_reward.__name__} gave {len(flags)} rewards for {len(completion_ids)} completions: it must "
                "return one for each."
            )
        counted = [index for index, flag in enumerate(flags) if flag is not None]
        groups = _runs(prompts)
        rewards = type(self).penalty(
            torch.tensor([len(completion_ids[index]) for index in counted]),
            torch.tensor([float(flags[index]) for index in counted]),
            torch.tensor([groups[index] for index in counted], dtype=torch.long),
            **self.knobs,
        )
        result: list[float | None] = [None] * len(flags)
        for index, reward in zip(counted, rewards.tolist(), strict=True):
            result[index] = reward
        return result


class LinearLengthReward(LengthReward):
    """[`linear_length_reward`] as a TRL reward function; contains the task reward, so use it in its place.

    Args:
        task_reward (`Callable`): see [`LengthReward`].
        alpha (`float`): share of the reward lost at `max_length`.
        max_length (`int`): tokens at which it is lost; `max_completion_length` is a natural choice.
    """

    name = "linear"
    penalty = staticmethod(linear_length_reward)

    def __init__(self, task_reward: Callable, *, alpha: float, max_length: int):
        _check_linear_knobs(alpha, max_length)
        super().__init__(task_reward, alpha=alpha, max_length=max_length)


class KimiLengthReward(LengthReward):
    """[`kimi_length_reward`] as a TRL reward function: the length term alone, to stand beside the task reward.

    Args:
        task_reward (`Callable`): see [`LengthReward`].
        penalize_wrong (`bool`, *optional*, defaults to `True`): whether wrong answers lose by their length.
    """

    name = "kimi"
    penalty = staticmethod(kimi_length_reward)

    def __init__(self, task_reward: Callable, *, penalize_wrong: bool = True):
        super().__init__(task_reward, penalize_wrong=penalize_wrong)


def _runs(prompts: Sequence) -> list[int]:
    """The number of the run of equal prompts that each prompt stands in: a, a, b, b, b -> 0, 0, 1, 1, 1."""
    runs, current = [], 0
    for index, prompt in enumerate(prompts):
        current += index > 0 and prompt != prompts[index - 1]
        runs.append(current)
    return runs


def _check_linear_knobs(alpha: float, max_length: int) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}: a correct answer would earn less than a wrong one.")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1 token, got {max_length}.")


def _checked(lengths: Tensor, correct: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lengths and flags as float32 and groups as indices from 0, or a `ValueError` saying what is wrong."""
    for name, given in (("correct", correct), ("group", group)):
        if given is not None and given.shape != lengths.shape:
            raise ValueError(f"{name} must be shaped like lengths, {tuple(lengths.shape)}, got {tuple(given.shape)}.")
    flags = correct.float()
    if bool(((flags != 0) & (flags != 1)).any()):
        raise ValueError(
            "correct must hold 0 or 1: pass a correctness flag, not a shaped reward "
            f"(found {float(flags[(flags != 0) & (flags != 1)][0]):g})."
        )
    index = None if group is None else torch.unique(group, return_inverse=True)[1]
    return lengths.float(), flags, index
