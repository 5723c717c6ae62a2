"""PPO on the hooks of TRL's GRPO trainer: a learned task critic, and a frozen length value model beside it."""

from __future__ import annotations

import contextlib
import math
import os
import textwrap
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.grpo_trainer import RewardFunc
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from lenvm_rl.modeling.critic import TaskCritic
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.sharing import HEAD
from lenvm_rl.returns import trusted_masks
from lenvm_rl.trainers.base import LENVM_CITATION, LenVMTrainer
from lenvm_rl.trainers.config import LenVMPPOConfig
from lenvm_rl.trainers.critic import (
    CRITIC_FOLDER,
    TASK_CRITIC,
    check_same_critic,
    check_settings,
    make_critic,
    place_critic,
    read_critic,
)
from lenvm_rl.trainers.critic_states import CriticStates, state_values
from lenvm_rl.trainers.critic_updates import CriticUpdates
from lenvm_rl.trainers.divergence import (
    RATIO_CLIPPING_LOSSES,
    BatchDivergence,
    KLRewardCoefficient,
    approximate_kl,
    beyond_clip,
)
from lenvm_rl.trainers.metrics import BatchMetrics, add_critic, add_divergence, add_kl_reward
from lenvm_rl.trainers.reading import value_logits
from lenvm_rl.trainers.resuming import entropy_at_rest
from lenvm_rl.trainers.reward_scale import RewardScale
from lenvm_rl.trainers.sharding import is_sharded, loaded_whole, whole_state
from lenvm_rl.trainers.shared_base import run_base
from lenvm_rl.trainers.streams import (
    Batch,
    Streams,
    baseline_stream,
    critic_streams,
    length_stream,
    paid,
    token_rewards,
    value_loss,
    whiten,
    with_length_stream,
)

_STATES = "critic_states"
PPO_CITATION = textwrap.dedent("""\
    @article{schulman2017proximal,
        title        = {{Proximal Policy Optimization Algorithms}},
        author       = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
        year         = 2017,
        eprint       = {arXiv:1707.06347},
    }""")


def _counted(read: Batch) -> Tensor:
    """Which tokens the critic learns from, `(B, T)`: actions of completions that were scored."""
    return read.completions.actions & read.outcomes.scored.unsqueeze(1)


def dealt_again(parts: list[dict]) -> list[dict]:
    """The rows of all mini-batches of a generation batch, shuffled and cut into as many again.

    With pictures, whose rows are of different sizes, they stay as they are.
    """
    if len(parts) < 2 or any(name.startswith("pixel") for name in parts[0]):
        return parts

    def joined(values: list) -> Any:
        first = values[0]
        if isinstance(first, Tensor) and first.dim():
            return torch.cat(values)
        return [each for value in values for each in value] if isinstance(first, list) else first

    whole = {name: joined([part[name] for part in parts]) for name in parts[0]}
    return split_tensor_dict(shuffle_sequence_dict(whole), len(parts))


def ppo_streams(args: LenVMPPOConfig, batch: Batch) -> Streams:
    """The streams of PPO: ``A_task`` is GAE of what each token is paid, or without a critic the reward less a baseline.

    What is whitened, and where, is `args.whiten`.
    """
    reduce = batch.processes.reduce
    scored = batch.outcomes.scored.unsqueeze(1)
    counted = _counted(batch)
    targets = errors = None
    if batch.critic_values_bt1 is None:
        task = baseline_stream(args, batch)
    else:
        task, targets, errors = critic_streams(args, batch, token_rewards(args, batch))
        targets = targets + batch.critic_values_bt1[:, :-1]
    task = torch.where(scored, task, 0.0)
    if args.whiten in ("task", "streams"):
        task = whiten(task, counted, reduce)
    length, gate = length_stream(args, batch)
    if length is not None and args.whiten == "streams":
        length, gate = whiten(paid(length, gate), counted, reduce), None
    streams = with_length_stream(args, batch, task, length, gate)
    advantages = whiten(streams.advantages, counted, reduce) if args.whiten == "sum" else streams.advantages
    return Streams(task, streams.length, advantages, targets, errors)


