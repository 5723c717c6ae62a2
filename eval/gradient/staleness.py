"""How far a policy may move before its length value model misleads it: a line for each checkpoint of a training run.

    python recipes/grpo_shaped.py --output_dir outputs/seed_0 --trained_name drift --save_strategy steps --save_steps 10
    python -m eval.gradient.staleness --run_dir outputs/seed_0 --policies outputs/seed_0/drift/checkpoint-*

With lambda 1 a length value model is a mere baseline, so the expected gradient is right however stale the model is;
below, the advantage leans on V, and on a V of another policy it may lean the wrong way. For each policy `eval.gradient`
measures, on the same completions, the cosine of lambda below 1 to lambda 1, with the run's length value model and with
one that is pretrained on the policy itself with the same discount. Beside it stands how far the policy has moved: its
divergence from the base policy, and its mean tokens. What is measured is kept, so that the same command goes on.

Prints a table, and writes staleness.json, .csv and .png.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

from eval.gradient.__main__ import GradientArguments, complete, measure_gradients
from eval.gradient.estimators import LAMBDAS, LENVM_GRADIENT
from eval.gradient.gradients import TokenBatch, read_batches
from eval.gradient.sweep import pretrain_on
from eval.report import Column, draw_intervals, legend_below, print_table, save_figure, save_report
from eval.runs import find_run, run_evaluation, set_threads
from lenvm_rl.files import read_json, write_json
from lenvm_rl.modeling.completions import token_log_probs
from lenvm_rl.modeling.loading import load_policy, read_config
from lenvm_rl.rollouts.record import read_rollouts

logger = logging.getLogger(__name__)

NAMES = {lam: f"LenVM, lambda {lam:g}" for lam in LAMBDAS}
RESCALED = "LenVM rescaled, lambda 0.95"
# Prompts that a refitted length value model is pretrained on.
REFIT_PROMPTS = 256
FROM_RUN, REFITTED = "base", "refitted"


@dataclass
class StalenessArguments:
    """Which policies, on how many completions."""

    policies: list[str] = HfArg(help="Folders of policies along a training run, in their order.")
    run_dir: str | None = HfArg(
        default=None,
        help="Folder of a run on the sandbox: its base policy and length value model. Default: outputs/sandbox.",
    )
    refit: bool = HfArg(default=True, help="Measure with a length value model refitted to each policy too.")
    num_batches: int = HfArg(default=48, help="Independent batches.")
    batch_size: int = HfArg(default=16, help="Completions in a batch.")
    group_size: int = HfArg(default=2, help="Completions of a prompt.")
    seed: int = HfArg(default=0, help="Seed of prompts, sampling, refitting and bootstrap.")
    output_dir: str | None = HfArg(default=None, help="Where to write. Default: staleness in the run's folder.")


@torch.no_grad()
def divergence(
    policy: PreTrainedModel, base: PreTrainedModel, batches: Iterable[TokenBatch], temperature: float
) -> float:
    """``KL(policy || base)`` of a completion, in nats: the mean of its summed log-ratios over the policy's samples."""
    total, count = 0.0, 0
    for batch in batches:
        mask = batch.completion_mask.bool()
        own, other = (token_log_probs(model, *batch.inputs, temperature).double() for model in (policy, base))
        total += float(torch.where(mask, own - other, 0.0).sum())
        count += len(mask)
    return total / count


