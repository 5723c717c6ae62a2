"""What both trainers share: a frozen length value model beside the policy, the streams it gives, and what is logged."""

import contextlib

import torch
from torch import Tensor
from trl.trainer.utils import get_config_model_id

from lenvm_rl.advantages import combine, gae, length_advantage
from lenvm_rl.endings import through_first_end
from lenvm_rl.files import MetricsFile, check_files, explained_failure
from lenvm_rl.modeling.backbones import check_embeds
from lenvm_rl.modeling.completions import completion_logits
from lenvm_rl.shaping import length_potential, potential_shaping, value_potential
from lenvm_rl.trainers import checks
from lenvm_rl.trainers.arguments import trainer_keywords
from lenvm_rl.trainers.base_config import LenVMConfig
from lenvm_rl.trainers.checks import check_reference_path, warn_of_another_reference
from lenvm_rl.trainers.coefficient import LengthCoefficient
from lenvm_rl.trainers.frozen import LengthValues, check_shards, place_length_value_model
from lenvm_rl.trainers.gate import Gate, Outcomes, paid_share
from lenvm_rl.trainers.metrics import completion_metrics, stream_metrics
from lenvm_rl.trainers.pictures import picture_inputs
from lenvm_rl.trainers.resuming import ResumableTrainer, stop_between_generations
from lenvm_rl.trainers.rewards import check_reward_models, watched_rewards
from lenvm_rl.trainers.rollouts import (
    Sampled,
    check_ends,
    check_guided_rollouts,
    completion_budget,
    ends_in_stop_string,
    guided_generation,
    importance_ratio,
    read_guidance,
    read_sampled,
    run_end_ids,
)
from lenvm_rl.trainers.streams import Completions, centered_gated_advantage, read_completions


