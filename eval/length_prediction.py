"""How well a length value model predicts lengths: at the prompt, and a quarter, half and three quarters of the way.

    python -m eval.length_prediction --rollouts held_out.jsonl --length_value_model outputs/length_value_model \
        --domain_column domain --output_dir outputs/length_prediction

The metrics are those of value pretraining (`lenvm_rl.value_metrics`), overall and for each domain, with 95 % bootstrap
intervals over prompts, beside what needs no model (`lenvm_rl.value_references`): the mean of all lengths, a line on the
prompt's own length, and as a floor the median of the very completions that are to be predicted. Added are the slope of
the calibration and the order at each point: Kendall's tau-b, and the pairwise accuracy, which is the share of pairs of
completions of two different prompts, unequal in length, whose order is predicted (a tie counts half).

Lengths count the end-of-sequence token. Cut completions have no known length: they count in `truncated_share` alone.
Writes length_prediction.json, .csv and .png. Without `--rollouts`, completions of the sandbox's evaluation prompts are
sampled of `--policy`. Killed and started again, it goes on.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from eval.length_measures import ALONG, Completions, boundary_table, measure, read_completions
from eval.prompt_boundary import BoundaryArguments, find_rollouts
from eval.statistics import Interval
from lenvm_rl.modeling import LengthValueModel
from lenvm_rl.returns import remaining_from_logits
from lenvm_rl.rollouts import atomic_file
from lenvm_rl.tokenization import check_same_tokenizer
from lenvm_rl.value_metrics import POINTS

logger = logging.getLogger(__name__)

ALL = "all"
# What is predicted from in the table at the prompt, and the metrics that stand in its columns.
REFERENCES = {
    "length value model": (
        "length_mae_at_0",
        "length_mre_at_0",
        "pairwise_accuracy_at_0",
        "consistent_mre",
        "half_mre",
    ),
    **{
        title: (f"reference_{name}_length_mae", f"reference_{name}_length_mre", None)
        + (f"reference_{name}_consistent_mre", None)
        for title, name in (("mean of all lengths", "mean"), ("line on the prompt's tokens", "regression"))
    },
    "prompt's own median (floor)": tuple(
        f"reference_median_{kind}" for kind in ("length_mae", "length_mre", "pairwise_accuracy")
    )
    + (None, None),
    "prompt's other half (noise)": (None, None, None, None, "reference_half_mre"),
}


@dataclass
class PredictionArguments(BoundaryArguments):
    """Which model is measured, against which completions, and where to write it."""

    domain_column: str | None = field(
        default=None,
        metadata={"help": "Column of the rollouts whose values are measured apart, e.g. domain, or difficulty."},
    )
    num_resamples: int = field(default=2000, metadata={"help": "Bootstrap resamples of the prompts."})
    forward_tokens: int = field(default=16384, metadata={"help": "Most tokens in a forward, padding counted."})
    output_dir: str = field(
        default="outputs/length_prediction", metadata={"help": "Where the results, and sampled rollouts, are written."}
    )


def split_domains(rollouts: Dataset, column: str | None) -> dict[str, Tensor]:
    """Rows of each domain, after those of all of them; a prompt belongs to one domain.

    Raises:
        ValueError: if there is no such column, a prompt has two domains, or one is called `all`.
    """
    everything = {ALL: torch.arange(len(rollouts))}
    if column is None:
        return everything
    if column not in rollouts.column_names:
        raise ValueError(
            f"The rollouts have no column {column!r} for --domain_column; they have {rollouts.column_names}."
        )
    rows: dict[str, list[int]] = {}
    domain_of: dict[int, str] = {}
    for row, (name, group) in enumerate(zip(rollouts[column][:], rollouts["group"][:], strict=True)):
        if domain_of.setdefault(group, str(name)) != str(name):
            raise ValueError(f"Prompt {group} is in the domains {domain_of[group]!r} and {name!r}: it must be in one.")
        rows.setdefault(str(name), []).append(row)
    if ALL in rows:
        raise ValueError(f"A domain may not be called {ALL!r}: that is what all of them together are called.")
    return everything | {name: torch.tensor(rows[name]) for name in sorted(rows)}


def report_of(measured: dict[str, dict[str, Interval]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Numbers for JSON, which has no NaN: null stands for what is not defined, and for ends that were not computed."""

    def known(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        domain: {
            name: {"estimate": known(entry.estimate), "low": known(entry.low), "high": known(entry.high)}
            for name, entry in found.items()
        }
        for domain, found in measured.items()
    }


