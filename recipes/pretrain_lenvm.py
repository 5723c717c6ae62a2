"""Pretrains a length value model on rollouts and evaluates it on held-out prompts.

    accelerate launch recipes/pretrain_lenvm.py --rollouts rollouts.jsonl --output_dir lenvm \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --per_device_train_batch_size 16 --gradient_accumulation_steps 8

The rollouts come from recipes/sample_rollouts.py. The model, in output_dir, is loaded with
`LengthValueModel.from_pretrained`; gamma is fitted to the rollouts unless it is given, and stored with the model. The
metrics of the held-out prompts are printed beside references on the same rollouts, which are kept in held_out.jsonl
for other evaluations. Every option of transformers' TrainingArguments is available, such as `--report_to wandb`.

Several GPUs take one of recipes/accelerate_configs, before the recipe on the command line:

    --config_file recipes/accelerate_configs/ddp.yaml              one copy of the model per GPU
    --config_file recipes/accelerate_configs/fsdp2.yaml            sharded, for a backbone that does not fit on one GPU
    --config_file recipes/accelerate_configs/deepspeed_zero2.yaml  sharded optimizer state and gradients (DeepSpeed)
    --config_file recipes/accelerate_configs/single_process.yaml   one process, on the GPU if there is one
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers.hf_argparser import HfArg

from lenvm_rl.modeling.loading import load_tokenizer
from lenvm_rl.modeling.sharing import FULL
from lenvm_rl.pretraining.trainer import LengthValueTrainingArguments, pretrain
from lenvm_rl.programs import ProgramParser, run_program
from lenvm_rl.rollouts.record import read_rollout_files, read_rollouts, split_by_prompt, write_rollouts
from lenvm_rl.tokenization import check_same_tokenizer
from recipes.stage_records import say_next

logger = logging.getLogger(__name__)

# Where the rollouts of held-out prompts are kept, for other evaluations of the model.
HELD_OUT = "held_out.jsonl"

INTERRUPTED = "Interrupted. The same command with --resume true goes on from the last checkpoint, if one was saved."

# Rows of the table, and for each of its columns the metric (without `eval_`) that stands there.
COLUMNS = ("MAE, tokens", "MRE", "MRE, return-consistent", "MRE, half of the samples")
ROWS = {
    "this model": ("length_mae_at_0", "length_mre_at_0", "consistent_mre", "half_mre"),
    "mean of all": ("reference_mean_length_mae", "reference_mean_length_mre", "reference_mean_consistent_mre", None),
    "line on the prompt's tokens": (
        *(f"reference_regression_{name}" for name in ("length_mae", "length_mre", "consistent_mre")), None,
    ),
    "median of the prompt's own": ("reference_median_length_mae", None, None, None),
    "the other half of the samples": (None, None, None, "reference_half_mre"),
}  # fmt: skip


@dataclass
class PretrainArguments:
    """What to fit, and on what."""

    rollouts: list[str] = HfArg(
        help="The rollouts: a .jsonl or .parquet file with its .metadata.json beside it, or several of one policy."
    )
    model_name_or_path: str = HfArg(
        help="The backbone: a folder or a hub id of a decoder with the tokenizer of the rollouts, such as the "
        "policy itself or a smaller model of its family."
    )
    eval_rollouts: str | None = HfArg(
        default=None, help="Rollouts to evaluate on. If omitted, prompts are held out of the rollouts."
    )
    eval_share: float = HfArg(
        default=0.05, help="Share of the prompts to hold out without eval_rollouts; 0 for no evaluation."
    )
    resume: bool = HfArg(default=False, help="Go on from the last checkpoint in output_dir.")
    pad_token: str | None = HfArg(
        default=None, help="Pad token, for a tokenizer that has none or pads with its end-of-sequence token."
    )


def main(args: PretrainArguments, training_args: LengthValueTrainingArguments) -> dict[str, float]:
    """Reads the rollouts, pretrains, evaluates and saves; returns the metrics. The first process says what it does."""
    level = logging.INFO if training_args.process_index == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    rollouts, metadata = read_rollout_files(args.rollouts)
    if args.eval_rollouts is not None:
        eval_rollouts, theirs = read_rollouts(args.eval_rollouts)
        names = {"ours_name": "the generator of the rollouts", "theirs_name": "the generator of eval_rollouts"}
        check_same_tokenizer(metadata.tokenizer_fingerprint, theirs.tokenizer_fingerprint, **names)
        if theirs.generator != metadata.generator:
            logger.warning("eval_rollouts are of %s, the rollouts of %s", theirs.generator, metadata.generator)
    elif args.eval_share > 0:
        rollouts, eval_rollouts = split_by_prompt(rollouts, args.eval_share, training_args.seed)
    else:
        eval_rollouts = None
    tokenizer = load_tokenizer(args.model_name_or_path, args.pad_token)
    _, metrics = pretrain(
        args.model_name_or_path,
        rollouts,
        metadata,
        training_args,
        tokenizer,
        eval_rollouts=eval_rollouts,
        resume=args.resume,
    )
    if args.eval_rollouts is None and eval_rollouts is not None and training_args.process_index == 0:
        write_rollouts(Path(training_args.output_dir) / HELD_OUT, eval_rollouts, metadata)
    if metrics and training_args.process_index == 0:
        print_comparison(metrics, Console(width=120))
    logger.info("saved in %s, with all metrics in its metrics.jsonl and its model card", training_args.output_dir)
    shared = ["--base", args.model_name_or_path] if training_args.form != FULL else []
    model = ("--length_value_model", training_args.output_dir)
    say_next("python", "-m", "eval.viewer", "--rollouts", args.rollouts[0], *model, *shared)
    train = ("accelerate", "launch", "recipes/ppo_shaped.py", "--model_name_or_path", metadata.generator, *model)
    data = ("--dataset_name", "DATA", "--reward_funcs", "MODULE.FUNCTION", "--output_dir", "RUN")
    # What shares its decoder needs one that stays frozen: the base under adapters.
    adapters = ["--use_peft", "true"] if training_args.form != FULL else []
    say_next(*train, "--length_coef", "3", *adapters, *data)
    return metrics


def print_comparison(metrics: dict[str, float], console: Console) -> None:
    """Prints the errors at the prompt beside the references, and what they say (see docs/metrics.md)."""
    table = Table(title="length predicted at the prompt, held-out prompts")
    table.add_column("predictor")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for name, entries in ROWS.items():
        values = [math.nan if entry is None else metrics[f"eval_{entry}"] for entry in entries]
        table.add_row(name, *("–" if math.isnan(value) else f"{value:.3f}" for value in values))
    console.print(table)
    halves, samples = int(metrics["eval_reference_half_prompts"]), metrics["eval_reference_half_samples"]
    if not halves:
        console.print("No prompt has two or more completions and none cut: how far lengths are known is not known.")
        return
    noise = metrics["eval_reference_half_mre"]
    ratio = metrics["eval_half_mre"] / noise if noise else math.nan
    console.print(
        f"MRE at the prompt over the noise between halves: {ratio:.2f} ({halves} prompts, halves of {samples:.1f} "
        "completions; an exact model has about 0.7)."
    )
    explained, ceiling = (metrics[f"eval_prompt_explained_{name}"] for name in ("variance", "ceiling"))
    console.print(
        f"Between-prompt variance of the return explained at the prompt: {explained:.3f}, by an exact model about "
        f"{ceiling:.3f}."
    )


def make_parser() -> ProgramParser:
    """The command line: every field of the two argument classes, also read from YAML with `--config`."""
    return ProgramParser(
        (PretrainArguments, LengthValueTrainingArguments),
        usage="accelerate launch recipes/pretrain_lenvm.py --rollouts FILE --model_name_or_path PATH --output_dir DIR",
        description=__doc__.partition("\n")[0],
    )


if __name__ == "__main__":
    run_program(lambda: main(*make_parser().parse_args_and_config()), INTERRUPTED)
