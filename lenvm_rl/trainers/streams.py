"""How the streams of advantage are made from a batch of completions: pure functions on tensors, shared by the trainers.

Shapes and conventions are those of [`lenvm_rl.returns`]: arrays are `(B, T)` and aligned with the completion, entry
``t`` of ``values`` is read before token ``t`` was chosen; value models give `(B, T + 1)`, the last entry of a row's
states being the one after its last token. Tokens that nobody chose (tool output, environment text) exist but are no
actions (`action_mask` of [`lenvm_rl.gae`]): their advantage is 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lenvm_rl.endings import finished_rows, own_lengths
from lenvm_rl.modeling.completions import bootstrap_values
from lenvm_rl.returns import td_residual, wide_dtype

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

    def following(self, values: Tensor, terminal_cut: bool = False) -> Tensor:
        """The value after each row's last token, `(B,)`, from values at every state, `(B, T + 1)`.

        0 where the completion finished, and with `terminal_cut` where it was cut as well.
        """
        ends = torch.ones_like(self.finished) if terminal_cut else self.finished
        return bootstrap_values(values, self.mask, ends)


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
    values: Tensor,
    completions: Completions,
    gamma: float,
    following: Tensor,
    correct: Tensor,
    group_size: int,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    first_row: int = 0,
    judged: Tensor | None = None,
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
        correct (`torch.Tensor` of shape `(B,)`): 1 where the completion is correct, which is then judged.
        group_size (`int`): completions of one prompt, neighbours in the rows of all processes put together.
        gather (`Callable`, *optional*): puts the rows of all processes together; a single process needs none.
        first_row (`int`, *optional*, defaults to `0`): where the rows of this process start among them.
        judged (`torch.Tensor` of shape `(B,)`, *optional*): 1 where that is known; everywhere when omitted.

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
    judged = torch.ones_like(correct) if judged is None else judged
    gates, counted = (gather(rows.to(values.dtype)).view(-1, group_size) for rows in (correct, judged))
    totals = gather(whole * correct.to(values.dtype)).view(-1, group_size)
    others = gates.sum(dim=1, keepdim=True) - gates
    mean = (totals.sum(dim=1, keepdim=True) - totals) / others.clamp(min=1.0)
    share = others / (counted.sum(dim=1, keepdim=True) - counted).clamp(min=1.0)
    others, mean, share = (column.flatten()[first_row:][: len(whole)] for column in (others, mean, share))
    first = torch.where(correct.bool() & (others > 0), whole - mean, 0.0)
    return torch.where(completions.actions, first.unsqueeze(1) - share.unsqueeze(1) * before, 0.0)


def group_pass_rate(
    correct: Tensor,
    judged: Tensor,
    group_size: int,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    first_row: int = 0,
) -> Tensor:
    """Share of correct completions among the judged ones of each completion's group, itself included.

    Args:
        correct, judged (`torch.BoolTensor` of shape `(B,)`): of each completion.
        group_size, gather, first_row: as in [`centered_gated_advantage`].

    Returns:
        `torch.Tensor` of shape `(B,)`, float64 where the device has it, 0 where nothing of the group was judged.
    """
    counts = gather(torch.stack([correct & judged, judged], dim=1).long()).view(-1, group_size, 2).sum(dim=1)
    rates = counts[:, 0].to(wide_dtype(counts.device)) / counts[:, 1].clamp(min=1)
    return rates.repeat_interleave(group_size)[first_row : first_row + len(correct)]


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
