"""From a batch to advantages: the streams of task and length, the gate, shaping and whitening, as pure functions.

The trainers put a [`Batch`] together, make [`Streams`] of it, each by the function of its own file (`grpo_streams`,
`ppo_streams`), and set what the policy learns from. Here are the parts that those functions are made of.

Shapes and conventions as in [`lenvm_rl.returns`]: arrays are `(B, T)` and aligned with the completion, entry
``t`` of ``values`` is read before token ``t`` was chosen; value models give `(B, T + 1)`, named `…_bt1`, the last entry
of a row's states being the one after its last token. Tokens that nobody chose (tool output, environment text) exist
but are no actions (`action_mask` of [`lenvm_rl.gae`]): their advantage is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lenvm_rl.advantages import combine, gae, length_advantage
from lenvm_rl.endings import finished_rows, own_lengths
from lenvm_rl.modeling.completions import bootstrap_values
from lenvm_rl.returns import td_residual, wide_dtype
from lenvm_rl.shaping import length_potential, potential_shaping, value_potential

if TYPE_CHECKING:
    from lenvm_rl.trainers.config import LenVMConfig, LenVMPPOConfig

# As in TRL's group-relative advantage: differences far below any real reward are not blown up to size 1.
WHITEN_EPSILON = 1e-4


@dataclass(frozen=True)
class Completions:
    """What a generation batch says about its completions.

    Args:
        mask (`torch.BoolTensor` of shape `(B, T)`): where a token exists, a prefix of ones; empty rows were left out
            of the loss by `mask_truncated_completions`.
        actions (`torch.BoolTensor` of shape `(B, T)`): where the policy chose the token.
        finished (`torch.BoolTensor` of shape `(B,)`): whether nothing follows the last token; else the row was cut.
        lengths (`torch.LongTensor` of shape `(B,)`): tokens that the policy wrote, an end id not counted.
    """

    mask: Tensor
    actions: Tensor
    finished: Tensor
    lengths: Tensor

    def following(self, values_bt1: Tensor, terminal_cut: bool = False) -> Tensor:
        """The value after each row's last token, `(B,)`, from values at every state, `(B, T + 1)`.

        0 where the completion finished, and with `terminal_cut` where it was cut as well.
        """
        ends = torch.ones_like(self.finished) if terminal_cut else self.finished
        return bootstrap_values(values_bt1, self.mask, ends)


@dataclass(frozen=True)
class Outcomes:
    """What the reward functions said about this process's completions.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`): weighted sum of the rewards, 0 where nothing was scored.
        scored (`torch.BoolTensor` of shape `(B,)`): where at least one function returned a number.
        correct (`torch.BoolTensor` of shape `(B,)`): which are correct.
        judged (`torch.BoolTensor` of shape `(B,)`): of which that is known; the others are not wrong.
    """

    rewards: Tensor
    scored: Tensor
    correct: Tensor
    judged: Tensor


@dataclass(frozen=True)
class Processes:
    """Where the rows of this process stand among all rows; the defaults are a single process's.

    Args:
        group_size (`int`): completions of one prompt, neighbours in the rows of all processes put together.
        first_row (`int`, *optional*, defaults to `0`): where the rows of this process start among them.
        gather (`Callable`, *optional*): puts the rows of all processes together.
        reduce (`Callable`, *optional*): sums a tensor over processes.
    """

    group_size: int
    first_row: int = 0
    gather: Callable[[Tensor], Tensor] = lambda rows: rows
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums


@dataclass(frozen=True)
class Batch:
    """What the streams of a generation batch are made of, on this process.

    Args:
        completions ([`Completions`]), outcomes ([`Outcomes`]), processes ([`Processes`]): of the batch.
        relative (`torch.Tensor` of shape `(B,)`): TRL's group-relative advantage.
        length_coef (`float`, *optional*): weight of the length stream in this batch.
        gamma (`float`, *optional*): of the length return; `None` without a length value model.
        max_length (`int`, *optional*): most tokens of a completion, the unit of the potential `"length"`.
        length_logits_bt1 (`torch.Tensor` of shape `(B, T + 1)`, *optional*): of the length value model at every state.
        critic_values_bt1 (`torch.Tensor` of shape `(B, T + 1)`, *optional*): of a learned critic.
        log_ratio (`torch.Tensor` of shape `(B, T)`, *optional*):
            ``log pi - log pi_ref``, where the divergence is paid as a reward.
        kl_reward_coef (`float`, *optional*): its weight in this batch.
    """

    completions: Completions
    outcomes: Outcomes
    processes: Processes
    relative: Tensor
    length_coef: float | None = None
    gamma: float | None = None
    max_length: int | None = None
    length_logits_bt1: Tensor | None = None
    critic_values_bt1: Tensor | None = None
    log_ratio: Tensor | None = None
    kl_reward_coef: float = 0.0


@dataclass(frozen=True)
class Streams:
    """What is made of a [`Batch`], all `(B, T)`.

    Args:
        task (`torch.Tensor`): the task stream, shaping included.
        length (`torch.Tensor`, *optional*): the length stream, gated, without `length_coef`.
        advantages (`torch.Tensor`): what the policy learns from.
        critic_targets (`torch.Tensor`, *optional*): what a critic's values are fitted to.
        critic_errors (`torch.Tensor`, *optional*): of lambda 1, how far the return was from the critic's value.
    """

    task: Tensor
    length: Tensor | None
    advantages: Tensor
    critic_targets: Tensor | None = None
    critic_errors: Tensor | None = None


def with_length_stream(
    args: LenVMConfig, batch: Batch, task: Tensor, length: Tensor | None, gate: Tensor | None = None
) -> Streams:
    """The streams, ``A = A_task + length_coef * gate * A_len`` among them, of a task stream and a length stream."""
    advantages = task
    if args.has_length_stream:
        advantages = combine(task, length, batch.completions.mask, batch.length_coef, gate)
    return Streams(task, None if length is None else paid(length, gate), advantages)


def paid(length: Tensor, gate: Tensor | None) -> Tensor:
    """The length stream as each row is paid it."""
    return length if gate is None else gate.to(length.dtype).unsqueeze(1) * length


def length_stream(args: LenVMConfig, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """The length advantage `(B, T)` and the weight of each row's, its gate `(B,)`; one that is centred has none.

    Completions that nobody scored are not paid.
    """
    if batch.length_logits_bt1 is None:
        return None, None
    completions, scored = batch.completions, batch.outcomes.scored
    values_bt1 = -torch.sigmoid(batch.length_logits_bt1)
    values, following = values_bt1[:, :-1], completions.following(values_bt1)
    if args.length_gate_center:
        length = centered_gated_advantage(values, completions, batch.gamma, following, batch.outcomes, batch.processes)
        return torch.where(scored.unsqueeze(1), length, 0.0), None
    length = length_advantage(values, completions.mask, batch.gamma, args.length_lam, following, completions.actions)
    return length, torch.where(scored, length_gate(args.length_gate, batch.outcomes, batch.processes), 0.0)


def length_gate(gate: str, outcomes: Outcomes, processes: Processes) -> Tensor:
    """Which share of its length advantage each completion is paid, `(B,)`: see `length_gate` of [`LenVMConfig`]."""
    if gate == "correct":
        return outcomes.correct.float()
    if gate == "pass_rate":
        return group_pass_rate(outcomes, processes)
    return torch.ones_like(outcomes.rewards)


def shaping_potential(args: LenVMConfig, batch: Batch) -> Tensor:
    """The shaping potential at every state, `shaping_coef` included: `(B, T + 1)`."""
    if args.shaping_potential == "value":
        return args.shaping_coef * value_potential(batch.length_logits_bt1)
    return args.shaping_coef * length_potential(batch.length_logits_bt1, batch.gamma, batch.max_length)


def shaping_rewards(args: LenVMConfig, batch: Batch, terminal_cut: bool) -> Tensor:
    """``F_t = gamma * Phi(s_{t+1}) - Phi(s_t)``, `(B, T)`, with a Phi that is 0 wherever the task ends."""
    potential_bt1, completions = shaping_potential(args, batch), batch.completions
    following = completions.following(potential_bt1, terminal_cut)
    return potential_shaping(
        potential_bt1[:, :-1], completions.mask, args.shaping_discount, following, completions.actions
    )


def shaping_advantage(args: LenVMConfig, batch: Batch) -> Tensor:
    """What shaping adds to a task advantage that has no critic: ``GAE(F, 0)``, `(B, T)`.

    Never ``F_t`` by itself, which looks one token ahead, and never its sum, which is the same for all completions of a
    prompt. With lambda 1 it is ``-Phi(s_t)``, a baseline. The task without a critic ends where it is cut, so Phi is 0
    there too. (``GAE(0, Phi)`` is the same: Wiewiora, 2003.)
    """
    rewards, completions = shaping_rewards(args, batch, terminal_cut=True), batch.completions
    return gae(
        rewards,
        torch.zeros_like(rewards),
        completions.mask,
        args.task_gamma,
        args.task_lam,
        action_mask=completions.actions,
    )


def token_rewards(args: LenVMPPOConfig, batch: Batch) -> Tensor:
    """What each token is paid, `(B, T)`: the reward at the end, and shaping and divergence along the way."""
    rewards = final_rewards(batch.outcomes.rewards, batch.completions)
    if args.shaping_coef != 0.0:
        rewards += shaping_rewards(args, batch, args.truncation == "terminal")
    if batch.log_ratio is not None:
        rewards -= batch.kl_reward_coef * batch.log_ratio
    return rewards


def critic_streams(args: LenVMPPOConfig, batch: Batch, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GAE of the rewards from the critic's values: of the policy's lambda, of the targets', and of lambda 1.

    Three tensors `(B, T)`; equal lambdas share one.
    """
    completions, values = batch.completions, batch.critic_values_bt1[:, :-1]
    following = completions.following(batch.critic_values_bt1, args.truncation == "terminal")

    def advantages(lam: float | Tensor) -> Tensor:
        if isinstance(lam, Tensor):
            lam = lam.unsqueeze(1).expand_as(rewards)
        actions = completions.actions
        return gae(rewards, values, completions.mask, args.task_gamma, lam, following, actions)

    known = {lam: advantages(lam) for lam in {1.0, args.target_lam, args.task_lam}}
    policy = known[args.task_lam]
    if args.length_adaptive_alpha is not None:
        policy = advantages(length_adaptive_lambda(completions, args.length_adaptive_alpha))
    return policy, known[args.target_lam], known[1.0]