def print_tables(domains: dict[str, dict[str, dict[str, float | None]]], console: Console) -> None:
    """A table of the errors at the prompt beside the references, and one of the way."""

    def cell(entry: dict[str, float | None] | None, digits: int, percent: bool = False) -> str:
        if entry is None or entry["estimate"] is None:
            return "–"
        ends = [f"{(100 if percent else 1) * end:.{digits}f}" for end in entry.values() if end is not None]
        return ends[0] if len(ends) == 1 else f"{ends[0]} [{ends[1]}, {ends[2]}]"

    boundary = Table(title="at the prompt")
    boundary.add_column("predicted from", no_wrap=True)
    for column in ("MAE, tokens", "MRE, %", "pairs in order, %", "consistent MRE, %", "MRE to halves, %"):
        boundary.add_column(column, justify="right", no_wrap=True)
    along = Table(title="along the way")
    along.add_column("domain", no_wrap=True)
    along.add_column("point", no_wrap=True, justify="right")
    for column in ("MAE, tokens", "MRE, %", "bias, tokens", "explained", "slope", "tau-b", "pairs in order, %"):
        along.add_column(column, justify="right")
    for domain, found in domains.items():
        title = f"{domain}: {found['completions']['estimate']:.0f} completions"
        boundary.add_row(f"[bold]{title}, {found['truncated_share']['estimate']:.1%} cut[/bold]")
        for label, names in REFERENCES.items():
            cells = [cell(found.get(name), 1, percent=place > 0) for place, name in enumerate(names)]
            boundary.add_row(f"  {label}", *cells, end_section=label == list(REFERENCES)[-1])
        for percent in POINTS:
            entries = [found.get(f"{name}_at_{percent}") for name in ALONG]
            digits, shares = (1, 1, 1, 2, 2, 2, 1), (False, True, False, False, False, False, True)
            cells = [cell(*each) for each in zip(entries, digits, shares, strict=True)]
            along.add_row(domain if percent == 0 else "", f"{percent}%", *cells, end_section=percent == POINTS[-1])
    console.print(boundary)
    console.print(along)


def plot(data: Completions, domains: dict[str, Tensor], report: dict[str, Any], path: Path) -> None:
    """Predicted against true lengths at the prompt, and the relative error along the way, as a PNG."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    lengths, errors = figure.subplots(1, 2)
    shown = [name for name in domains if name != ALL] or [ALL]
    for place, name in enumerate(shown):
        rows = data.select(domains[name])
        rows, label = rows.select(rows.finished.bool()), name if len(shown) > 1 else None
        if len(rows.lengths):
            predicted = remaining_from_logits(rows.at(0)[0], data.gamma)
            lengths.scatter(predicted, rows.lengths, s=4, alpha=0.15, color=f"C{place}", linewidths=0)
        lengths.scatter(*boundary_table(data.select(domains[name])), s=14, color=f"C{place}", label=label)
    low, high = lengths.get_xlim()
    lengths.plot([max(low, 1), high], [max(low, 1), high], color="#888888", linewidth=0.8)
    lengths.set(xscale="log", yscale="log", xlabel="predicted at the prompt, tokens", ylabel="true length, tokens")
    lengths.set_title("dots: completions; discs: return-consistent, by prompt", fontsize=9)
    for name in (name for name in report if "length_mre_at_0" in report[name]):
        entries = [report[name][f"length_mre_at_{percent}"] for percent in POINTS]
        middle = [entry["estimate"] for entry in entries]
        ends = [
            [entry["estimate"] if entry[end] is None else entry[end] for entry in entries] for end in ("low", "high")
        ]
        color = "#000000" if name == ALL else f"C{shown.index(name)}"
        errors.plot(POINTS, middle, marker="o", color=color, label=name)
        errors.fill_between(POINTS, *ends, color=color, alpha=0.15, linewidth=0)
    errors.set(xlabel="% of the completion that stands", ylabel="mean relative error", xticks=POINTS)
    errors.set_ylim(bottom=0)
    errors.legend(fontsize=8)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def write_csv(report: dict[str, dict[str, dict[str, float | None]]], path: Path) -> None:
    """A line for each domain and metric; an empty cell is what is null in the JSON."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["domain", "metric", "estimate", "low", "high"])
    for domain, found in report.items():
        writer.writerows([domain, name, *entry.values()] for name, entry in found.items())
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def main(args: PredictionArguments) -> dict[str, Any]:
    """Samples or reads, measures, prints, and writes length_prediction.json, .csv and .png."""
    rollouts, metadata = find_rollouts(args)
    domains = split_domains(rollouts, args.domain_column)
    device = torch.accelerator.current_accelerator() or "cpu"
    model = LengthValueModel.from_pretrained(args.length_value_model).to(device).eval()
    check_same_tokenizer(model.config.tokenizer_fingerprint, metadata.tokenizer_fingerprint)
    data = read_completions(model, rollouts, args.forward_tokens)
    measured = {}
    for name, rows in tqdm(domains.items(), desc="measuring", unit="domain"):
        measured[name] = measure(data.select(rows), args.num_resamples, args.seed)
        if len(measured[name]) == 2:
            logger.warning("%s: none of its %d completions ended, so no length is known", name, len(rows))
    report: dict[str, Any] = {
        "arguments": asdict(args),
        "gamma": data.gamma,
        "prompts": {name: len(set(data.groups[rows].tolist())) for name, rows in domains.items()},
        "domains": report_of(measured),
    }
    folder = Path(args.output_dir)
    with atomic_file(folder / "length_prediction.json") as file:
        file.write(json.dumps(report, indent=1, allow_nan=False).encode())
    write_csv(report["domains"], folder / "length_prediction.csv")
    plot(data, domains, report["domains"], folder / "length_prediction.png")
    console = Console(width=170, highlight=False)
    print_tables(report["domains"], console)
    console.print(
        f"{report['prompts'][ALL]} prompts, gamma {data.gamma:.5f}; 95 % intervals over "
        f"prompts. Written to {folder}/length_prediction.json, .csv and .png"
    )
    return report


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    main(*HfArgumentParser(PredictionArguments, description=__doc__.partition("\n")[0]).parse_args_into_dataclasses())
