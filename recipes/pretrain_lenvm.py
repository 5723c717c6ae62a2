"""Pretrains a length value model on rollouts and evaluates it on held-out prompts.

    accelerate launch recipes/pretrain_lenvm.py --rollouts rollouts.jsonl --output_dir lenvm \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --per_device_train_batch_size 16 --gradient_accumulation_steps 8

The rollouts come from recipes/sample_rollouts.py. The model, in output_dir, is loaded with
`LengthValueModel.from_pretrained`; gamma is fitted to the rollouts unless it is given, and stored with the model. Every
option of transformers' TrainingArguments is available.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import TrlParser

from lenvm_rl.pretraining import LengthValueTrainingArguments, pretrain
from lenvm_rl.rollouts import read_rollouts, split_by_prompt

logger = logging.getLogger(__name__)


@dataclass
class PretrainArguments:
    """What to fit, and on what."""

    rollouts: str = field(
        metadata={"help": "The rollouts: a .jsonl or .parquet file with its .metadata.json beside it."}
    )
    model_name_or_path: str = field(
        metadata={
            "help": "The backbone: a folder or a hub id of a decoder with the tokenizer of the rollouts, such as the "
            "policy itself or a smaller model of its family."
        }
    )
    eval_rollouts: str | None = field(
        default=None, metadata={"help": "Rollouts to evaluate on. If omitted, prompts are held out of the rollouts."}
    )
    eval_share: float = field(
        default=0.05, metadata={"help": "Share of the prompts to hold out without eval_rollouts; 0 for no evaluation."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Pad token, for a tokenizer that has none or pads with its end-of-sequence token."},
    )


def main(args: PretrainArguments, training_args: LengthValueTrainingArguments) -> dict[str, float]:
    """Reads the rollouts, pretrains, evaluates and saves; returns the metrics."""
    rollouts, metadata = read_rollouts(args.rollouts)
    if args.eval_rollouts is not None:
        eval_rollouts, _ = read_rollouts(args.eval_rollouts)
    elif args.eval_share > 0:
        rollouts, eval_rollouts = split_by_prompt(rollouts, args.eval_share, training_args.seed)
    else:
        eval_rollouts = None
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if args.pad_token is not None:
        tokenizer.pad_token = args.pad_token
    _, metrics = pretrain(
        args.model_name_or_path,
        rollouts,
        metadata,
        training_args,
        tokenizer,
        eval_rollouts=eval_rollouts,
        resume=args.resume,
    )
    if metrics:
        logger.info("metrics on held-out prompts:\n%s", json.dumps(metrics, indent=2))
    logger.info("saved in %s", training_args.output_dir)
    return metrics


def make_parser() -> TrlParser:
    """The command line: every field of the two argument classes, also read from YAML with `--config`."""
    return TrlParser(
        (PretrainArguments, LengthValueTrainingArguments),
        usage="accelerate launch recipes/pretrain_lenvm.py --rollouts FILE --model_name_or_path PATH --output_dir DIR",
        description=__doc__.partition("\n")[0],
        epilog="--config FILE reads any of these options from YAML; the command line overrides it.",
    )


if __name__ == "__main__":
    script_args, training_args = make_parser().parse_args_and_config()
    level = logging.INFO if training_args.process_index == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    main(script_args, training_args)
