"""Accuracy against length: base policy, hard truncation, tilted decoding and trained policies on the same prompts.

    python -m eval.tradeoff                                   # what recipes/ppo_shaped.py left in outputs/sandbox
    python -m eval.tradeoff --run_dir outputs/mine --dataset_name test.jsonl    # a run on data of your own
    python -m eval.tradeoff --run_dir outputs/mine --task math500 --dataset_name math500_test.json

Prints one table and writes tradeoff.json, .csv and .png. Every arm uses the same prompts, the same candidate rule and
the same length: tokens without end-of-sequence. Intervals are 95 % bootstraps over prompts. A task adds two baselines,
the budget asked for in the prompt and the shortest of several samples (its cost is in "sampled tokens"); other data has
them by --prompt_only and --best_of. "KL to base" is how far an arm is from the base policy, see `eval.tradeoff_kl`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from eval.figures import plot_tradeoff
from eval.tradeoff_arguments import TradeoffArguments, read_run
from eval.tradeoff_arms import collect_arms
from eval.tradeoff_report import print_table, summarise, write_csv
from lenvm_rl.rollouts import atomic_file
from lenvm_rl.sandbox import DIFFICULTIES


def main(args: TradeoffArguments) -> list[dict[str, Any]]:
    """Sample, grade, print and write the comparison."""
    transformers_logging.set_verbosity_error()
    if args.dataset_name is None:
        # For models of the sandbox's size one thread is as fast as two, and the numbers do not depend on the cores.
        torch.set_num_threads(1)
    comparison = read_run(args)
    args = comparison.args
    arms, unit, frontier = collect_arms(comparison)
    rows = [summarise(arm, frontier, comparison.difficulties, args.seed) for arm in arms]
    output_dir = Path(args.output_dir or Path(args.run_dir) / "tradeoff")
    output_dir.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"arguments": asdict(args), "strength_unit": unit, "arms": rows}
    if frontier is not None:
        report["style_frontier"] = {
            "tokens": frontier.tokens.tolist(),
            "accuracy": frontier.accuracies.tolist(),
            "floors": {str(difficulty): floor for difficulty, floor in frontier.floors.items()},
            "points": {str(difficulty): styles for difficulty, styles in frontier.points.items()},
        }
    with atomic_file(output_dir / "tradeoff.json") as file:
        file.write(json.dumps(report, indent=1, allow_nan=False).encode())
    write_csv(rows, output_dir / "tradeoff.csv")
    plot_tradeoff(rows, frontier, output_dir / "tradeoff.png")
    console = Console(width=190)
    rule = f"temperature {args.temperature:g}, top-k {args.top_k}, top-p {args.top_p:g}, min-p {args.min_p:g}"
    prompts = (
        f"{len(comparison.prompts)} prompts x {args.num_samples} completions of at most {args.max_new_tokens} tokens"
    )
    print_table(rows, f"{prompts}; {rule}; seed {args.seed}", console)
    if frontier is not None:
        described = ", ".join(f"{frontier.floors[d]:.0f} at {d} operations" for d in DIFFICULTIES)
        console.print(f"Fewest tokens of a style that is good enough: {described}.")
    console.print(
        f"Tilt strengths are in units of 1/std(V) = {unit:.2f}; KL is in nats for each completion. Written to "
        f"{output_dir}/tradeoff.json, .csv and .png"
    )
    return rows


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(HfArgumentParser(TradeoffArguments).parse_args_into_dataclasses()[0])
