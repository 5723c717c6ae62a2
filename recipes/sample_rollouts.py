"""Samples completions from a policy into a rollout file, the input of recipes/pretrain_lenvm.py.

    python recipes/sample_rollouts.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output rollouts.jsonl \
        --dataset_name openai/gsm8k --dataset_config main --prompt_column question --keep_columns answer --chat

Killed and started again with the same arguments, it goes on where it was and ends with the records of an unbroken run.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from lenvm_rl.sampling import SamplingSettings, load_prompts, sample_to_file

logger = logging.getLogger(__name__)


@dataclass
class SampleArguments:
    """What to sample, from whom, and where to."""

    model_name_or_path: str = field(metadata={"help": "The policy: a folder or a hub id of a causal language model."})
    dataset_name: str = field(
        metadata={"help": "The prompts: a local .jsonl, .json, .parquet or .csv file, or the hub id of a data set."}
    )
    output: str = field(metadata={"help": "The rollout file to write: a path that ends in .jsonl or .parquet."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set from the hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a data set from the hub."})
    prompt_column: str = field(
        default="prompt", metadata={"help": "Column of the prompts: text, or lists of messages."}
    )
    keep_columns: list[str] = field(
        default_factory=list, metadata={"help": "Further columns to keep with every completion, e.g. the answer."}
    )
    limit: int | None = field(default=None, metadata={"help": "Use only the first so many prompts."})
    chat: bool = field(
        default=False, metadata={"help": "Put a text prompt into a user message, so that the chat template is applied."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "A system message before it (with --chat)."})
    num_samples: int = field(default=4, metadata={"help": "Completions per prompt."})
    max_new_tokens: int = field(
        default=1024, metadata={"help": "Most tokens per completion; a longer one is cut and marked as truncated."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 keeps every token."})
    top_k: int = field(
        default=0, metadata={"help": "Keep only so many of the most probable tokens; 0 keeps every one."}
    )
    batch_size: int = field(default=64, metadata={"help": "Completions generated at once."})
    seed: int = field(default=0, metadata={"help": "Seed; the same arguments give the same rollouts."})
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Pad token, for a tokenizer that has none or pads with its end-of-sequence token."},
    )
    dtype: str = field(default="float32", metadata={"help": "Dtype of the policy's weights, e.g. bfloat16 on a GPU."})
    device: str | None = field(
        default=None, metadata={"help": "Device, e.g. cuda:1. If omitted, a GPU if there is one."}
    )


def make_prompts(column: list, chat: bool, system_prompt: str | None) -> list:
    """Prompts as they are, or each text as a user message after the system prompt."""
    if not chat:
        if system_prompt is not None:
            raise ValueError("system_prompt needs --chat: without messages there is no place for it.")
        return column
    if not all(isinstance(prompt, str) for prompt in column):
        raise ValueError("--chat is for prompts of text; these are messages already, leave it out.")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [[*system, {"role": "user", "content": prompt}] for prompt in column]


def main(args: SampleArguments) -> None:
    """Loads prompts and policy, and samples."""
    dataset = load_prompts(args.dataset_name, args.dataset_config, args.dataset_split, args.limit)
    missing = {args.prompt_column, *args.keep_columns} - set(dataset.column_names)
    if missing:
        raise ValueError(f"{args.dataset_name} has no column {sorted(missing)}; it has {dataset.column_names}.")
    device = args.device or torch.accelerator.current_accelerator() or "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if args.pad_token is not None:
        tokenizer.pad_token = args.pad_token
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype).to(device)
    settings = SamplingSettings(
        num_samples=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
    )
    rollouts, metadata = sample_to_file(
        args.output,
        model,
        tokenizer,
        make_prompts(dataset[args.prompt_column][:], args.chat, args.system_prompt),
        settings,
        seed=args.seed,
        extra_columns={name: dataset[name][:] for name in args.keep_columns},
        generator=args.model_name_or_path,
    )
    lengths = sorted(len(ids) for ids in rollouts["completion_ids"][:])
    logger.info(
        "%s: %d completions of %d prompts, %.1f%% truncated, median %d tokens, longest %d",
        args.output,
        len(rollouts),
        metadata.num_prompts,
        100 * metadata.truncated_share,
        lengths[len(lengths) // 2],
        lengths[-1],
    )


def make_parser() -> TrlParser:
    """The command line: every field of [`SampleArguments`], also read from YAML with `--config`."""
    return TrlParser(
        SampleArguments,
        usage="python recipes/sample_rollouts.py --model_name_or_path PATH --dataset_name FILE_OR_ID --output FILE ...",
        description=__doc__.partition("\n")[0],
        epilog="--config FILE reads any of these options from YAML; the command line overrides it.",
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*make_parser().parse_args_and_config())
