"""Samples completions from a policy into a rollout file, the input of recipes/pretrain_lenvm.py.

    python recipes/sample_rollouts.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output rollouts.jsonl \
        --dataset_name openai/gsm8k --dataset_config main --prompt_column question --keep_columns answer --chat

The policy runs in this process with transformers, or with vLLM (`--backend vllm`), or behind a server (`--backend
server --server_url http://localhost:8000/v1 --server_kind vllm`; vLLM, `transformers serve`, or any other with the
OpenAI completions endpoint).

With `--length_value_model PATH`, a length value model of the same tokenizer predicts each prompt's length and groups
prompts into batches by it, so that fewer rows wait for the longest of their batch (transformers only: servers and vLLM
fill a place as soon as it is free). How much that saves: `python -m eval.speed batching`.

Killed and started again with the same arguments, it goes on where it was and ends with the records of an unbroken run.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from lenvm_rl.endings import end_token_ids
from lenvm_rl.modeling.backbones import load_model
from lenvm_rl.modeling.loading import load_length_value_model, load_tokenizer
from lenvm_rl.programs import ProgramParser, run_program
from lenvm_rl.rollouts.job import SamplingJob, SamplingSettings, sample_to_file
from lenvm_rl.rollouts.local import TransformersJob
from lenvm_rl.rollouts.record import described
from lenvm_rl.rollouts.server import SERVERS, ServerJob, connect
from lenvm_rl.rollouts.vllm import VLLMJob, read_engine_arguments
from lenvm_rl.tokenization import as_chats, check_prompts, load_prompts
from recipes.arguments import DataArguments
from recipes.stage_records import PRETRAIN, say_next

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SampleArguments(DataArguments):
    """What to sample, from whom, and where to."""

    model_name_or_path: str = HfArg(
        help="The policy: a folder or a hub id of a causal language model. A server's is loaded there; here its "
        "tokenizer and its generation config are read."
    )
    dataset_name: str = HfArg(help="The prompts: a hub id or a .jsonl, .json, .parquet or .csv file.")
    output: str = HfArg(help="The rollout file to write: a path that ends in .jsonl or .parquet.")
    keep_columns: list[str] = HfArg(
        default_factory=list, help="Further columns to keep with every completion, e.g. the answer."
    )
    limit: int | None = HfArg(default=None, help="Use only the first so many prompts.")
    system_prompt: str | None = HfArg(default=None, help="A system message before it (with --chat).")
    seed: int = HfArg(
        default=0, help="Seed. The same arguments give the same rollouts, as far as a server or vLLM keeps to seeds."
    )
    backend: str = HfArg(
        default="transformers",
        help="Where the policy runs. transformers: in this process, with generate; vllm: in this process, with "
        "vLLM's engine (to be installed by itself); server: behind an HTTP server, see server_url.",
        metadata={"choices": ["transformers", "server", "vllm"]},
    )
    dtype: str = HfArg(default="float32", help="transformers: dtype of the policy's weights, e.g. bfloat16 on a GPU.")
    device: str | None = HfArg(
        default=None, help="transformers: device, e.g. cuda:1. If omitted, a GPU if there is one."
    )
    length_value_model: str | None = HfArg(
        default=None,
        help="transformers: a length value model (folder or hub id) by whose predicted lengths prompts are "
        "grouped into batches, longest first. Default: grouped by the prompt's own length.",
    )
    server_url: str | None = HfArg(
        default=None, help="server: base address with the API's version, e.g. http://localhost:8000/v1."
    )
    server_kind: str = HfArg(
        default="openai",
        help="server: what it is. vllm gives the sampled token ids; transformers and openai (any other with the OpenAI "
        "completions endpoint) give text, see retokenize.",
        metadata={"choices": list(SERVERS)},
    )
    server_model: str | None = HfArg(default=None, help="server: the model's name there. Default: model_name_or_path.")
    server_key_variable: str | None = HfArg(
        default=None, help="server: environment variable that holds the API key, if it wants one."
    )
    server_timeout: float = HfArg(default=600.0, help="server: seconds to wait for an answer.")
    server_retries: int = HfArg(default=8, help="server: times that a failed request is repeated.")
    retokenize: bool = HfArg(
        default=False,
        help="server: make token ids from the text where a server gives none. They can differ from what was "
        "sampled: the records say where, and the metadata how often.",
    )
    engine_arguments: str | None = HfArg(
        default=None, help="vllm: further arguments of vllm.LLM as JSON, e.g. '{\"tensor_parallel_size\": 2}'."
    )
    eos_token_ids: list[int] | None = HfArg(
        default=None,
        help="server, vllm: ids that end a completion. Default: what the tokenizer and the policy's generation config "
        "name. (transformers always takes these.)",
    )


def make_prompts(column: list, chat: bool, system_prompt: str | None) -> list:
    """Prompts as they are, or each text as a user message after the system prompt."""
    return as_chats(column, system_prompt) if chat else column


def find_eos_ids(args: SampleArguments, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion, for a policy that is not loaded here."""
    if args.eos_token_ids is not None:
        return args.eos_token_ids
    try:
        config = GenerationConfig.from_pretrained(args.model_name_or_path)
    except OSError as error:
        raise ValueError(
            f"{args.model_name_or_path} has no generation_config.json, so it is not known which tokens end a "
            f"completion: give --eos_token_ids (the tokenizer's is {tokenizer.eos_token_id})."
        ) from error
    return end_token_ids(tokenizer, config)


