"""The completions of a run: how they end, and how they are guided in length.

TRL's batches do not carry why a completion stopped. `lenvm_rl.endings` decides it from what is put together here: the
ids that end one, its budget, and what those say who sample for the run.

Guided completions are *off-policy*: they are drawn from the guidance's distribution p', and each token's advantage is
weighed by ``min(p / p', 3)`` in the loss (truncated importance sampling).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from trl import GRPOTrainer

from lenvm_rl.decoding import GuidanceReport, LengthGuidance, generate_guided
from lenvm_rl.endings import end_token_ids, own_length
from lenvm_rl.returns import to_device
from lenvm_rl.trainers.config import LenVMConfig
from lenvm_rl.trainers.sharding import is_sharded
from lenvm_rl.trainers.streams import Completions, read_completions

# Truncation of the importance ratio that each token of a guided rollout is weighed by.
RATIO_MAX = 3.0


@dataclass(frozen=True)
class Sampled:
    """What is known of a generation batch of this process before it is padded into tensors.

    Args:
        completion_ids (`list[list[int]]`): of each completion.
        lengths (`list[int]`): tokens that the policy wrote in each completion, its end not counted.
        tool_mask (`list[list[int]]`, *optional*): 1 where the policy chose the token, where others wrote some.
        finished (`list[bool]`, *optional*): word from a `rollout_func` on how each completion ended.
    """

    completion_ids: list[list[int]]
    lengths: list[int]
    tool_mask: list[list[int]] | None
    finished: list[bool] | None


def run_end_ids(trainer: GRPOTrainer) -> list[int]:
    """Every id that ends a completion of a run: from the tokenizer, the policy and `generation_kwargs`."""
    given = trainer.args.generation_kwargs or {}
    if trainer.use_vllm and given.get("ignore_eos"):
        return end_token_ids(None, given.get("stop_token_ids"))
    policy = trainer.accelerator.unwrap_model(trainer.model)
    further = (given.get("eos_token_id"), given.get("stop_token_ids") if trainer.use_vllm else None)
    return end_token_ids(trainer._tokenizer, policy.generation_config, *further)


def check_ends(trainer: GRPOTrainer) -> None:
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
    return Sampled(completion_ids, lengths, tool_mask, finished)


def collect_completions(trainer: GRPOTrainer, batch: dict, sampled: Sampled) -> Completions:
    """The completions of a generation batch: which tokens are the policy's, and how each row ended.

    Args:
        trainer (`trl.GRPOTrainer`), batch (`dict`), sampled ([`Sampled`]): of the run, TRL's, and what is known of it.
    """
    prompt_lengths = batch["prompt_mask"].sum(dim=1)
    said = None if sampled.finished is None else to_device(sampled.finished, prompt_lengths)
    budget = completion_budget(trainer, prompt_lengths, sampled)
    if budget is not None:
        turns = last_turns(sampled)
        stopped = to_device(end_in_stop_string(trainer, turns), budget, torch.bool)
        budget = budget.masked_fill(stopped, torch.iinfo(budget.dtype).max)
        if (most := turn_budget(trainer)) is not None:
            # A turn that takes all that one may take was cut, unless an end id says otherwise.
            full = to_device([len(turn) >= most for turn in turns], budget, torch.bool)
            budget = budget.masked_fill(full, 0)
    lengths = to_device(sampled.lengths, prompt_lengths)
    return read_completions(batch, trainer.eos_token_ids, budget, said, lengths)


def completion_budget(trainer: GRPOTrainer, prompt_lengths: Tensor, sampled: Sampled | None) -> Tensor | None:
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
        if budget is None and trainer.sets_advantages and (sampled is None or sampled.finished is None):
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


def turn_budget(trainer: GRPOTrainer) -> int | None:
    """Tokens at which each turn between two tools is cut, where transformers samples and it is less than the whole."""
    if trainer.rollout_func is not None or trainer.use_vllm or not trainer.tools:
        return None
    return (trainer.args.generation_kwargs or {}).get("max_new_tokens")


def last_turns(sampled: Sampled) -> list[list[int]]:
    """What the policy wrote last in each completion: all of it, or the tokens behind the last ones of others."""
    if sampled.tool_mask is None:
        return sampled.completion_ids
    # A mask's last 0 is the last token that others wrote.
    begins = [len(own) - own[::-1].index(0) if 0 in own else 0 for own in map(list, sampled.tool_mask)]
    return [ids[begin:] for ids, begin in zip(sampled.completion_ids, begins, strict=True)]


def end_in_stop_string(trainer: GRPOTrainer, completion_ids: Sequence[Sequence[int]]) -> list[bool]:
    """Whether the text of each completion, or of its last turn, holds a stop string of vLLM, which ended it then."""
    stop = (trainer.args.generation_kwargs or {}).get("stop") if trainer.use_vllm else None
    strings = [stop] if isinstance(stop, str) else list(stop or ())
    if not strings:
        return [False] * len(completion_ids)
    texts = trainer._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return [any(string in text for string in strings) for text in texts]


def read_guidance(args: LenVMConfig) -> LengthGuidance | None:
    """The guidance of a run's rollouts, `None` where there is none.

    Temperature and candidate rule are the run's, as for rollouts without guidance.

    Raises:
        `ValueError`: the settings make no guidance, or set what the run sets.
    """
    if args.rollout_guidance is None:
        return None
    owned = {"temperature": args.temperature, "top_k": args.top_k or 0, "top_p": args.top_p, "min_p": args.min_p or 0.0}
    stated = sorted(set(args.rollout_guidance) & set(owned))
    if stated:
        raise ValueError(
            f"rollout_guidance sets {', '.join(stated)}: leave that to the trainer's argument of that name."
        )
    unknown = sorted(set(args.rollout_guidance) - set(LengthGuidance.__dataclass_fields__))
    if unknown:
        raise ValueError(f"rollout_guidance has {', '.join(unknown)}, which no LengthGuidance has: check the spelling.")
    return LengthGuidance(**args.rollout_guidance, **owned)


def check_guided_rollouts(trainer: GRPOTrainer) -> None:
    """Raise a `ValueError` where completions come from what cannot be guided; of vLLM, see `check_guided_engine`."""
    if trainer.use_transformers_continuous_batching:
        raise ValueError("rollout_guidance needs plain generate: leave continuous batching out.")
    if trainer.rollout_func is not None:
        raise ValueError("rollout_guidance and rollout_func both say how to generate: give one of them.")
    if trainer.tools:
        raise ValueError("rollout_guidance counts the tokens of one completion, which tool calls interrupt: drop one.")
    if is_sharded(trainer):
        raise ValueError("rollout_guidance is not supported with FSDP or DeepSpeed: use DDP or one process.")


@contextmanager
def guided_generation(
    model: PreTrainedModel, length_value_model: nn.Module, guidance: LengthGuidance
) -> Iterator[list[GuidanceReport]]:
    """While it lasts, `model.generate` is guided; gives the list of the reports of its calls.

    Args:
        model (`PreTrainedModel`): the policy, unwrapped.
        length_value_model (`LengthValueModel`): frozen, unwrapped, its tokenizer compared with the policy's.
        guidance ([`~lenvm_rl.decoding.generation.LengthGuidance`]): how to guide.
    """
    reports: list[GuidanceReport] = []

    def generate(input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig, **arguments) -> Tensor:
        # The class's own method, which generate_guided is to find.
        del model.generate
        try:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            sequences, report = generate_guided(
                model,
                length_value_model,
                inputs,
                guidance,
                generation_config=generation_config,
                return_report=True,
                **arguments,
            )
        finally:
            model.generate = generate
        reports.append(report)
        return sequences

    model.generate = generate
    try:
        yield reports
    finally:
        del model.generate


def importance_ratio(report: GuidanceReport, mask: Tensor) -> tuple[Tensor, Tensor]:
    """How much likelier the policy makes each token of guided completions than the guidance did, ``p / p'``.

    Args:
        report ([`~lenvm_rl.decoding.GuidanceReport`]): of the completions.
        mask (`torch.Tensor` of shape `(B, T)`): 1 where a token exists.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shape `(B, T)`: the ratio, 1 where no token is; and the weight that is
        made of it, truncated at `RATIO_MAX`.
    """
    exists, width = mask.bool(), mask.shape[1]
    difference = report.policy_log_probs - report.log_probs
    # TRL cuts off columns that hold padding only.
    difference = F.pad(difference, (0, max(0, width - difference.shape[1])))[:, :width]
    ratio = torch.where(exists, difference.exp(), 1.0)
    return ratio, ratio.clamp(max=RATIO_MAX)
