"""Accuracy against length: base policy, hard truncation, tilted decoding and trained policies on the same prompts.

    python -m eval.tradeoff                                   # what recipes/ppo_shaped.py left in outputs/sandbox
    python -m eval.tradeoff --run_dir outputs/mine --dataset_name test.jsonl    # a run on data of your own
    python -m eval.tradeoff --run_dir outputs/mine --task math500 --dataset_name math500_test.json
    python -m eval.tradeoff --policy MODEL --length_value_model LENVM --task gsm8k --dataset_name gsm8k_test.jsonl

Prints one table and writes tradeoff.json, .csv and .png, and samples/, with which an interrupted comparison goes on.
Every arm uses the same prompts, the same candidate rule and the same length: tokens without end-of-sequence. Intervals
are 95 % bootstraps over prompts. A task adds two baselines, the budget asked for in the prompt and the shortest of
several samples (its cost is in "sampled tokens"); other data has them by --prompt_only and --best_of. "KL to base" is
how far an arm is from the base policy, see `eval.tradeoff.divergence`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from eval.command_line import run
from eval.report import save_csv, save_json
from eval.runs import OUTPUTS, output_folder, set_threads
from eval.tradeoff.arguments import TradeoffArguments, read_run, sampled_as_fitted
from eval.tradeoff.arms import collect_arms
from eval.tradeoff.report import plot_tradeoff, print_table, remarks, summarise

# What a comparison is about: results about others are not written over.
MODELS = ("policy", "length_value_model", "trained")


def main(args: TradeoffArguments) -> list[dict[str, Any]]:
    """Sample, grade, print and write the comparison."""
    transformers_logging.set_verbosity_error()
    set_threads(sandbox=args.dataset_name is None)
    comparison = read_run(args)
    args = comparison.args = sampled_as_fitted(comparison.args)
    default = Path(comparison.run.folder or OUTPUTS) / "tradeoff"
    output_dir = output_folder(args.output_dir, default, "tradeoff.json", asdict(args), MODELS)
    arms, unit, frontier = collect_arms(comparison, output_dir)
    rows = [summarise(arm, frontier, comparison.difficulties, args.seed) for arm in arms]
    report: dict[str, Any] = {"arguments": asdict(args), "strength_unit": unit, "arms": rows}
    if frontier is not None:
        report["style_frontier"] = {
            "tokens": frontier.tokens.tolist(),
            "accuracy": frontier.accuracies.tolist(),
            "floors": {str(difficulty): floor for difficulty, floor in frontier.floors.items()},
            "points": {str(difficulty): styles for difficulty, styles in frontier.points.items()},
        }
    save_json(output_dir / "tradeoff.json", report)
    save_csv(output_dir / "tradeoff.csv", rows)
    plot_tradeoff(rows, frontier, output_dir / "tradeoff.png")
    console = Console(width=190)
    rule = f"temperature {args.temperature:g}, top-k {args.top_k}, top-p {args.top_p:g}, min-p {args.min_p:g}"
    prompts = (
        f"{len(comparison.prompts)} prompts x {args.num_samples} completions of at most {args.max_new_tokens} tokens"
    )
    print_table(rows, f"{prompts}; {rule}; seed {args.seed}", console)
    if frontier is not None:
        described = ", ".join(f"{floor:.0f} at {d} operations" for d, floor in sorted(frontier.floors.items()))
        console.print(f"Fewest tokens of a style that is good enough: {described}.")
    for remark in remarks(rows, len(comparison.prompts), args.max_new_tokens):
        console.print(remark)
    console.print(
        f"Tilt strengths are in units of 1/std(V) = {unit:.2f}; KL is in nats for each completion. Written to "
        f"{output_dir}/tradeoff.json, .csv and .png"
    )
    return rows


if __name__ == "__main__":
    run(TradeoffArguments, main, "eval.tradeoff", __doc__)