def transformers_job(
    args: SampleArguments, tokenizer: PreTrainedTokenizerBase, *given: Any, **options: Any
) -> SamplingJob:
    """A job in this process; the policy is loaded."""
    device = args.device or torch.accelerator.current_accelerator() or "cpu"
    model = load_model(AutoModelForCausalLM.from_pretrained, args.model_name_or_path, dtype=args.dtype).to(device)
    if args.length_value_model is not None:
        options["length_value_model"] = load_length_value_model(
            args.length_value_model, args.model_name_or_path, tokenizer=tokenizer, device=device, dtype=args.dtype
        )
    return TransformersJob(model, tokenizer, *given, **options)


def server_job(args: SampleArguments, tokenizer: PreTrainedTokenizerBase, *given: Any, **options: Any) -> SamplingJob:
    """A job for a server."""
    if args.server_url is None:
        raise ValueError("--backend server needs --server_url, e.g. http://localhost:8000/v1.")
    name = args.server_key_variable
    if name is not None and name not in os.environ:
        raise ValueError(f"The environment variable {name}, which should hold the server's API key, is not set.")
    server = connect(
        args.server_kind,
        args.server_url,
        args.server_model or args.model_name_or_path,
        api_key=None if name is None else os.environ[name],
        timeout=args.server_timeout,
        max_retries=args.server_retries,
    )
    options.update(eos_token_ids=find_eos_ids(args, tokenizer), retokenize=args.retokenize)
    return ServerJob(server, tokenizer, *given, **options)


def vllm_job(args: SampleArguments, tokenizer: PreTrainedTokenizerBase, *given: Any, **options: Any) -> SamplingJob:
    """A job for vLLM in this process."""
    engine = read_engine_arguments(args.engine_arguments)
    options["eos_token_ids"] = find_eos_ids(args, tokenizer)
    return VLLMJob(args.model_name_or_path, tokenizer, *given, engine_arguments=engine, **options)


JOBS = {"transformers": transformers_job, "server": server_job, "vllm": vllm_job}


def main(args: SampleArguments, settings: SamplingSettings) -> None:
    """Loads the prompts, and samples."""
    if args.length_value_model is not None and args.backend != "transformers":
        raise ValueError(
            f"--length_value_model makes the batches of --backend transformers; {args.backend} makes its own: leave "
            "it out."
        )
    if args.system_prompt is not None and not args.chat:
        raise ValueError("system_prompt needs --chat: without messages there is no place for it.")
    dataset = load_prompts(args.dataset_name, args.dataset_config, args.dataset_split, args.limit)
    missing = {args.prompt_column, *args.keep_columns} - set(dataset.column_names)
    if missing:
        raise ValueError(f"{args.dataset_name} has no column {sorted(missing)}; it has {dataset.column_names}.")
    tokenizer = load_tokenizer(args.model_name_or_path, args.pad_token)
    column = dataset[args.prompt_column][:]
    check_prompts(column, f"{args.dataset_name}, column {args.prompt_column!r}", tokenizer, args.chat)
    prompts = make_prompts(column, args.chat, args.system_prompt)
    columns = {name: dataset[name][:] for name in args.keep_columns}
    job = JOBS[args.backend](args, tokenizer, prompts, settings, seed=args.seed, extra_columns=columns)
    rollouts, metadata = sample_to_file(args.output, job, args.model_name_or_path)
    logger.info("%s: %s", args.output, described(rollouts, metadata))
    say_next(
        *PRETRAIN, "--rollouts", args.output, "--model_name_or_path", args.model_name_or_path, "--output_dir", "lenvm"
    )


def make_parser() -> ProgramParser:
    """The command line: every field of the two argument classes, also read from YAML with `--config`."""
    return ProgramParser(
        (SampleArguments, SamplingSettings),
        usage="python recipes/sample_rollouts.py --model_name_or_path PATH --dataset_name FILE_OR_ID --output FILE ...",
        description=__doc__.partition("\n")[0],
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_program(lambda: main(*make_parser().parse_args_and_config()))
