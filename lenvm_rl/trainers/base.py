"""What both trainers share: a frozen length value model beside the policy, and the line from a batch to advantages."""

from __future__ import annotations

import contextlib
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.grpo_trainer import RewardFunc
from trl.trainer.utils import get_config_model_id

from lenvm_rl.endings import through_first_end
from lenvm_rl.files import MetricsFile, check_files, explained_failure
from lenvm_rl.modeling.backbones import check_embeds
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.returns import trusted_masks
from lenvm_rl.trainers import checks
from lenvm_rl.trainers.checks import trainer_keywords
from lenvm_rl.trainers.coefficient import LengthCoefficient
from lenvm_rl.trainers.config import LenVMConfig
from lenvm_rl.trainers.engine import colocated_engine, engine_ratio, guided_requests
from lenvm_rl.trainers.frozen import FrozenLengthValues, length_value_model_of, place_length_value_model
from lenvm_rl.trainers.metrics import BatchMetrics, add_completions, add_guidance, add_streams, add_values
from lenvm_rl.trainers.resuming import ResumableTrainer, stop_between_generations
from lenvm_rl.trainers.rewards import Gate, check_rewards, watched_rewards
from lenvm_rl.trainers.rollouts import (
    Sampled,
    check_ends,
    check_guided_rollouts,
    collect_completions,
    guided_generation,
    importance_ratio,
    read_guidance,
    read_sampled,
    run_end_ids,
)
from lenvm_rl.trainers.sharding import check_engine, check_shards
from lenvm_rl.trainers.streams import Batch, Processes, Streams
from lenvm_rl.trainers.unread import ReadsBeforeStep, Unread

LENVM_CITATION = textwrap.dedent("""\
    @article{zhang2026length,
        title        = {{Length Value Model: Scalable Value Pretraining for Token-Level Length Modeling}},
        author       = {Zhen Zhang and Changyi Yang and Zijie Xia and Zhen Yang and Chengzhi Liu and Zhaotiao Weng and
                        Yepeng Liu and Haobo Chen and Jin Pan and Chenyang Zhao and Yuheng Bu and Alkesh Patel and
                        Zhe Gan and Xin Eric Wang},
        year         = 2026,
        eprint       = {arXiv:2604.27039},
    }""")
