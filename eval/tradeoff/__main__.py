"""Accuracy against length: base policy, hard truncation, tilted decoding and trained policies on the same prompts.

    python -m eval.tradeoff                                   # what recipes/ppo_shaped.py left in outputs/sandbox
    python -m eval.tradeoff --run_dir outputs/mine --dataset_name test.jsonl    # a run on data of your own
    python -m eval.tradeoff --run_dir outputs/mine --task math500 --dataset_name math500_test.json
    python -m eval.tradeoff --policy MODEL --length_value_model LENVM --task gsm8k --dataset_name gsm8k_test.jsonl

Prints one table and writes tradeoff.json, .csv and .png, and samples/, with which an interrupted comparison goes on.
Every arm uses the same prompts, the same candidate rule and the same length: tokens without end-of-sequence. Intervals
are 95 % bootstraps over prompts. A task adds two baselines, the budget asked for in the prompt and the shortest of
several samples (its cost is in "sampled tokens"); other data has them by --prompt_only and --best_of. The figure's last
panel, and "within_budget" of the JSON, say how many answers of each arm are right where every completion is cut off
after so many tokens. "KL to base" is how far an arm is from the base policy, see `eval.tradeoff.sampler`; with
`--backend vllm` it is not known, for a logits processor hands nothing back.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from eval.graded import read_run
from eval.report import print_table, save_report
from eval.runs import OUTPUTS, output_folder, run_evaluation, set_threads
from eval.tradeoff.arms import TradeoffArguments, collect_arms
from eval.tradeoff.report import budget_remark, plot_tradeoff, remarks, summarise_arm, table_columns

# What a comparison is about: results about others are not written over.
MODELS = ("policy", "length_value_model", "trained")


def main(args: TradeoffArguments) -> list[dict[str, Any]]:
    """Sample, grade, print and write the comparison."""
    transformers_logging.set_verbosity_error()
    set_threads(sandbox=args.dataset_name is None)
    args, source = read_run(args)
    data = args.load_prompts(args.num_prompts)
    args = args.as_fitted()
    default = Path(source.folder or OUTPUTS) / "tradeoff"
    output_dir = output_folder(args.output_dir, default, "tradeoff.json", asdict(args), MODELS)
    arms, unit, frontier, curves = collect_arms(args, source, data, output_dir)
    rows = [summarise_arm(arm, frontier, data.difficulties, args.seed) for arm in arms]
    report: dict[str, Any] = {"arguments": asdict(args), "strength_unit": unit, "arms": rows}
    report["within_budget"] = curves
    if frontier is not None:
        report["style_frontier"] = {
            "tokens": frontier.tokens.tolist(),
            "accuracy": frontier.accuracies.tolist(),
            "floors": {str(difficulty): floor for difficulty, floor in frontier.floors.items()},
            "points": {str(difficulty): styles for difficulty, styles in frontier.points.items()},
        }
    save_report(output_dir, "tradeoff", report, rows)
    plot_tradeoff(rows, frontier, output_dir / "tradeoff.png", curves)
    console = Console(width=190)
    count = f"{len(data.prompts)} prompts x {args.num_samples} completions of at most {args.max_new_tokens} tokens"
    title = f"{count}; {args.candidate_text}"
    print_table(console, rows, table_columns(rows), title, sections=lambda row: row["name"] == "base")
    if frontier is not None:
        described = ", ".join(f"{floor:.0f} at {d} operations" for d, floor in sorted(frontier.floors.items()))
        console.print(f"Fewest tokens of a style that is good enough: {described}.")
    for remark in [*remarks(rows, len(data.prompts), args.max_new_tokens), *budget_remark(rows, curves)]:
        console.print(remark)
    console.print(
        f"Tilt strengths are in units of 1/std(V) = {unit:.2f}; KL is in nats for each completion. Written to "
        f"{output_dir}/tradeoff.json, .csv and .png"
    )
    return rows


if __name__ == "__main__":
    run_evaluation(TradeoffArguments, main, "eval.tradeoff", __doc__)
