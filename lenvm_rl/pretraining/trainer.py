"""Value pretraining: a length value model is fitted to rollouts (arXiv 2604.27039, sections 3.3 and 5).

    rollouts, metadata = read_rollouts("rollouts.jsonl")
    model, metrics = pretrain("path/to/policy", rollouts, metadata, LengthValueTrainingArguments("out"), tokenizer)

Its stages are functions too: [`prepare_rollouts`] (which completions to fit on), [`fit_gamma_to_rollouts`],
[`make_length_value_model`], and [`LengthValueTrainer`], a `transformers.Trainer` whose loss is a mean over tokens of
the whole optimizer step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed

from lenvm_rl.files import MetricsFile, write_json
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.modeling.sharing import FULL, HEAD
from lenvm_rl.pretraining.arguments import LengthValueTrainingArguments, check_precision
from lenvm_rl.pretraining.batches import (
    COLUMNS,
    LengthValueCollator,
    StepSampler,
    check_fits,
    check_isolation,
    longest_first,
    unpack,
)
from lenvm_rl.pretraining.hidden_states import (
    FILE,
    HiddenStateCollator,
    HiddenStates,
    decoder_digest,
    remove_hidden_states,
    with_rows,
)
from lenvm_rl.pretraining.loss import IGNORED, length_value_loss, value_targets
from lenvm_rl.pretraining.metrics import (
    domain_metrics,
    domains_of_prompts,
    metrics_for_card,
    sequence_statistics,
    summarize,
)
from lenvm_rl.pretraining.references import reference_metrics
from lenvm_rl.pretraining.resuming import RECORD, check_resumed, find_checkpoint, fingerprint, settings_of
from lenvm_rl.pretraining.shared_prompts import SharedPromptCollator, check_sharing, model_inputs
from lenvm_rl.returns import fit_gamma
from lenvm_rl.rollouts.record import RolloutMetadata, warn_of_cuts
from lenvm_rl.tokenization import check_same_tokenizer

logger = logging.getLogger(__name__)

_PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)


def prepare_rollouts(rollouts: Dataset, args: LengthValueTrainingArguments, held_out: bool = False) -> Dataset:
    """The completions that values are fitted on; says by logging what was left out, and why.

    Held out, cut completions stay: a prompt that has one must not pass for one whose lengths are all known.
    """
    keep = [True] * len(rollouts)
    finished = [reason == "stop" for reason in rollouts["finish_reason"][:]]
    if args.only_correct:
        if "correct" not in rollouts.column_names:
            raise ValueError(
                f"only_correct needs a column `correct` in the rollouts; they have {', '.join(rollouts.column_names)}."
            )
        keep = [correct is True for correct in rollouts["correct"][:]]
        logger.info("only_correct: %d of %d completions are correct", sum(keep), len(keep))
    cut = sum(kept and not ended for kept, ended in zip(keep, finished, strict=True))
    logger.info("%d of %d completions are truncated, rule: %s", cut, sum(keep), args.truncated)
    if args.truncated == "drop" and not held_out:
        keep = [kept and ended for kept, ended in zip(keep, finished, strict=True)]
    if not any(kept and ended for kept, ended in zip(keep, finished, strict=True)):
        raise ValueError(
            f"None of the {len(rollouts)} completions is both finished and selected, so no length is known: sample "
            "with more new tokens, or look at `only_correct`."
        )
    return rollouts if all(keep) else rollouts.select([row for row, kept in enumerate(keep) if kept])


def completion_lengths(rollouts: Dataset, column: str = "completion_ids") -> torch.Tensor:
    """Tokens of each completion, end-of-sequence counted, or of another column of ids: `(N,)` int64."""
    table = rollouts.select_columns(column).with_format("arrow")[:]
    return torch.tensor(pc.list_value_length(table[column]).to_pylist())


def sequence_lengths(rollouts: Dataset) -> list[int]:
    """Tokens of each completion with its prompt."""
    return (completion_lengths(rollouts) + completion_lengths(rollouts, "prompt_ids")).tolist()


def fit_gamma_to_rollouts(
    rollouts: Dataset, quantile: float = 0.99, coverage: float = 0.99
) -> tuple[float, dict[str, Any]]:
    """Gamma for rollouts by [`~lenvm_rl.returns.fit_gamma`], and what it was fitted on (arXiv 2604.27039, section 5.3).

    Truncated completions count with the tokens they have, which can only make gamma smaller than it should be; their
    share is part of the record.

    Returns:
        `tuple[float, dict]`: gamma, and a record for the model's config: `quantile`, `coverage`, `completions`,
        `truncated_share`, `mean`, and `percentiles` of the lengths in tokens.
    """
    lengths = completion_lengths(rollouts).double()
    gamma = fit_gamma(lengths, quantile, coverage)
    ordered = lengths.sort().values
    percentiles = {str(p): int(ordered[round(p / 100 * (len(ordered) - 1))]) for p in _PERCENTILES}
    reasons = rollouts["finish_reason"][:]
    warn_of_cuts(reasons)
    cut = reasons.count("length")
    fit = {
        "quantile": quantile,
        "coverage": coverage,
        "completions": len(rollouts),
        "truncated_share": cut / len(rollouts),
        "mean": float(lengths.mean()),
        "percentiles": percentiles,
    }
    shown = ", ".join(f"p{p} {length}" for p, length in percentiles.items())
    logger.info("gamma %.6f fitted to %d completions (tokens: %s)", gamma, len(rollouts), shown)
    return gamma, fit


def make_length_value_model(
    model_or_path: PreTrainedModel | str | os.PathLike,
    rollouts: Dataset,
    metadata: RolloutMetadata,
    args: LengthValueTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> LengthValueModel:
    """A length value model that is ready to be fitted: a backbone with a new head, gamma, and where both come from.

    Args:
        model_or_path (`PreTrainedModel` or `str`): the backbone, as `LengthValueModel.from_backbone` takes it.
        rollouts (`datasets.Dataset`): the completions that will be fitted on.
        metadata (`RolloutMetadata`): where they come from.
        args (`LengthValueTrainingArguments`): `gamma`, or how to fit it.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's; must be the one that the rollouts were sampled with.
    """
    check_same_tokenizer(
        tokenizer, metadata.tokenizer_fingerprint, ours_name="the backbone", theirs_name="the generator of the rollouts"
    )
    gamma, fit = fit_gamma_to_rollouts(rollouts, args.gamma_quantile, args.gamma_coverage)
    if args.gamma is not None:
        gamma, fit = args.gamma, {**fit, "quantile": None, "coverage": None}
        logger.info("gamma %.6f is used as given", gamma)
    return LengthValueModel.from_backbone(
        model_or_path,
        gamma=gamma,
        tokenizer=tokenizer,
        gamma_fit=fit,
        generator=metadata.generator,
        sampling=metadata.sampling,
        truncated_share=metadata.truncated_share,
        form=args.form,
        layers=args.layers,
        dtype=args.frozen_dtype if args.form != FULL and isinstance(model_or_path, (str, os.PathLike)) else None,
    )


class LengthValueTrainer(Trainer):
    """`transformers.Trainer` for a [`LengthValueModel`]: mean over tokens of the squared error of the value.

    The mean runs over all states of an optimizer step: its gradient does not depend on how the step is split into
    micro-batches and processes, nor on packing and padding. Steps are drawn at random from all completions (with
    `share_prompts`, from all prompts); where sequences are padded, a step is sorted into micro-batches.

    Args:
        model ([`LengthValueModel`]): what to fit; its config holds gamma.
        args ([`LengthValueTrainingArguments`]): how.
        train_dataset, eval_dataset (`datasets.Dataset`, *optional*): rollouts, see [`prepare_rollouts`]. The evaluation
            gives the metrics of [`~lenvm_rl.pretraining.length_value_metrics`].
        kwargs: further arguments of `transformers.Trainer`.
    """

    def __init__(
        self,
        model: LengthValueModel,
        args: LengthValueTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        if not isinstance(model, LengthValueModel):
            raise ValueError(
                f"LengthValueTrainer fits a LengthValueModel, not a {type(model).__name__}: make one with "
                "`LengthValueModel.from_backbone(model, gamma=...)`."
            )
        if args.n_gpu > 1:
            raise ValueError("One process per GPU is needed: start with `accelerate launch` or `torchrun`.")
        for dataset in (train_dataset, eval_dataset):
            if dataset is not None:
                check_fits(model, dataset)
        self._domain_of = {}
        if args.domain_column is not None and eval_dataset is not None:
            self._domain_of = domains_of_prompts(eval_dataset, args.domain_column)
        self._keeps_states = model.config.form == HEAD and args.cache_hidden_states
        self._read = with_rows if self._keeps_states else partial(Dataset.select_columns, column_names=COLUMNS)
        super().__init__(
            model=model,
            args=args,
            train_dataset=None if train_dataset is None else self._read(train_dataset),
            eval_dataset=None if eval_dataset is None else self._read(eval_dataset),
            **{
                "data_collator": _make_collator(model, args),
                "compute_loss_func": self._token_mean_loss,
                "compute_metrics": self._summarize,
                **kwargs,
            },
        )
        check_precision(args, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        # Otherwise the Trainer hands num_items_in_batch to the backbone as well.
        self.model_accepts_loss_kwargs = False

    def train(self, *args, **kwargs):
        """As in `Trainer`; with several processes `evaluate` must not come first."""
        replicated = self.accelerator.distributed_type in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        # The Trainer prepares a model once: after an evaluation, it would train without synchronising gradients.
        if replicated and any(model is self.model for model in self.accelerator._models):
            raise ValueError(
                "evaluate() before train() would leave the processes without gradient synchronisation: set "
                "eval_on_start=True instead, or make a new trainer."
            )
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; for a head alone, the backbone has its say before."""
        with self._collating_states(self.train_dataset, "train"):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As in `Trainer`; for a head alone, the backbone has its say before."""
        if isinstance(eval_dataset, Dataset) and eval_dataset is not self.eval_dataset:
            check_fits(self._unwrapped, eval_dataset)
            eval_dataset = self._read(eval_dataset)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        with self._collating_states(dataset, "eval"):
            return super().get_eval_dataloader(eval_dataset)

    @contextmanager
    def _collating_states(self, dataset: Dataset | None, name: str) -> Iterator[None]:
        """Inside, data loaders read hidden states of a dataset, which are computed first, each process its share."""
        if not self._keeps_states or dataset is None:
            yield
            return
        model, args = self._unwrapped, self.args
        about = {"rollouts": fingerprint(dataset), "dtype": str(model.backbone.dtype), "decoder": decoder_digest(model)}
        about["layers"] = model.config.layers
        place = os.path.join(args.output_dir, FILE.format(name))
        part = {"process": args.process_index, "processes": args.world_size}
        states = HiddenStates(place, dataset, model.head.hidden.in_features, args.truncated, about, **part)
        collate, progress = _make_plain_collator(model, args), not args.disable_tqdm and args.process_index == 0
        states.fill(model, collate, args.eval_batch_size, progress)
        self.accelerator.wait_for_everyone()
        states.check_whole()
        kept, self.data_collator = self.data_collator, HiddenStateCollator(states)
        try:
            yield
        finally:
            self.data_collator = kept

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As in `Trainer`, which counts the items of the optimizer step and corrects for the number of processes."""
        self._endings = inputs["endings"]
        inputs = {**model_inputs(inputs, self._unwrapped), "labels": inputs["labels"]}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _token_mean_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        values = outputs.values
        targets = value_targets(values, labels, self._endings, self._gamma, self.args.lam)
        loss = length_value_loss(values, targets, labels != IGNORED, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"The loss is {loss.item()} after {self.state.global_step} steps: lower the learning rate, or look for "
                "infinite weights in the backbone."
            )
        return loss

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or (self.args.packing and not self.args.share_prompts):
            return super()._get_train_sampler(train_dataset)
        forward = self.args.train_batch_size * self.args.world_size
        return StepSampler(
            sequence_lengths(dataset),
            forward * self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
            groups=dataset["group"][:] if self.args.share_prompts else None,
            multiple=forward if self.args.world_size > 1 and not self.args.dataloader_drop_last else 1,
        )

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | list[int] | None:
        if self.args.packing:
            return super()._get_eval_sampler(eval_dataset)
        return longest_first(sequence_lengths(eval_dataset))

    @property
    def _unwrapped(self) -> LengthValueModel:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _gamma(self) -> float:
        return self._unwrapped.config.gamma

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """One row of statistics per completion instead of logits, so that nothing padded crosses processes."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            if prediction_loss_only:
                return loss, None, None
            row_of, first, lengths, finished, groups, prompts = inputs["sequences"].unbind(1)
            gamma, logits, lam = self._gamma, outputs.logits, self.args.lam
            targets = value_targets(outputs.values, inputs["labels"], inputs["endings"], gamma, lam)
            logits, targets = (unpack(each, row_of, first, lengths) for each in (logits, targets))
            statistics = sequence_statistics(logits, lengths, finished, gamma, targets)
        return loss, statistics, torch.stack([lengths, finished, groups, prompts], dim=1)

    def _summarize(self, prediction: EvalPrediction) -> dict[str, float]:
        labels, statistics = torch.from_numpy(prediction.label_ids), torch.from_numpy(prediction.predictions)
        return {
            **self._metrics_of(statistics, labels),
            **domain_metrics(self._metrics_of, statistics, labels, self._domain_of),
        }

    def _metrics_of(self, statistics: Tensor, labels: Tensor) -> dict[str, float]:
        lengths, finished, groups, prompts = labels.unbind(1)
        metrics = summarize(statistics, lengths, finished, groups, self._gamma)
        return {**metrics, **reference_metrics(lengths, prompts, finished, groups, self._gamma)}


def _make_collator(
    model: LengthValueModel, args: LengthValueTrainingArguments
) -> LengthValueCollator | SharedPromptCollator:
    """The collator that the arguments ask for, once the backbone is known to bear it."""
    if args.share_prompts:
        check_sharing(model)
        return SharedPromptCollator(truncated=args.truncated, row_length=args.row_length)
    if args.packing:
        check_isolation(model)
    return _make_plain_collator(model, args)


def _make_plain_collator(model: LengthValueModel, args: LengthValueTrainingArguments) -> LengthValueCollator:
    """The collator of completions that share nothing."""
    return LengthValueCollator(
        truncated=args.truncated,
        packing=args.packing,
        row_length=args.row_length,
        flatten="flash" in model.backbone.config._attn_implementation,
    )


def pretrain(
    model_or_path: PreTrainedModel | str | os.PathLike,
    rollouts: Dataset,
    metadata: RolloutMetadata,
    args: LengthValueTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    eval_rollouts: Dataset | None = None,
    callbacks: list[TrainerCallback] | None = None,
    resume: bool = False,
) -> tuple[LengthValueModel, dict[str, float]]:
    """Pretrains a length value model and saves it, with its tokenizer, in `args.output_dir`.

    Args:
        model_or_path (`PreTrainedModel` or `str`): the backbone, as `LengthValueModel.from_backbone` takes it.
        rollouts (`datasets.Dataset`), metadata (`RolloutMetadata`): as `read_rollouts` gives them.
        args (`LengthValueTrainingArguments`): how to train; a `resume_from_checkpoint` is obeyed. Metrics also go to
            `metrics.jsonl` in `args.output_dir`.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's; must be the one of the rollouts.
        eval_rollouts (`datasets.Dataset`, *optional*): held-out prompts (see `split_by_prompt`), evaluated at the end.
        callbacks (`list[TrainerCallback]`, *optional*): given to the trainer.
        resume (`bool`, *optional*, defaults to `False`): go on from the last checkpoint in `args.output_dir`, if any.
            A checkpoint there is refused without it, and so is one of a run with other settings or rollouts.

    Returns:
        `tuple[LengthValueModel, dict[str, float]]`: the model in eval mode, and the metrics of the evaluation (empty
        without `eval_rollouts`).
    """
    checkpoint = find_checkpoint(args, resume)
    set_seed(args.seed)  # the head's first weights are drawn before the Trainer sets the seed
    train = prepare_rollouts(rollouts, args)
    model = make_length_value_model(model_or_path, train, metadata, args, tokenizer)
    trainer = LengthValueTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=None if eval_rollouts is None else prepare_rollouts(eval_rollouts, args, held_out=True),
        processing_class=tokenizer,
        callbacks=[MetricsFile(), *(callbacks or [])],
    )
    settings = settings_of(args, model, train)
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
        check_resumed(os.path.dirname(checkpoint), settings)
    elif trainer.is_world_process_zero():
        write_json(os.path.join(args.output_dir, RECORD), settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if eval_rollouts is not None else {}
    if metrics:
        trainer.accelerator.unwrap_model(trainer.model).config.metrics = metrics_for_card(metrics)
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        # Large, and of no use to those who read the model.
        remove_hidden_states(args.output_dir)
    return trainer.accelerator.unwrap_model(trainer.model).eval(), metrics