def baseline_stream(args: LenVMPPOConfig, batch: Batch) -> Tensor:
    """The task advantage without a critic: the reward less a baseline, the same for all tokens, and shaping."""
    task = batch.relative
    if args.task_baseline == "batch":
        rewards, scored = batch.outcomes.rewards, batch.outcomes.scored
        counted = torch.stack([scored, torch.where(scored, rewards, 0.0)]).to(wide_dtype(scored.device))
        count, total = batch.processes.reduce(counted.sum(dim=1))
        task = rewards - (total / count).to(rewards.dtype)
    task = torch.where(batch.completions.actions, task.unsqueeze(1), 0.0)
    return task + shaping_advantage(args, batch) if args.shaping_coef != 0.0 else task


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """``1/2 (V - R)^2`` of each token, and whether clipping has changed it (Schulman et al., arXiv 1707.06347; the
    clipping is from their code: ``1/2 max((V - R)^2, (V_old + clamp(V - V_old, -c, c) - R)^2)``).

    Args:
        values, old, returns (`torch.Tensor` of shape `(B, T)`): now, at sampling time, and what they are fitted to.
        mask (`torch.BoolTensor` of shape `(B, T)`): where there is something to fit.
        clip (`float`, *optional*): c; no clipping when omitted.

    Returns:
        `tuple[torch.Tensor, torch.BoolTensor]` of shape `(B, T)`, the first 0 outside the mask.
    """
    errors, clipped = (values - returns).square(), torch.zeros_like(mask)
    if clip is not None:
        near = old + (values - old).clamp(-clip, clip)
        clipped_errors = (near - returns).square()
        clipped = clipped_errors > errors
        errors = torch.maximum(errors, clipped_errors)
    return torch.where(mask, 0.5 * errors, 0.0), clipped