class LenVMTrainer(ResumableTrainer):
    """[`trl.GRPOTrainer`] with a frozen length value model: the common part of the two trainers, not for use by itself.

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, further, grpo_arguments:
            As in [`trl.GRPOTrainer`], by position or by name. `args` is of the trainer's own config class.
        length_value_model ([`LengthValueModel`] or `str`, *optional*):
            The model or its path. It is frozen, and placed like TRL's reference model. Needed where `length_coef` or
            `shaping_coef` is not 0; otherwise it is only logged. One of form `"adapter"` or `"head"` shares the
            decoder of the reference model, or of the base under a policy's adapters; a head alone then reads the
            reference's own forward ([`lenvm_rl.trainers.frozen`]).

    Raises:
        `ValueError`: what [`lenvm_rl.trainers.checks`] and [`lenvm_rl.trainers.resuming`] refuse.
        `FileNotFoundError`: a model's path does not exist.
        `TypeError`: an argument is one of an older trainer; what stands for it is said.
    """

    config_class = LenVMConfig
    # Whether advantages differ from token to token even with both coefficients at 0.
    always_dense = False

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: LenVMConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *further,
        length_value_model=None,
        **grpo_arguments,
    ):
        grpo_arguments = trainer_keywords(type(self).__name__, model, 6, further, grpo_arguments)
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{name.split('/')[-1]}-{type(self).__name__.removesuffix('Trainer')}")
        checks.check_config_class(args, self.config_class)
        checks.check_model_path(model, "the policy")
        checks.check_not_tokenized(train_dataset, "training set")
        checks.check_not_tokenized(eval_dataset, "evaluation set")
        checks.check_dataset(train_dataset, args, grpo_arguments.get("environment_factory") is not None)
        check_reference_path(model, args, grpo_arguments)
        if self.always_dense or args.needs_length_value_model:
            checks.check_loss(args)
        length_value_model = checks.load_length_value_model(length_value_model, args)
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **grpo_arguments,
        )
        check_shards(self)
        check_embeds(self._tokenizer, self.model, "the policy")
        warn_of_another_reference(model, self)
        # Known from here on: the tokenizer and the reward functions, as TRL sees them.
        self._gate = Gate(args, self.reward_funcs, self.reward_func_names)
        checks.check_steering(args)
        self._coefficient = LengthCoefficient(args)
        self.length_value_model = self._length_values = None
        if length_value_model is not None:
            self.length_value_model = place_length_value_model(length_value_model, self)
            self._length_values = LengthValues(self.length_value_model, self)
            self.length_gamma = self._length_values.gamma
        # TRL cuts what stands behind an end off by these: it knows none of `generation_kwargs`, and before 1.16 the
        # tokenizer's only.
        self.eos_token_ids = self._ends = run_end_ids(self)
        if self.always_dense or args.needs_length_value_model:
            check_ends(self)
        self._sampled: Sampled | None = None
        self._raw_rewards: Tensor | None = None
        self._guidance = read_guidance(args)
        self._guidance_report = None
        if self._guidance is not None:
            check_guided_rollouts(self)
        self.add_callback(MetricsFile())
        stop_between_generations(self)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _policy_step(self) -> int:
        """Optimizer steps that the policy has learned in."""
        return self.state.global_step

    @property
    def _policy_learns(self) -> bool:
        """Whether it does so in this step."""
        return True

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    def _log_all(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(value)

    def _generate(self, prompts):
        generated = super()._generate(prompts)
        self._sampled = read_sampled(generated, self._ends)
        return generated

    def _generate_single_turn(self, *args, **kwargs):
        completion_ids, logprobs = self._sample_turn(*args, **kwargs)
        if not self.use_vllm:
            completion_ids = [through_first_end(ids, self._ends) for ids in completion_ids]
        return completion_ids, logprobs

    def _sample_turn(self, *args, **kwargs):
        if self._guidance is None or self._mode != "train":
            return super()._generate_single_turn(*args, **kwargs)
        model, values = (self.accelerator.unwrap_model(each) for each in (self.model_wrapped, self.length_value_model))
        with guided_generation(model, values, self._guidance) as reports:
            completions = super()._generate_single_turn(*args, **kwargs)
        (self._guidance_report,) = reports
        return completions

    def _weigh_guided(self, advantages: Tensor, completions: Completions) -> Tensor:
        """The advantages of guided completions `(B, T)`, each token weighed by its importance ratio."""
        ratio, sums = importance_ratio(self._guidance_report, completions.mask, self.args.rollout_ratio_max)
        self._guidance_report = None
        totals = self._sum_over_processes(torch.stack([sums[name] for name in ("tokens", "ratio", "truncated")]))
        tokens, total, truncated = totals.tolist()
        self._log_all({"guidance/ratio": total / max(tokens, 1), "guidance/truncated": truncated / max(tokens, 1)})
        return ratio * (advantages if advantages.dim() == 2 else advantages.unsqueeze(1))

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # The one place where the rewards of single functions can be had: they are not in the batch.
        with watched_rewards(self, None if self._sampled is None else self._sampled.tool_mask):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        check_reward_models(rewards, self)
        checks.check_rewards(rewards, self.reward_func_names)
        self._raw_rewards = rewards
        return rewards

    def _outcomes(self, rows: int) -> Outcomes:
        first = self.accelerator.process_index * rows
        mine = slice(first, first + rows)
        return self._gate.outcomes(self._raw_rewards, self.reward_funcs, self.reward_weights, mine)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *arguments, **options
    ):
        values = self._length_values
        with contextlib.nullcontext() if values is None else values.reading(model, logits_to_keep):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *arguments, **options
            )

    def _value_logits(self, model, batch: dict, what: str) -> Tensor:
        """Logits of a value model at every state, `(B, T + 1)`, without gradient, in chunks of the per-device batch."""
        checks.check_ids(model, what, batch, self)
        args = self.args
        chunk = args.per_device_train_batch_size if self._mode == "train" else args.per_device_eval_batch_size
        with torch.no_grad():
            logits = completion_logits(
                model,
                batch["prompt_ids"],
                batch["prompt_mask"],
                batch["completion_ids"],
                batch["completion_mask"],
                chunk_size=chunk,
                further_inputs=picture_inputs(batch),
            )
        checks.check_finite(logits, what, batch, self)
        return logits

    def _length_stream(self, logits: Tensor, completions: Completions, outcomes: Outcomes) -> Tensor:
        """The length advantage `(B, T)`, gated, without `length_coef`."""
        args, states = self.args, -torch.sigmoid(logits)
        values, following = states[:, :-1], completions.following(states)
        group = {
            "group_size": self.num_generations if self._mode == "train" else self.num_generations_eval,
            "gather": self.accelerator.gather,
            "first_row": self.accelerator.process_index * len(values),
        }
        if args.length_gate_center:
            length = centered_gated_advantage(
                values, completions, self.length_gamma, following, outcomes.correct, judged=outcomes.judged, **group
            )
        else:
            length = length_advantage(
                values, completions.mask, self.length_gamma, args.length_lam, following, completions.actions
            )
            length = paid_share(args, outcomes, **group).to(length.dtype).unsqueeze(1) * length
        return torch.where(outcomes.scored.unsqueeze(1), length, 0.0)

    def _potential(self, logits: Tensor) -> Tensor:
        """The shaping potential at every state, `shaping_coef` included: `(B, T + 1)`."""
        if self.args.shaping_potential == "value":
            potential = value_potential(logits)
        else:
            potential = length_potential(logits, self.length_gamma, self.max_completion_length)
        return self.args.shaping_coef * potential

    def _shaping_advantage(self, logits: Tensor, completions: Completions) -> Tensor:
        """What shaping adds to a task advantage that has no critic: ``GAE(F, 0)``, `(B, T)`.

        Never ``F_t`` by itself, which looks one token ahead, and never its sum, which is the same for all completions
        of a prompt. With lambda 1 it is ``-Phi(s_t)``, a baseline. The task without a critic ends where it is cut, so
        Phi is 0 there too. Or ``GAE(0, Phi)``, which is the same.
        """
        args, potential = self.args, self._potential(logits)
        if args.shaping_form == "critic_offset":
            rewards, values = torch.zeros_like(potential[:, :-1]), potential[:, :-1]
        else:
            rewards = self._shaping_rewards(potential, completions, terminal_cut=True)
            values = torch.zeros_like(rewards)
        return gae(rewards, values, completions.mask, args.task_gamma, args.task_lam, action_mask=completions.actions)

    def _shaping_rewards(self, potential: Tensor, completions: Completions, terminal_cut: bool) -> Tensor:
        """``F_t``, `(B, T)`, of a potential at every state, `(B, T + 1)`, which is 0 wherever the task ends."""
        following = completions.following(potential, terminal_cut)
        return potential_shaping(
            potential[:, :-1], completions.mask, self.args.shaping_discount, following, completions.actions
        )

    def _generate_and_score_completions(self, inputs):
        if self._length_values is not None and self._mode == "train":
            self._log_all(self._length_values.refresh_if_due())
        batch = super()._generate_and_score_completions(inputs)
        completions = self._read_completions(batch)
        outcomes = self._outcomes(len(completions.mask))
        reduce = self._sum_over_processes
        measured = completion_metrics(completions, outcomes.correct, outcomes.judged, reduce)
        self._log_all(measured)
        logits = length = coefficient = None
        if self._length_values is not None:
            logits = self._length_values.logits(batch)
            length = self._length_stream(logits, completions, outcomes)
            coefficient = self._take_coefficient(measured, *self._any(outcomes.scored, length != 0.0))
            training = self._mode == "train"
            self._log_all(self._length_values.measure(logits, batch, completions, outcomes.correct, training))
        task = self._task_stream(batch, completions, outcomes, logits)
        self._log_all(stream_metrics(task, length, completions, reduce))
        if self.always_dense or self.args.needs_length_value_model:
            batch["advantages"] = self._add_streams(task, length, coefficient, completions, outcomes)
        # Otherwise the batch stays as TRL made it.
        if self._guidance_report is not None:
            batch["advantages"] = self._weigh_guided(batch["advantages"], completions)
        if self.log_completions and batch["advantages"].dim() == 2:
            # TRL's own column holds the group-relative advantage, which is not what the policy learns from here.
            means = batch["advantages"].sum(dim=1) / completions.actions.sum(dim=1).clamp(min=1)
            self._logs["extra"]["policy_advantage"].extend(self.accelerator.gather(means).tolist())
        return batch

    def _read_completions(self, batch: dict) -> Completions:
        """The completions of a generation batch: which tokens are the policy's, and how each row ended."""
        sampled, prompt_lengths = self._sampled, batch["prompt_mask"].sum(dim=1)
        said, device = None, prompt_lengths.device
        if sampled.finished is not None:
            said = torch.tensor(sampled.finished, device=device)
        budget = completion_budget(self, prompt_lengths, sampled)
        if budget is not None:
            stopped = ends_in_stop_string(self, batch["completion_ids"], batch["completion_mask"])
            budget = budget.masked_fill(stopped, torch.iinfo(budget.dtype).max)
        return read_completions(batch, self._ends, budget, said, torch.tensor(sampled.lengths, device=device))

    def _add_streams(
        self,
        task: Tensor,
        length: Tensor | None,
        coefficient: float | None,
        completions: Completions,
        outcomes: Outcomes,
    ) -> Tensor:
        """The advantages `(B, T)` that the policy learns from."""
        return combine(task, length, completions.mask, coefficient) if self.args.has_length_stream else task

    def _any(self, *flags: Tensor) -> list[bool]:
        """Whether any entry of each tensor is on, on any process."""
        return (self._sum_over_processes(torch.stack([each.any().float() for each in flags])) > 0).tolist()

    def _take_coefficient(self, measured: dict[str, float], is_scored: bool, is_paid: bool) -> float:
        """The coefficient of this batch; what the batch measured moves that of the next one.

        Args:
            measured (`dict[str, float]`): of [`~lenvm_rl.trainers.metrics.completion_metrics`].
            is_scored, is_paid (`bool`): whether any completion was scored, and whether any is paid for length.
        """
        coefficient = self._coefficient.at(self._policy_step)
        self._log_all({"length/coef": coefficient})
        if self._mode == "train":
            self._gate.watch(measured["length/correct"], is_paid)
        # A policy that stands still answers no coefficient.
        if self._mode == "train" and self._policy_learns and is_scored:
            self._log_all(self._coefficient.observe(measured, is_paid))
        return coefficient

    def _check_checkpoint(self, checkpoint: str) -> int:
        step = super()._check_checkpoint(checkpoint)
        check_files(checkpoint)
        return step

    def _save_checkpoint(self, model, trial):
        with explained_failure(self._checkpoint_folder(trial)):
            super()._save_checkpoint(model, trial)

    def _write_state(self, folder: str) -> None:
        if self.args.should_save:
            self._coefficient.save(folder)
        if self._length_values is not None:
            self._length_values.save(folder, self.args.should_save)
        super()._write_state(folder)

    def _read_state(self, checkpoint: str) -> None:
        super()._read_state(checkpoint)
        self._coefficient.load(checkpoint)
        if self._length_values is not None:
            self._length_values.load(checkpoint)

    def _task_stream(self, batch: dict, completions: Completions, outcomes: Outcomes, logits: Tensor | None) -> Tensor:
        """The task advantage `(B, T)`, shaping included, 0 where no action is and for completions nobody scored."""
        raise TypeError(f"{type(self).__name__} is only the common part: use LenVMGRPOTrainer or LenVMPPOTrainer.")