class LenVMPPOTrainer(LenVMTrainer):
    """PPO (Schulman et al., arXiv 1707.06347) with two streams of advantage (arXiv 2604.27039, appendix C.2).

    TRL has had no PPO trainer since 1.13. This one adds a critic to [`trl.GRPOTrainer`] and keeps everything else of
    it: rollouts, reward functions, the clipped loss and its KL term (`beta`), PEFT policies, logging, resuming.

    Task stream, with a learned critic: the weighted sum of the rewards is paid at the last token, with shaping rewards
    ``F_t`` added to every token where `shaping_coef` is set, so that the critic learns the shaped return, and likewise
    the divergence from the reference policy with `kl_reward_coef`.
    ``A_task = GAE(r + F, V_task; task_gamma, task_lam)``, the critic's targets are ``A_task + V_task`` (each with a
    lambda of its own where `critic_lam` or `length_adaptive_alpha` is set), and `whiten` acts on ``A_task`` alone,
    unless it says otherwise. A completion that was cut is an end, or goes on with the critic's value and the potential
    (`truncation`). Then ``A = A_task + length_coef * A_len``, with ``A_len`` as in [`LenVMGRPOTrainer`]. Settings of
    groups, such as `scale_rewards`, only matter to `critic="lenvm"`.

    The critic has its own parameter group and learning rate, and its gradient is clipped by itself; schedule, weight
    decay and bound are the policy's where it has none of its own. With `critic_updates_per_step` it learns more often
    than the policy ([`lenvm_rl.trainers.critic_updates`]). Its loss is the mean over the tokens of the whole optimizer
    step, accumulation and processes included. In the first `critic_warmup_steps` it alone learns; with
    `critic_learning_rate=0` it does not, and makes no loss. Dropout is off in it. What is frozen in a critic that is
    given stays so, and adapters and a score head are kept ([`lenvm_rl.trainers.critic.make_critic`]). It is
    saved with the policy, in `critic/` of every checkpoint and of what `save_model` writes, and restored on resume.

    With `critic_form="adapter"` or `"head"` it holds no decoder: it shares the reference's, or the base under the
    policy's adapters. A head alone reads one forward per generation batch, the reference's own where there is one, and
    keeps its hidden states, `(B, T + 1, H)`, for the steps that follow.

    Refused at construction, beside what [`LenVMGRPOTrainer`] refuses: a learned critic with a decoder of its own under
    DeepSpeed, on a shared decoder that does not stay frozen, with an optimizer that steps layer by layer, or with
    `multi_objective_aggregation="normalize_then_sum"`; `truncation="bootstrap"`, and whatever only a
    critic reads, without a critic.

    Args:
        model, reward_funcs, train_dataset, eval_dataset, processing_class, further, grpo_arguments:
            As in [`trl.GRPOTrainer`], by position or by name.
        args ([`LenVMPPOConfig`], *optional*): a default one if omitted.
        length_value_model ([`LengthValueModel`] or `str`, *optional*): as in [`LenVMGRPOTrainer`].
        critic (`str` or `PreTrainedModel`, *optional*, defaults to `"learned"`):
            `"learned"`: a task critic that starts from `args.critic_init`. `"lenvm"`: no task critic; the task stream
            is the reward less a baseline (`args.task_baseline`), and the frozen length value model is the only critic
            there is, for length. Or a model or path, see [`lenvm_rl.trainers.critic.make_critic`].

    Example:

    ```python
    trainer = LenVMPPOTrainer(
        model="my-policy",
        reward_funcs=accuracy_reward,
        args=LenVMPPOConfig("out", length_coef=3.0),
        train_dataset=dataset,
        length_value_model="my-length-value-model",
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "ppo", "lenvm"]
    _name = "PPO"
    _paper = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": f"{PPO_CITATION}\n{LENVM_CITATION}",
    }
    config_class = LenVMPPOConfig
    always_dense = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: LenVMPPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        *further,
        length_value_model: LengthValueModel | str | None = None,
        critic: PreTrainedModel | PeftModel | str = "learned",
        **grpo_arguments,
    ):
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            *further,
            length_value_model=length_value_model,
            **grpo_arguments,
        )
        check_settings(critic, self)
        self._reward_scale = RewardScale(self.args)
        self._kl_coefficient = KLRewardCoefficient(self.args)
        self._divergence = BatchDivergence(self.args.target_kl)
        # Log-probabilities of the loss under way, as TRL computes them.
        self._log_probs: Tensor | None = None
        args, policy = self.args, self.accelerator.unwrap_model(self.model)
        shared = {"form": args.critic_form, "base": run_base(self)}
        with loaded_whole(args):
            critic = make_critic(
                critic, args.critic_init, policy, self.length_value_model, args.runs_remote_code, **shared
            )
        self.critic = None if critic is None else place_critic(critic, self)
        if self._critic_learns:
            self._updates = CriticUpdates(self.critic, self)
            self.add_callback(self._updates)
        self._states = None
        if critic is not None and critic.config.form == HEAD:
            self._states = CriticStates(self.critic, self)
            self._readers.append(self._states)

    @property
    def _critic_learns(self) -> bool:
        return self.critic is not None and self.args.critic_learning_rate > 0.0

    def _collect(self, batch: dict) -> Batch:
        read = super()._collect(batch)
        if self._mode == "train":
            self._divergence.begin()
        outcomes, reduce = read.outcomes, read.processes.reduce
        learn = self._mode == "train"
        rewards = self._reward_scale(outcomes.rewards, outcomes.scored, ~read.completions.finished, reduce, learn)
        read = replace(read, outcomes=replace(outcomes, rewards=rewards))
        if self.critic is None:
            return read
        with torch.no_grad():
            if self._states is not None:
                # They are shuffled and split with the rest of the batch.
                batch[_STATES] = self._states.of_batch(batch, self._chunk_size)
            values_bt1 = self._values(batch, self._chunk_size)
            if not self._critic_learns:
                batch.pop(_STATES, None)
            log_ratio = None
            if self.args.kl_reward_coef > 0.0:
                log_ratio = torch.where(read.completions.actions, self._log_ratio(batch), 0.0)
        coef = self._kl_coefficient.value
        return replace(read, critic_values_bt1=values_bt1, log_ratio=log_ratio, kl_reward_coef=coef)

    def _values(self, batch: dict, chunk_size: int | None = None) -> Tensor:
        """The critic's values at every state, `(B, T + 1)`."""
        if self._states is not None:
            return state_values(self.critic, batch[_STATES], batch, self, chunk_size)
        return value_logits(self.critic, TASK_CRITIC, batch, self, chunk_size)

    def _log_ratio(self, batch: dict) -> Tensor:
        """``log pi - log pi_ref`` of each token, `(B, T)`, of the policy that the completions were sampled from."""
        policy = batch.get("old_per_token_logps")
        if policy is None:
            # TRL leaves them out where the loss can do without.
            policy = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].shape[1],
                batch_size=self._chunk_size,
            )[0]
        return policy - batch["ref_per_token_logps"]

    def _streams(self, read: Batch) -> Streams:
        return ppo_streams(self.args, read)

    def _measure(self, metrics: BatchMetrics, read: Batch, streams: Streams) -> None:
        super()._measure(metrics, read, streams)
        if read.log_ratio is not None:
            add_kl_reward(metrics, read.log_ratio, read.kl_reward_coef, read.completions)
        if self.critic is not None:
            values = read.critic_values_bt1[:, :-1]
            realised = read.completions.finished if self.args.truncation == "bootstrap" else None
            add_critic(metrics, values, streams.critic_errors + values, _counted(read), realised)

    def _set(self, metrics: BatchMetrics, batch: dict, read: Batch, streams: Streams) -> None:
        super()._set(metrics, batch, read, streams)
        if self.critic is not None:
            counted = _counted(read)
            batch["critic_mask"] = counted
            # As TRL's `num_items_in_batch`: of the generation batch and all processes.
            batch["critic_items"] = read.processes.reduce(counted.sum())
            batch["critic_values"] = read.critic_values_bt1[:, :-1]
            batch["critic_returns"] = streams.critic_targets

    def _calculate_rewards(self, *arguments):
        rewards = super()._calculate_rewards(*arguments)
        if self._mode == "train" and not self._policy_learns:
            # A policy that stands still answers no penalty that is steered.
            self._reward_states.undo()
        return rewards

    def _react(self, measured: dict[str, float], batch: dict, read: Batch) -> None:
        super()._react(measured, batch, read)
        if read.log_ratio is None:
            return
        self._log_all({"kl_reward/coef": read.kl_reward_coef})
        # A policy that stands still answers no coefficient.
        if self._mode == "train" and self._policy_learns:
            self._kl_coefficient.observe(measured["kl_reward/per_token"])

    @property
    def _policy_step(self) -> int:
        return max(super()._policy_step - self.args.critic_warmup_steps, 0)

    @property
    def _policy_learns(self) -> bool:
        return self.state.global_step >= self.args.critic_warmup_steps

    def _prepare_inputs(self, generation_batch):
        parts = self._buffered_inputs
        begins = self._mode == "train" and parts is not None and self._step % self.args.steps_per_generation == 0
        again = begins and self._step % (self.args.steps_per_generation * self.num_iterations)
        if again and self.critic is not None:
            # Another pass through a batch that is there: TRL would cut it into the same mini-batches again.
            self._buffered_inputs = dealt_again(parts)
        return super()._prepare_inputs(generation_batch)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *arguments, **options
    ):
        states = self._states
        with contextlib.nullcontext() if states is None else states.reading(model, logits_to_keep):
            found = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *arguments, **options
            )
        self._log_probs = found[0].detach()
        return found

    def _compute_loss(self, model, inputs):
        training = self._mode == "train"
        if training and (self._divergence.stopped or not self._policy_learns):
            # Without gradients, not with gradients of 0: the optimizer then neither decays nor moves a weight, and
            # its moments start with the first step that is one.
            with torch.no_grad(), entropy_at_rest(self):
                loss = super()._compute_loss(model, inputs)
            loss = torch.zeros_like(loss).requires_grad_()
        else:
            loss = super()._compute_loss(model, inputs)
        self._measure_divergence(inputs, training)
        if not self._critic_learns:
            return loss
        if training:
            self._updates.keep(inputs)
        return loss + self.args.vf_coef * self._value_loss(inputs, self.accelerator.sync_gradients)

    def _measure_divergence(self, inputs: dict, training: bool) -> None:
        """How far the policy has moved from the one that sampled the batch, of which TRL keeps nothing where it has
        not moved."""
        old, mask = inputs.get("old_per_token_logps"), inputs["completion_mask"]
        if old is None:
            return
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        args, ratio, clipped = self.args, (self._log_probs - old).exp(), None
        if args.loss_type in RATIO_CLIPPING_LOSSES:
            clipped = beyond_clip(ratio, inputs["advantages"], self.epsilon_low, self.epsilon_high)
        divergence, number = approximate_kl(self._log_probs, old), None
        if training and self.num_iterations > 1:
            number = self._step // args.steps_per_generation % self.num_iterations + 1
        add_divergence(self.step_metrics, divergence, ratio, clipped, mask, number)
        stopped = torch.full_like(divergence, float(self._divergence.stopped))
        self.step_metrics.mean("policy/stopped", stopped, mask)

    def _log_step(self, metrics: dict[str, float], mode: str) -> None:
        super()._log_step(metrics, mode)
        # An update of the critic alone tells of no divergence.
        if mode == "train":
            self._divergence.observe(metrics.get("policy/approx_kl", math.nan))

    def _value_loss(self, inputs: dict, is_last: bool = True) -> Tensor:
        """The value loss as a mean over the tokens of the optimizer step that this batch is a part of.

        Args:
            inputs (`dict`): a micro-batch.
            is_last (`bool`, *optional*, defaults to `True`): whether it is the last of its step.
        """
        mask, old, returns = inputs["critic_mask"], inputs["critic_values"], inputs["critic_returns"]
        # As Trainer does for the policy: processes exchange gradients once per optimizer step.
        together = is_last or is_sharded(self)
        with trusted_masks(), contextlib.nullcontext() if together else self.accelerator.no_sync(self.critic):
            values = self._values(inputs)[:, :-1]
        losses, clipped = value_loss(values, old, returns, mask, self.args.cliprange_value)
        self.step_metrics.mean("critic/value_loss", losses, mask)
        self.step_metrics.mean("critic/clip_fraction", clipped.float(), mask)
        # DDP averages over processes.
        tokens = inputs["critic_items"].clamp(min=1.0) / self.accelerator.num_processes
        if self._mode == "train":
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return losses.sum() / tokens

    def before_optimizer_step(self) -> None:
        """See [`LenVMTrainer`]."""
        if self._critic_learns:
            self._updates.clip()
        super().before_optimizer_step()

    # What evaluations and the updates of a critic alone have left unread. Where all processes are at once: `log` may be
    # called by one of them alone.

    def _maybe_log_save_evaluate(self, *arguments, **options):
        if self.control.should_log:
            self.unread.read()
        return super()._maybe_log_save_evaluate(*arguments, **options)

    def evaluation_loop(self, *arguments, **options):
        """See `Trainer`."""
        measured = super().evaluation_loop(*arguments, **options)
        self.unread.read()
        return measured

    def _run_epoch(self, *arguments, **options):
        super()._run_epoch(*arguments, **options)
        self.unread.read()

    def _moving_parts(self) -> dict[str, object]:
        parts = {"reward_scale": self._reward_scale, "kl_reward_coef": self._kl_coefficient}
        return {**super()._moving_parts(), **parts}

    def _write_state(self, folder: str) -> None:
        self.unread.read()
        if self._critic_learns and self._updates.own is not None:
            self._updates.own.save(folder, self.accelerator.process_index)
        super()._write_state(folder)

    def _read_state(self, checkpoint: str) -> None:
        super()._read_state(checkpoint)
        if self.critic is not None:
            read_critic(checkpoint, self._bare_critic)
        if self._critic_learns and self._updates.own is not None:
            self._updates.own.load(checkpoint, self.accelerator.process_index)

    def create_optimizer(self, model: nn.Module | None = None):
        """As `Trainer.create_optimizer`, with parameter groups of the critic's own."""
        optimizer = super().create_optimizer(model)
        if self._critic_learns:
            self._updates.take_optimizer()
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As `Trainer.create_scheduler`, with a schedule of the critic's own where it has one."""
        made = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if made and self._critic_learns:
            self._updates.take_schedule(num_training_steps)
        return scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with a learned critic in the folder `critic` beside the policy.

        So it is in every checkpoint, and `critic="<output_dir>/critic"` takes it up again in another run.
        """
        # First: what follows may upload the folder.
        if self.critic is not None:
            self.save_critic(os.path.join(output_dir or self.args.output_dir, CRITIC_FOLDER))
        super().save_model(output_dir, _internal_call)

    def save_critic(self, folder: str) -> None:
        """Write the learned critic to `folder`: `critic=folder` takes it up again in another run.

        All processes call this, and one writes.
        """
        if self.critic is None:
            raise ValueError("critic='lenvm' learns no critic, so there is none to save.")
        state = whole_state(self._bare_critic)
        if self.args.should_save:
            self._bare_critic.save_pretrained(folder, state_dict=state)

    def _check_checkpoint(self, checkpoint: str) -> int:
        step = super()._check_checkpoint(checkpoint)
        check_same_critic(checkpoint, self._bare_critic)
        return step

    @property
    def _bare_critic(self) -> TaskCritic | None:
        return None if self.critic is None else self.accelerator.unwrap_model(self.critic)

    def _load_best_model(self):
        super()._load_best_model()
        if self.critic is not None:
            read_critic(self.state.best_model_checkpoint, self._bare_critic)
