"""How the completions of a run end: its ids, its budget, and what those say who sample for it.

TRL's batches do not carry why a completion stopped. `lenvm_rl.endings` decides it from what is put together here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lenvm_rl.endings import end_token_ids, own_length


@dataclass(frozen=True)
class Sampled:
    """What is known of a generation batch of this process before it is padded into tensors.

    Args:
        lengths (`list[int]`): tokens that the policy wrote in each completion, its end not counted.
        tool_mask (`list[list[int]]`, *optional*): 1 where the policy chose the token, where others wrote some.
        finished (`list[bool]`, *optional*): word from a `rollout_func` on how each completion ended.
    """

    lengths: list[int]
    tool_mask: list[list[int]] | None
    finished: list[bool] | None


def run_end_ids(trainer) -> list[int]:
    """Every id that ends a completion of a run: the tokenizer's, the policy's and those of `generation_kwargs`.

    Args:
        trainer (`trl.GRPOTrainer`): constructed.
    """
    given = trainer.args.generation_kwargs or {}
    if trainer.use_vllm and given.get("ignore_eos"):
        return end_token_ids(None, given.get("stop_token_ids"))
    policy = trainer.accelerator.unwrap_model(trainer.model)
    further = (given.get("eos_token_id"), given.get("stop_token_ids") if trainer.use_vllm else None)
    return end_token_ids(trainer._tokenizer, policy.generation_config, *further)


def check_ends(trainer) -> None:
    """Raise a `ValueError` where completions would be cut and nobody could tell.

    Args:
        trainer (`trl.GRPOTrainer`): constructed, of a run that asks how completions ended.
    """
    args, given = trainer.args, trainer.args.generation_kwargs or {}
    if given.get("max_time") is not None:
        raise ValueError(
            f"generation_kwargs sets max_time={given['max_time']}, which cuts completions short of their budget, so "
            "that cut ones cannot be told from finished ones: leave max_time out, and set max_completion_length."
        )
    if args.max_completion_length is None and args.shaping_coef != 0.0 and args.shaping_potential == "length":
        raise ValueError(
            "shaping_potential='length' is in units of max_completion_length, which is None: set "
            "max_completion_length, or shaping_potential='value'."
        )


def read_sampled(generated: tuple, end_ids: Sequence[int]) -> Sampled:
    """Read [`Sampled`] off what TRL's `_generate` returns.

    Args:
        generated (`tuple`): prompt ids, completion ids, tool mask, completions, log-probabilities, further fields, ….
        end_ids (`Sequence[int]`): ids that end a completion.

    Raises:
        `ValueError`: the field `finished` of a `rollout_func` is not one flag for each completion.
    """
    _, completion_ids, tool_mask, _, _, fields, *_ = generated
    masks = tool_mask or [None] * len(completion_ids)
    lengths = [own_length(ids, end_ids, own) for ids, own in zip(completion_ids, masks, strict=True)]
    finished = fields.get("finished")
    if finished is not None:
        finished = [bool(flag) for flag in finished]
        if len(finished) != len(completion_ids):
            raise ValueError(
                f"rollout_func returned {len(finished)} flags in `finished` for {len(completion_ids)} completions: "
                "give one for each, True where it ended and False where it was cut."
            )
    return Sampled(lengths, tool_mask, finished)


def completion_budget(trainer, prompt_lengths: Tensor, sampled: Sampled | None) -> Tensor | None:
    """Tokens at which each completion is cut, `(B,)`; `None` where an end id alone tells that one finished.

    Args:
        trainer (`trl.GRPOTrainer`): constructed.
        prompt_lengths (`torch.LongTensor` of shape `(B,)`): tokens of each prompt.
        sampled ([`Sampled`], *optional*): of the batch.

    Raises:
        `ValueError`: a `rollout_func` wrote the completions, has no budget, and does not say which were cut.
    """
    args, given = trainer.args, trainer.args.generation_kwargs or {}
    budget = args.max_completion_length
    if trainer.rollout_func is not None:
        if budget is None and (sampled is None or sampled.finished is None):
            raise ValueError(
                "max_completion_length=None leaves rollout_func without a budget, so it cannot be told which "
                "completions were cut: let it return `finished`, one flag for each, or set max_completion_length."
            )
    elif trainer.use_vllm:
        context = args.vllm_max_model_length or trainer.model.config.get_text_config().max_position_embeddings
        # vLLM cuts at the end of its context, too.
        room = context - prompt_lengths
        budget = given.get("max_tokens", budget)
        return room if budget is None else room.clamp(max=budget)
    elif not trainer.tools:
        budget = given.get("max_new_tokens", budget)
    return None if budget is None else torch.full_like(prompt_lengths, budget)


def ends_in_stop_string(trainer, completion_ids: Tensor, mask: Tensor) -> Tensor:
    """Whether the text of each completion holds a stop string of vLLM, which ended it then: `(B,)`."""
    stop = (trainer.args.generation_kwargs or {}).get("stop") if trainer.use_vllm else None
    strings = [stop] if isinstance(stop, str) else list(stop or ())
    if not strings:
        return torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    rows = [ids[exists.bool()].tolist() for ids, exists in zip(completion_ids, mask, strict=True)]
    texts = trainer._tokenizer.batch_decode(rows, skip_special_tokens=True)
    found = [any(string in text for string in strings) for text in texts]
    return torch.tensor(found, device=mask.device)