# What TRL's template makes of a base model, and of a trained one, without a hub id.
NO_BASE, NO_NAME = "[None](https://huggingface.co/None)", 'model="None"'
# Shares of a batch that are not logged: of what was scored, and paid for length.
SCORED, PAID = "scored", "paid"


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
        model: PreTrainedModel | PeftModel | str,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: LenVMConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        *further,
        length_value_model: LengthValueModel | str | None = None,
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
        checks.check_reference_path(model, args, grpo_arguments)
        # Otherwise batches stay as TRL makes them.
        self.sets_advantages = self.always_dense or args.needs_length_value_model
        if self.sets_advantages:
            checks.check_loss(args)
        length_value_model = length_value_model_of(length_value_model, args)
        self._guidance, self._guidance_report = read_guidance(args), None
        with colocated_engine(args, self._guidance, lambda: self.accelerator.unwrap_model(self.length_value_model)):
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
        checks.warn_of_another_reference(model, self)
        # Known from here on: the tokenizer and the reward functions, as TRL sees them.
        accelerator = self.accelerator
        self.unread = Unread(self._sum_over_processes, accelerator.process_index, accelerator.num_processes)
        self._step_metrics: dict[str, BatchMetrics] = {}
        self._gate = Gate(args, self.reward_funcs, self.reward_func_names, self.unread)
        self._coefficient = LengthCoefficient(args)
        self.length_value_model = self._frozen = None
        if length_value_model is not None:
            self.length_value_model = place_length_value_model(length_value_model, self)
            self._frozen = FrozenLengthValues(self.length_value_model, self)
        # What reads the reference's forward along with TRL, if it can.
        self._readers = [] if self._frozen is None else [self._frozen]
        # TRL cuts what stands behind an end off by these: it knows none of `generation_kwargs`, and before 1.16 the
        # tokenizer's only.
        self.eos_token_ids = run_end_ids(self)
        if self.sets_advantages:
            check_ends(self)
        self._sampled: Sampled | None = None
        self._raw_rewards: Tensor | None = None
        if self._guidance is not None:
            check_guided_rollouts(self)
        self.add_callback(ReadsBeforeStep(self))
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

    @property
    def _chunk_size(self) -> int:
        """Rows of a forward that only reads."""
        args = self.args
        return args.per_device_train_batch_size if self._mode == "train" else args.per_device_eval_batch_size

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    def _log_all(self, metrics: dict[str, float], mode: str | None = None) -> None:
        for name, value in metrics.items():
            self._metrics[mode or self._mode][name].append(value)

    @property
    def step_metrics(self) -> BatchMetrics:
        """Metrics of all micro-batches of an update, logged by the next read."""
        mode = self._mode
        if mode not in self._step_metrics:
            self._step_metrics[mode] = BatchMetrics()
            self.unread.add_metrics(self._step_metrics[mode], partial(self._log_step, mode=mode))
        return self._step_metrics[mode]

    def begin_update(self) -> None:
        """What micro-batches tell from here on is of another update, which counts as much in the log."""
        self._step_metrics.pop(self._mode, None)

    def _log_step(self, metrics: dict[str, float], mode: str) -> None:
        self._step_metrics.pop(mode, None)
        self._log_all(metrics, mode)

    def before_optimizer_step(self) -> None:
        """What there is to be done when the gradients are there, and before the weights move."""
        self.unread.read()

    # What TRL does on the way to a batch, and what is kept of it.

    def _generate(self, prompts):
        generated = super()._generate(prompts)
        self._sampled = read_sampled(generated, self.eos_token_ids)
        return generated

    def _generate_single_turn(self, *args, **kwargs):
        training = self.model.training
        completion_ids, logprobs = self._sample_turn(*args, **kwargs)
        if self.model.training != training:
            # TRL's continuous batching leaves the model in training mode, in evaluations too.
            self.model.train(training)
        if not self.use_vllm:
            completion_ids = [through_first_end(ids, self.eos_token_ids) for ids in completion_ids]
        return completion_ids, logprobs

    def _sample_turn(self, *args, **kwargs):
        if self._guidance is None or self._mode != "train":
            return super()._generate_single_turn(*args, **kwargs)
        if self.use_vllm:
            with guided_requests(self.vllm_generation, self._guidance):
                return super()._generate_single_turn(*args, **kwargs)
        model, values = (self.accelerator.unwrap_model(each) for each in (self.model_wrapped, self.length_value_model))
        with guided_generation(model, values, self._guidance) as reports:
            completions = super()._generate_single_turn(*args, **kwargs)
        (self._guidance_report,) = reports
        return completions

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # The one place where the rewards of single functions can be had: they are not in the batch.
        with watched_rewards(self, None if self._sampled is None else self._sampled.tool_mask):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        # What functions return is checked on the host.
        if any(isinstance(function, nn.Module) for function in self.reward_funcs):
            self.unread.add_flag((~torch.isfinite(rewards)).any(), partial(check_rewards, rewards, self))
        self._raw_rewards = rewards
        return rewards

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *arguments, **options
    ):
        frozen = self._frozen
        with contextlib.nullcontext() if frozen is None else frozen.reading(model, logits_to_keep):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *arguments, **options
            )

    # The line: a batch of TRL's is put together with what the models say of it, made into streams, and set.

    def _generate_and_score_completions(self, inputs):
        # It may move what this batch is weighed by.
        self.unread.read()
        if self._frozen is not None and self._mode == "train":
            self._log_all(self._frozen.refresh_if_due(self.state.global_step, self.args.per_device_train_batch_size))
        for reader in self._readers:
            reader.reads_along()
        batch = super()._generate_and_score_completions(inputs)
        # TRL has padded the rows.
        with trusted_masks():
            read = self._collect(batch)
            streams = self._streams(read)
            metrics = BatchMetrics()
            self._measure(metrics, read, streams)
            self._set(metrics, batch, read, streams)
        self.unread.add_metrics(metrics, partial(self._react, batch=batch, read=read))
        if self._mode != "train":
            self.unread.read()
        return batch

    def _collect(self, batch: dict) -> Batch:
        """What the streams are made of: how completions ended and were rewarded, and what the models say of them."""
        training = self._mode == "train"
        completions = collect_completions(self, batch, self._sampled)
        rows = len(completions.mask)
        first = self.accelerator.process_index * rows
        mine = slice(first, first + rows)
        outcomes = self._gate.outcomes(self._raw_rewards, self.reward_funcs, self.reward_weights, mine)
        group_size = self.num_generations if training else self.num_generations_eval
        processes = Processes(group_size, first, self.accelerator.gather, self._sum_over_processes)
        read = Batch(completions, outcomes, processes, batch["advantages"], max_length=self.max_completion_length)
        if self._frozen is None:
            return read
        return replace(
            read,
            length_coef=self._coefficient.at(self._policy_step),
            gamma=self._frozen.gamma,
            length_logits_bt1=self._frozen.logits(batch, self._chunk_size),
        )

    def _streams(self, read: Batch) -> Streams:
        """The streams of a batch, by one of the pure functions of [`lenvm_rl.trainers.streams`]."""
        raise TypeError(f"{type(self).__name__} is only the common part: use LenVMGRPOTrainer or LenVMPPOTrainer.")

    def _measure(self, metrics: BatchMetrics, read: Batch, streams: Streams) -> None:
        """Take in what is logged of the batch."""
        add_completions(metrics, read.completions, read.outcomes)
        add_streams(metrics, streams, read.completions)
        if read.length_logits_bt1 is not None:
            # Whether anybody was, on any process.
            metrics.mean(SCORED, read.outcomes.scored.float(), torch.ones_like(read.outcomes.scored))
            metrics.mean(PAID, (streams.length != 0.0).float(), torch.ones_like(read.completions.mask))
            add_values(metrics, read.length_logits_bt1, read.completions, read.gamma)

    def _set(self, metrics: BatchMetrics, batch: dict, read: Batch, streams: Streams) -> None:
        """Put the advantages into the batch."""
        if not self.sets_advantages:
            return
        advantages = batch["advantages"] = streams.advantages
        if self._guidance is not None and self.use_vllm and self._mode == "train":
            # TRL weighs by it in the loss.
            ratio, weight = engine_ratio(batch, read.completions.mask)
            add_guidance(metrics, ratio, weight < ratio, read.completions)
        elif self._guidance_report is not None:
            ratio, weight = importance_ratio(self._guidance_report, read.completions.mask)
            add_guidance(metrics, ratio, weight < ratio, read.completions)
            batch["advantages"] = weight * advantages
            self._guidance_report = None
        if self.log_completions:
            # TRL's own column holds the group-relative advantage, which is not what the policy learns from here.
            means = batch["advantages"].sum(dim=1) / read.completions.actions.sum(dim=1).clamp(min=1)
            self.unread.add_own(means, self._logs["extra"]["policy_advantage"].extend)

    def _react(self, measured: dict[str, float], batch: dict, read: Batch) -> None:
        """Log what was measured, and let it move what the batches to come are weighed and watched by."""
        is_scored, is_paid = (measured.pop(name, 0.0) > 0.0 for name in (SCORED, PAID))
        if self._frozen is not None:
            self._log_all({"length/coef": read.length_coef})
        self._log_all(measured)
        if self._frozen is None or self._mode != "train":
            return
        self._gate.watch(measured["length/correct"], is_paid)
        # A policy that stands still answers no coefficient.
        if self._policy_learns and is_scored:
            self._log_all(self._coefficient.observe(measured, is_paid))
        self._log_all(self._frozen.observe(measured, batch, read.completions, read.outcomes.correct))

    # Checkpoints, and the card beside them.

    def create_model_card(self, *arguments, **options):
        """See TRL, which calls a model `None` that is on no hub."""
        super().create_model_card(*arguments, **options)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir, "README.md")
            kind = self.accelerator.unwrap_model(self.model).config.model_type
            card = path.read_text(encoding="utf-8")
            card = card.replace(NO_BASE, f"a model of type `{kind}` that is on no hub")
            path.write_text(card.replace(NO_NAME, 'model="path/to/this/folder"'), encoding="utf-8")

    def _check_checkpoint(self, checkpoint: str) -> int:
        step = super()._check_checkpoint(checkpoint)
        check_files(checkpoint)
        # Read only now that its file is known to be whole.
        check_engine(self._state_of(checkpoint).get("engine"), checkpoint, self)
        return step

    def _save_checkpoint(self, model, trial):
        with explained_failure(self._checkpoint_folder(trial)):
            super()._save_checkpoint(model, trial)

    def _write_state(self, folder: str) -> None:
        if self._frozen is not None and self._frozen.refresh is not None:
            self._frozen.refresh.save(folder, self.args.should_save)
        super()._write_state(folder)

    def _read_state(self, checkpoint: str) -> None:
        if self._frozen is not None and self._frozen.refresh is not None:
            self._frozen.refresh.load(checkpoint)
        super()._read_state(checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        if self._frozen is not None and self._frozen.refresh is not None:
            self._frozen.refresh.load_model(self.state.best_model_checkpoint)

    def _moving_parts(self) -> dict[str, object]:
        parts = {**super()._moving_parts(), "length_coef": self._coefficient}
        if self._frozen is not None:
            parts |= {"drift": self._frozen.drift}
            parts |= {} if self._frozen.refresh is None else {"refresh": self._frozen.refresh}
        return parts
