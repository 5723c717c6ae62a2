"""Latency of requests that wait for vLLM, in the order of their predicted lengths: shortest predicted first.

All requests are there at the start and share `places` places. They are served first come, first served; by vLLM's own
priorities (`--scheduling-policy priority`) with the length that the length value model predicts at the prompt; and with
the length that they turn out to have, which nobody knows: the best that predictions can do. Each request has a seed of
its own, so that it writes the same in any order. Latency is processor time, from the start to a request's last token.

    .venv-vllm/bin/python -m eval.speed queue --model MODEL --length_value_model LENVM --dataset_name prompts.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from transformers.hf_argparser import HfArg

from eval.engine import engine_in_process
from eval.report import Column, print_table
from eval.speed.harness import now
from eval.statistics import percentile_interval
from lenvm_rl.modeling.loading import load_length_value_model, load_tokenizer
from lenvm_rl.prediction import predict_length
from lenvm_rl.tokenization import as_chats, load_prompts, tokenize_prompts

FIRST_COME, PREDICTED, ORACLE = "first come, first served", "shortest predicted first", "shortest first (oracle)"
RESAMPLES = 2000


@dataclass
class QueueArguments:
    """Whose requests wait, and how they are served."""

    model: str = HfArg(help="The policy: folder or hub id.")
    length_value_model: str = HfArg(help="Length value model: folder or hub id.")
    dataset_name: str = HfArg(
        help="Prompts that the length value model was not fitted on, column prompt; of equal ones the first counts, so "
        "held_out.jsonl of its folder will do."
    )
    base: str | None = HfArg(
        default=None, help="What a length value model of form adapter or head was fitted on. Default: --model."
    )
    chat: bool = HfArg(default=False, help="Wrap text prompts as a user's message.")
    requests: int = HfArg(default=128, help="Requests: so many of the prompts, in an order drawn anew.")
    places: int = HfArg(default=16, help="Requests that are served at the same time (max_num_seqs).")
    max_tokens: int = HfArg(default=512, help="Most tokens of a completion.")
    temperature: float = HfArg(default=0.7, help="Temperature of the sampling.")
    dtype: str = HfArg(default="float32", help="Dtype of the policy.")
    seed: int = HfArg(default=0, help="Seed of the order of arrival, of sampling and bootstrap.")


def read_requests(args: QueueArguments) -> list[Any]:
    """The different prompts of the data set, `requests` of them at most, in the order of their arrival."""
    different = list({repr(prompt): prompt for prompt in load_prompts(args.dataset_name)["prompt"][:]}.values())
    order = np.random.default_rng(args.seed).permutation(len(different))[: args.requests]
    chosen = [different[place] for place in order.tolist()]
    return as_chats(chosen) if args.chat else chosen


def serve_all(llm: Any, prompts: Sequence[list[int]], priorities: Sequence[int], args: QueueArguments) -> np.ndarray:
    """Serves all requests; for each its latency in seconds and its tokens, `(N, 2)`."""
    vllm = engine_in_process()
    engine, served = llm.llm_engine, np.zeros((len(prompts), 2))
    start = now()
    for number, (ids, priority) in enumerate(zip(prompts, priorities, strict=True)):
        params = vllm.SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed + number)
        engine.add_request(str(number), {"prompt_token_ids": ids}, params, priority=priority)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                served[int(output.request_id.split("-")[0])] = now() - start, len(output.outputs[0].token_ids)
    return served


def make_rows(latencies: dict[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """A row for each order: mean and 95th percentile of the latency, and the mean over first come, first served, with
    bootstrap intervals over requests."""
    drawn = np.random.default_rng(seed).integers(0, len(latencies[FIRST_COME]), (RESAMPLES, len(latencies[FIRST_COME])))
    means = {name: each[drawn].mean(axis=1) for name, each in latencies.items()}
    rows = []
    for name, each in latencies.items():
        ratio = each.mean() / latencies[FIRST_COME].mean()
        rows.append(
            {
                "order": name,
                "mean": float(each.mean()),
                "tail": float(np.quantile(each, 0.95)),
                "ratio": percentile_interval(ratio, means[name] / means[FIRST_COME]) if name != FIRST_COME else None,
            }
        )
    return rows


def main(args: QueueArguments) -> None:
    """Serves the queue in each order, and prints a table."""
    vllm = engine_in_process()
    tokenizer = load_tokenizer(args.model)
    prompts = read_requests(args)
    model = load_length_value_model(args.length_value_model, args.base or args.model, tokenizer=tokenizer)
    predicted = predict_length(model, tokenizer, prompts).tolist()
    ids = tokenize_prompts(tokenizer, prompts)
    llm = vllm.LLM(
        args.model,
        dtype=args.dtype,
        max_num_seqs=args.places,
        max_model_len=args.max_tokens + max(map(len, ids)),
        generation_config="vllm",
        enforce_eager=True,
        enable_prefix_caching=False,
        scheduling_policy="priority",
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(8192, args.max_tokens + max(map(len, ids))),
    )
    served = {FIRST_COME: serve_all(llm, ids, [0] * len(ids), args)}
    lengths = served[FIRST_COME][:, 1]
    served[PREDICTED] = serve_all(llm, ids, [round(each) for each in predicted], args)
    served[ORACLE] = serve_all(llm, ids, lengths.astype(int).tolist(), args)
    console = Console(width=140, highlight=False)
    order = np.corrcoef(np.argsort(np.argsort(predicted)), np.argsort(np.argsort(lengths)))[0, 1]
    same = [float(np.mean(each[:, 1] == lengths)) for each in served.values()]
    columns = [
        Column("order", "order"),
        Column("mean latency, s", "mean", 1),
        Column("95th percentile, s", "tail", 1),
        Column("mean, over first come", "ratio", 2),
    ]
    rows = make_rows({name: each[:, 0] for name, each in served.items()}, args.seed)
    print_table(
        console, rows, columns, f"{len(ids)} requests, {args.places} places, {lengths.mean():.0f} tokens on average"
    )
    console.print(f"Spearman's correlation of predicted and true lengths: {order:.2f}.")
    console.print(f"At least {min(same):.0%} of the completions have the same length in every order.")
