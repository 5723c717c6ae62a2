"""A frozen length value model in TRL's own PPO trainer, which TRL had up to 1.12 (`trl.experimental.ppo.PPOTrainer`).

    value_model = ShapedValueModel(critic, length_value_model, tokenizer, shaping_coef=0.5)
    check_legacy_ppo(args, policy, tokenizer)
    PPOTrainer(args=args, processing_class=tokenizer, model=policy, value_model=value_model, …)

What this can do is *shaping*, as an offset of the critic: a critic that says ``V_task + Phi`` without shaping gives the
advantages of one that says ``V_task`` with ``F_t = gamma * Phi(s_{t+1}) - Phi(s_t)`` in the rewards (Wiewiora, 2003;
docs/mathematics.md). There is no discount to mismatch. The *length stream* it cannot give: that trainer makes
advantages and takes its steps in one method, which offers no place for a second stream and which this library does not
copy. Use [`~lenvm_rl.trainers.LenVMPPOTrainer`] for it, on any TRL.

Of that trainer one has to know (trl 1.12.0), and [`check_legacy_ppo`] refuses or warns:

- without `stop_token` it never stops at the end of sequence;
- a pad token that is the end of sequence drops that action from the loss;
- it fills up responses with the pad token of the *policy's* generation config and reads the tokenizer's: with one that
  is neither that nor the end of sequence, responses go on behind their end, and the potential with them;
- the score is paid one step *after* the end of sequence (huggingface/trl#3750), from the state behind it, so the
  potential has to be 0 there: [`ShapedValueModel`] makes it so;
- a cut is an end: the value after it is 0, and so is the potential; a pad token that the policy samples is a cut;
- `max_grad_norm` is not read; `num_mini_batches` does nothing under accumulation (huggingface/trl#7012);
- a `repetition_penalty` of the model's generation config changes what is sampled, and not what is learnt from.
"""

from __future__ import annotations

import copy
import logging
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.shaping import length_potential, value_potential
from lenvm_rl.tokenization import check_pad_is_not_eos, check_same_tokenizer

logger = logging.getLogger(__name__)

POTENTIALS = ("value", "length")


def legacy_ppo():
    """`PPOTrainer` and `PPOConfig` of TRL's experimental PPO.

    Raises:
        `ImportError`: this TRL has none.
    """
    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ModuleNotFoundError as error:
        if error.name != "trl.experimental.ppo":
            raise
        raise ImportError(
            f"TRL {version('trl')} has no PPO trainer, which was removed in 1.13: install trl==1.12.0, or use "
            "lenvm_rl.trainers.LenVMPPOTrainer, which needs none."
        ) from error
    return PPOTrainer, PPOConfig


class ShapedOutput(NamedTuple):
    """What the trainer reads off a value model's decoder.

    Args:
        hidden_states (`tuple[torch.FloatTensor]`): one entry `(B, S, H + 1)`, the critic's last hidden state and,
            behind it, the potential.
    """

    hidden_states: tuple[Tensor]


class _Decoders(nn.Module):
    """The critic's decoder and the frozen length value model, side by side."""

    def __init__(
        self,
        decoder: nn.Module,
        length_value_model: LengthValueModel,
        eos_token_id: int,
        potential: str,
        max_length: int | None,
    ):
        super().__init__()
        self.decoder, self.length_value_model = decoder, length_value_model
        self._eos, self._potential, self._max_length = eos_token_id, potential, max_length

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None, **decoder_kwargs
    ) -> ShapedOutput:
        decoder_kwargs["output_hidden_states"] = True
        outputs = self.decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **decoder_kwargs
        )
        hidden = outputs.hidden_states[-1]
        with torch.no_grad():
            logits = self.length_value_model(input_ids=input_ids, attention_mask=attention_mask).logits
            if self._potential == "value":
                potential = value_potential(logits)
            else:
                potential = length_potential(logits, self.length_value_model.config.gamma, self._max_length)
            ended = ends(input_ids, attention_mask, self._eos)
            potential = torch.where(ended | ~attention_mask.bool(), 0.0, potential)
        return ShapedOutput((torch.cat([hidden, potential.unsqueeze(-1).to(hidden.dtype)], dim=-1),))


class _Score(nn.Module):
    """The critic's score of its hidden state, and the potential beside it."""

    def __init__(self, score: nn.Module, shaping_coef: float):
        super().__init__()
        self.score, self.shaping_coef = score, shaping_coef

    def forward(self, hidden: Tensor) -> Tensor:
        return self.score(hidden[..., :-1]) + self.shaping_coef * hidden[..., -1:]