def read_completions(
    batch: dict,
    end_ids: Sequence[int],
    budget: int | Tensor | None = None,
    said: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Completions:
    """Read [`Completions`] off what TRL's `_generate_and_score_completions` returns.

    Args:
        batch (`dict`): with `completion_ids`, `completion_mask` `(B, T)`, and `tool_mask` where there are tools.
        end_ids (`Sequence[int]`), budget, said: what ends a completion, as in [`lenvm_rl.endings.finished_rows`].
        lengths (`torch.LongTensor` of shape `(B,)`, *optional*):
            Tokens that the policy wrote. Read off the mask where omitted, which is empty for the cut rows that
            `mask_truncated_completions` leaves out of the loss.
    """
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    actions = mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask
    own = own_lengths(ids, mask, end_ids, actions)
    return Completions(
        mask=mask,
        actions=actions,
        finished=finished_rows(ids, mask, end_ids, actions, budget, said),
        lengths=own if lengths is None else torch.where(mask.any(dim=1), own, lengths.to(own)),
    )


def length_adaptive_lambda(completions: Completions, alpha: float) -> Tensor:
    """Lambda of each completion by its length, ``1 - 1 / (alpha * L)`` (VAPO, arXiv 2504.05118, equation 5).

    The reward at the end of L tokens has the weight ``lambda^(L - 1)`` at the first of them. With one lambda it is gone
    in long completions; with this one, about ``exp(-1 / alpha)`` whatever L is, and ``1 / (1 - lambda) = alpha * L``
    tokens count.

    Args:
        completions ([`Completions`]): L is the number of actions, the end of sequence counted.
        alpha (`float`): share of a completion that credit reaches over, above 0.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32, in [0, 1): 0 up to a length of ``1 / alpha``.
    """
    lengths = completions.actions.sum(dim=1)
    reach = alpha * lengths.to(wide_dtype(lengths.device))
    return (1.0 - 1.0 / reach.clamp(min=1.0)).float()


def final_rewards(rewards: Tensor, completions: Completions) -> Tensor:
    """The reward of each completion `(B,)` at its last action, 0 elsewhere: `(B, T)`."""
    actions = completions.actions
    is_last = actions & (actions.long().flip(1).cumsum(dim=1).flip(1) == 1)
    return torch.where(is_last, rewards.unsqueeze(1), 0.0)


def centered_gated_advantage(
    values: Tensor, completions: Completions, gamma: float, following: Tensor, outcomes: Outcomes, processes: Processes
) -> Tensor:
    """Length stream of the correct completions, centred over each group so that no V can bias it.

    A gate that looks at the outcome makes V more than a baseline: ``E[C (G_t - V(s_t)) grad log pi]`` contains
    ``-E[V(s_t) P(C | s_t, a_t) grad log pi]``, which raises or lowers the chance of being correct. Subtracting the mean
    of the same quantity over the group only cancels what is constant in V.

    Let ``D_t`` be the sum of the discounted TD residuals of the tokens before ``t``, a function of the state alone. Of
    a whole completion it is ``D_L = G_0 - V(s_0)``, and ``V(s_0)`` is the same for all completions of a prompt. Then

        ``A_t = C (D_L - mean of D_L over the group's other correct completions) - p D_t``

    with ``p`` the share of correct ones among the others that were judged. In the first term V cancels: in expectation
    it is a positive multiple of the gradient of ``E[G_0 | correct]``, so correct completions get shorter, and being
    correct is neither paid nor punished. The second term is the baseline, which takes from each token what the tokens
    before it have earned. Its expectation is 0 for any V, because nothing in it depends on the token; for the same
    reason it acts on the incorrect completions too, and on those that were not judged. Where all are correct, ``A_t``
    is ``gamma^t`` times the plain length advantage, less its mean. (Baselines from the others of a group:
    arXiv 1602.06725, arXiv 2402.14740.) Exact for finished completions; at a cut, ``V(s_L)`` stands in for the rest.

    Args:
        values (`torch.Tensor` of shape `(B, T)`): of the length value model, before each token.
        completions ([`Completions`]): which tokens exist and which are actions.
        gamma (`float`): of the length return.
        following (`torch.Tensor` of shape `(B,)`): value after the last token.
        outcomes ([`Outcomes`]): which completions are correct, and of which that is known.
        processes ([`Processes`]): the groups.

    Returns:
        `torch.Tensor` of shape `(B, T)`, 0 where no action is. The only correct completion of a group has nothing to be
        compared with: its first term is 0.
    """
    residuals = td_residual(values, completions.mask, gamma, following, completions.actions)
    discounts = torch.where(completions.actions, gamma, 1.0).to(values.dtype)
    weights = discounts.cumprod(dim=1) / discounts
    earned = (weights * residuals).cumsum(dim=1)
    before = earned - weights * residuals
    whole = earned[:, -1]
    gather, size = processes.gather, processes.group_size
    # One that was left out of the loss (`mask_truncated_completions`) has no residuals to compare others with.
    acts = completions.actions.any(dim=1)
    correct, judged = (rows.bool() & acts for rows in (outcomes.correct, outcomes.judged))
    gates, counted = (gather(rows.to(values.dtype)).view(-1, size) for rows in (correct, judged))
    totals = gather(whole * correct.to(values.dtype)).view(-1, size)
    others = gates.sum(dim=1, keepdim=True) - gates
    mean = (totals.sum(dim=1, keepdim=True) - totals) / others.clamp(min=1.0)
    share = others / (counted.sum(dim=1, keepdim=True) - counted).clamp(min=1.0)
    others, mean, share = (column.flatten()[processes.first_row :][: len(whole)] for column in (others, mean, share))
    first = torch.where(correct & (others > 0), whole - mean, 0.0)
    return torch.where(completions.actions, first.unsqueeze(1) - share.unsqueeze(1) * before, 0.0)


def group_pass_rate(outcomes: Outcomes, processes: Processes) -> Tensor:
    """Share of correct completions among the judged ones of each completion's group, itself included.

    Returns:
        `torch.Tensor` of shape `(B,)`, float64 where the device has it, 0 where nothing of the group was judged.
    """
    correct, judged = outcomes.correct, outcomes.judged
    rows = processes.gather(torch.stack([correct & judged, judged], dim=1).long())
    counts = rows.view(-1, processes.group_size, 2).sum(dim=1)
    rates = counts[:, 0].to(wide_dtype(counts.device)) / counts[:, 1].clamp(min=1)
    return rates.repeat_interleave(processes.group_size)[processes.first_row :][: len(correct)]


def whiten(advantages: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over the tokens of all processes.

    Args:
        advantages (`torch.Tensor` of shape `(B, T)`): of one process.
        mask (`torch.BoolTensor` of shape `(B, T)`): tokens that count.
        reduce (`Callable`, *optional*): sums a tensor over processes; a single process needs none.

    Returns:
        `torch.Tensor` of shape `(B, T)`, 0 at masked slots.
    """
    clean = torch.where(mask, advantages, 0.0)
    count, total = reduce(torch.stack([mask.sum().to(clean.dtype), clean.sum()]))
    mean = total / count.clamp(min=1.0)
    deviation = torch.where(mask, clean - mean, 0.0)
    variance = reduce(deviation.square().sum()) / count.clamp(min=1.0)
    return deviation / (variance.sqrt() + WHITEN_EPSILON)