def measure_policy(args: StalenessArguments, path: str, folder: Path) -> list[dict[str, Any]]:
    """A row for each length value model, of one policy; whatever they need is written to `folder`."""
    run = find_run(args.run_dir, None, None)
    settings = {name: getattr(args, name) for name in ("num_batches", "batch_size", "group_size", "seed")}
    given = GradientArguments(
        run_dir=run.folder,
        policy=path,
        length_value_model=run.model("length_value_model"),
        base=run.model("policy"),
        estimators="^LenVM, lambda|^LenVM rescaled",
        forward_size=args.batch_size,
        output_dir=str(folder),
        **settings,
    )
    gradient, data, pad_token = complete(given)
    models = {FROM_RUN: gradient.length_value_model}
    if args.refit:
        models[REFITTED] = str(folder / "refit" / "length_value_model")
        if not (Path(models[REFITTED]) / "config.json").exists():
            gamma = read_config(gradient.length_value_model).gamma
            (folder / "refit").mkdir(parents=True, exist_ok=True)
            pretrain_on(path, folder / "refit", REFIT_PROMPTS, gradient.max_new_tokens, args.seed, gamma)
    rows = []
    for name, model in models.items():
        gradient.length_value_model = model
        report = measure_gradients(gradient, data, pad_token)
        found = {row["name"]: row for row in report["estimators"]}
        row = {"policy": path, "model": name, **report["measured_on"], "snr": found[LENVM_GRADIENT]["snr"]}
        row |= {f"cosine_{lam:g}": found[NAMES[lam]]["cosine_to_lenvm"] for lam in LAMBDAS}
        row |= {f"snr_{lam:g}": found[NAMES[lam]]["snr"] for lam in LAMBDAS}
        rows.append(row | {"cosine_rescaled": found[RESCALED]["cosine_to_lenvm"]})
    rollouts, metadata = read_rollouts(folder / "rollouts.jsonl")
    batches = read_batches(rollouts, args.batch_size, metadata.end_ids)
    moved = divergence(load_policy(path), load_policy(gradient.base), batches, gradient.temperature)
    return [{**row, "divergence": moved} for row in rows]


COLUMNS = (
    Column("policy", lambda row: "/".join(Path(row["policy"]).parts[-2:])),
    Column("LenVM", "model", left=True),
    Column("KL", "divergence", 2),
    Column("tokens", "mean_tokens", 1),
    Column("correct", "correct", 3),
    Column("V explains", "explained_variance", 2),
    Column("SNR, 1", "snr", 2, ends=False),
    *(Column(f"{lam:g}", f"snr_{lam:g}", 2, ends=False) for lam in LAMBDAS),
    *(Column(f"cosine, {lam:g}", f"cosine_{lam:g}", 2) for lam in LAMBDAS),
    Column("rescaled", "cosine_rescaled", 2, ends=False),
)


def plot_staleness(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Cosines against the divergence from the base policy: a panel for each length value model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.4 * len(models), 3.6), layout="constrained")
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        line = sorted((row for row in rows if row["model"] == model), key=lambda row: row["divergence"])
        for number, lam in enumerate(LAMBDAS):
            draw_intervals(
                axis,
                [row["divergence"] for row in line],
                [row[f"cosine_{lam:g}"] for row in line],
                color=f"C{number}",
                marker="o",
                markersize=3,
                linestyle="-",
                label=f"lambda {lam:g}",
            )
        axis.axhline(1.0, color="black", linewidth=0.6)
        axis.set_title(f"length value model: {model}", fontsize=9)
        axis.set_xlabel("divergence from the base policy, nats a completion")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("cosine to the gradient at lambda 1")
    legend_below(figure, axes[0])
    save_figure(path, figure)


def main(args: StalenessArguments) -> list[dict[str, Any]]:
    """Measure what is not measured yet, print, write."""
    transformers_logging.set_verbosity_error()
    set_threads(sandbox=True)
    output_dir = Path(args.output_dir or Path(find_run(args.run_dir, None, None).folder or ".") / "staleness")
    rows = []
    for path in args.policies:
        folder = output_dir / "_".join(Path(path).parts[-2:])
        place = folder / "measured.json"
        if not place.exists():
            write_json(place, measure_policy(args, path, folder))
            logger.info("%s", place)
        rows += read_json(place)
    console = Console(width=180, highlight=False)
    print_table(console, rows, COLUMNS, "lambda against staleness", sections=lambda row: row["policy"])
    save_report(output_dir, "staleness", {"rows": rows}, rows)
    plot_staleness(rows, output_dir / "staleness.png")
    console.print(f"Written to {output_dir}/staleness.json, .csv and .png")
    return rows


if __name__ == "__main__":
    run_evaluation(StalenessArguments, main, "eval.gradient.staleness", __doc__)