def ends(input_ids: Tensor, attention_mask: Tensor, eos_token_id: int) -> Tensor:
    """Where a row has ended: at the end-of-sequence token that it closes with, and at copies of it behind.

    An end of sequence that other tokens follow, as between the turns of a chat, is none. Copies are what a policy
    without a pad token fills up with; so a prompt must not close with an end of sequence itself, which the row of a
    response of that token alone would be taken to end at.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, S)`): prompt and response.
        attention_mask (`torch.Tensor` of shape `(B, S)`): 1 for tokens.
        eos_token_id (`int`): the end-of-sequence token.

    Returns:
        `torch.BoolTensor` of shape `(B, S)`.
    """
    tokens = attention_mask.bool()
    goes_on = tokens & (input_ids != eos_token_id)
    later = goes_on.flip(1).long().cumsum(dim=1).flip(1)
    return tokens & (later == 0)


class ShapedValueModel(nn.Module):
    """A critic for TRL's PPO trainer whose values are ``V_task(s) + shaping_coef * Phi(s)``, Phi being frozen.

    ``V_task`` starts and learns as the critic by itself would; Phi is 0 where the response has ended.

    Args:
        critic (`PreTrainedModel`): what that trainer takes as `value_model`: a decoder under `base_model_prefix` and a
            layer `score` of one output, such as `AutoModelForSequenceClassification(num_labels=1)`. It is trained.
        length_value_model ([`LengthValueModel`]): frozen here.
        tokenizer (`PreTrainedTokenizerBase`): of the policy.
        shaping_coef (`float`): weight of the potential.
        shaping_potential (`str`, *optional*, defaults to `"value"`): ``Phi = V``; or `"length"`: ``Phi = -n /
            max_completion_length``, n in tokens.
        max_completion_length (`int`, *optional*): for `"length"`; that trainer's `response_length`.

    Raises:
        `ValueError`: the critic is none that the trainer could use, the tokenizer is not the length value model's or
            pads with its end, or a potential is unknown or lacks its length.
    """

    base_model_prefix = "decoders"

    def __init__(
        self,
        critic: PreTrainedModel,
        length_value_model: LengthValueModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        shaping_coef: float,
        shaping_potential: str = "value",
        max_completion_length: int | None = None,
    ):
        super().__init__()
        if not (hasattr(critic, "score") and hasattr(critic, critic.base_model_prefix)):
            raise ValueError(
                f"{type(critic).__name__} has no decoder under its `base_model_prefix` and no layer `score`, which "
                "TRL's PPO trainer reads: give an AutoModelForSequenceClassification with num_labels=1."
            )
        if critic.config.num_labels != 1:
            raise ValueError(
                f"The critic has {critic.config.num_labels} outputs, and a value is one number: load it with "
                "num_labels=1."
            )
        if shaping_potential not in POTENTIALS:
            raise ValueError(f"shaping_potential='{shaping_potential}' is unknown; choose one of {POTENTIALS}.")
        if shaping_potential == "length" and max_completion_length is None:
            raise ValueError("shaping_potential='length' is relative to a length: give max_completion_length.")
        check_pad_is_not_eos(tokenizer)
        check_same_tokenizer(length_value_model.config.tokenizer_fingerprint, tokenizer)
        self.config = copy.deepcopy(critic.config)
        decoder = getattr(critic, critic.base_model_prefix)
        self.decoders = _Decoders(
            decoder, length_value_model.freeze(), tokenizer.eos_token_id, shaping_potential, max_completion_length
        )
        self.score = _Score(critic.score, shaping_coef)


def check_legacy_ppo(args: Any, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse settings with which TRL's PPO trainer would do something else than they say, see the module.

    Raises:
        `ValueError`: naming the setting and what to change.
    """
    check_pad_is_not_eos(tokenizer)
    stop = tokenizer.eos_token_id if args.stop_token == "eos" else args.stop_token_id
    if stop != tokenizer.eos_token_id:
        raise ValueError(
            f"stop_token={args.stop_token!r} and stop_token_id={args.stop_token_id} do not stop at the end of sequence "
            f"({tokenizer.eos_token_id}), where the potential is 0: set stop_token='eos'."
        )
    if args.num_mini_batches > 1 and args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"num_mini_batches={args.num_mini_batches} takes no more optimizer steps with gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} (huggingface/trl#7012): set one of them to 1."
        )
    filler = policy.generation_config.pad_token_id
    if filler not in (None, tokenizer.pad_token_id, tokenizer.eos_token_id):
        raise ValueError(
            f"The policy's generation config pads with {filler} and the tokenizer with {tokenizer.pad_token_id}, so "
            "that completions would go on behind their end: set `policy.generation_config.pad_token_id = "
            "tokenizer.pad_token_id`."
        )
    penalty = policy.generation_config.repetition_penalty
    if penalty not in (None, 1.0):
        raise ValueError(
            f"The policy's generation config has repetition_penalty={penalty}, with which completions are sampled but "
            "not learnt from: set `policy.generation_config.repetition_penalty = None`."
        )
    if args.max_grad_norm:
        logger.warning("TRL's PPO trainer does not clip gradients: max_grad_norm=%g is not read.", args.max_grad_norm)
    logger.info("TRL's PPO trainer takes a response that was cut for one that ended: nothing follows it.")
