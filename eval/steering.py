"""Does `length_target` hold a target with its defaults? Random policies that nothing but the length stream moves.

    python -m eval.steering

Nothing pays here but length, so nothing brings back what overshoots, and Adam makes steps of full size of any
coefficient: the hardest case for steering. A policy is a small Llama that starts out writing every token with the same
chance, one of them ending the completion: 30 tokens on average at a vocabulary of 46 and a cap of 48. The length value
model says the constant value of such a policy. Every learning rate, target and seed is one run of `LenVMGRPOTrainer`
with the defaults of steering. Asked of each:

- the mean of `length/mean` over the last 30 steps is within 10 % of the target;
- after the target was first reached, the longest stretch below nine tenths of it takes no more steps than the way there
  (means of five steps, since one batch is noise; for targets that are a tenth or more away from where it starts).

Written are `steering.json`, with every length and coefficient, and `steering.png`. Killed and started again, it goes on
with the runs that are not there yet.
"""

from __future__ import annotations

import itertools
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.hf_argparser import HfArg

from eval.curves import WINDOW, moving_mean
from eval.report import Column, legend_below, print_table, save_figure
from eval.runs import QUIET, check_writable, read_report, run_evaluation
from eval.speed.trainers import make_tokenizer
from lenvm_rl.files import write_json
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.programs import choose_threads
from lenvm_rl.returns import fit_gamma
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer

logger = logging.getLogger(__name__)

LAST, TOLERANCE = 30, 0.1
PROMPTS = 100
COLUMNS = (
    Column("learning rate", lambda row: f"{row['learning_rate']:g}"),
    Column("target", "target", left=True),
    Column("seed", "seed", left=True),
    Column(f"last {LAST} steps", lambda row: f"{row['end'] * row['target']:.2f} ({row['end']:.3f})", left=True),
    Column("steps to the target", "approach", left=True),
    Column("longest below", "undershoot", left=True),
    Column("met", lambda row: "yes" if row["met"] else "NO", left=True),
)


@dataclass
class SteeringArguments:
    """The runs."""

    targets: list[float] = HfArg(default_factory=lambda: [5.0, 15.0, 30.0], help="Values of length_target.")
    learning_rates: list[float] = HfArg(default_factory=lambda: [1e-3, 3e-3], help="Of the policies.")
    seeds: int = HfArg(default=3, help="Runs of each target and learning rate.")
    steps: int = HfArg(default=200, help="Steps of a run, each on completions of its own.")
    completions: int = HfArg(default=64, help="Completions of a step, a multiple of 4.")
    vocab: int = HfArg(default=46, help="Tokens, one of which ends a completion.")
    max_new_tokens: int = HfArg(default=48, help="Longest completion, end of sequence counted.")
    output_dir: str = HfArg(default="outputs/steering", help="Where steering.json and the picture go.")


def random_policy(vocab: int, seed: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A small Llama that writes all tokens with nearly the same chance."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def constant_value_model(policy: LlamaForCausalLM, args: SteeringArguments, tokenizer: Any) -> LengthValueModel:
    """A length value model that says at every state what is true of a policy that ends with the same chance always."""
    gamma = fit_gamma([args.max_new_tokens])
    model = LengthValueModel.from_backbone(policy.model, gamma=gamma, tokenizer=tokenizer)
    value = -(1 - gamma) / (1 - gamma * (1 - 1 / args.vocab))
    with torch.no_grad():
        model.head.output.weight.zero_()
        model.head.output.bias.fill_(math.log(-value / (1 + value)))
    return model


def pays_nothing(completions: Sequence[Any], **columns: Any) -> list[float]:
    """A reward that is always 0."""
    return [0.0] * len(completions)


def train(args: SteeringArguments, learning_rate: float, target: float, seed: int) -> dict[str, Any]:
    """One run: `lengths` and `coefficients`, step by step."""
    tokenizer = make_tokenizer(args.vocab)
    policy = random_policy(args.vocab, seed, tokenizer)
    words = [f"w{i} w{j}" for i, j in itertools.product(range(2, args.vocab), repeat=2)][:PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        config = LenVMGRPOConfig(
            folder,
            length_target=target,
            length_gate="all",
            loss_type="dr_grpo",
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            max_steps=args.steps,
            per_device_train_batch_size=args.completions,
            num_generations=4,
            max_completion_length=args.max_new_tokens,
            logging_steps=1,
            seed=seed,
            **QUIET,
        )
        trainer = LenVMGRPOTrainer(
            policy,
            pays_nothing,
            config,
            Dataset.from_dict({"prompt": words}),
            processing_class=tokenizer,
            length_value_model=constant_value_model(policy, args, tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "length/coef" in entry]
    return {"lengths": [entry["length/mean"] for entry in log], "coefficients": [entry["length/coef"] for entry in log]}


def judge(lengths: Sequence[float], target: float) -> dict[str, Any]:
    """Whether a run of these mean lengths, step by step, held its target.

    Returns `end` (the mean of the last steps, over the target), `approach` (steps before the target was first reached),
    `undershoot` (steps of the longest stretch below nine tenths of it afterwards) and `met`.
    """
    _, smooth = moving_mean(lengths)
    side = math.copysign(1.0, smooth[0] - target)
    reached = side * (smooth - target) <= 0
    # Means that come within a hundredth have reached it, whichever side they come from.
    reached |= np.abs(smooth - target) <= 0.01 * target
    approach = int(reached.argmax()) if reached.any() else len(smooth)
    stretch = longest = 0
    for length in smooth[approach:]:
        stretch = stretch + 1 if length < (1 - TOLERANCE) * target else 0
        longest = max(longest, stretch)
    end = float(np.mean(lengths[-LAST:])) / target
    starts_there = abs(smooth[0] / target - 1) < TOLERANCE
    met = abs(end - 1) <= TOLERANCE and (starts_there or longest <= approach)
    return {"end": end, "approach": approach, "undershoot": longest, "met": bool(met)}


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Mean length and coefficient of every run, step by step: a column for each learning rate, a colour per target."""
    rates = sorted({run["learning_rate"] for run in runs})
    targets = sorted({run["target"] for run in runs})
    figure = Figure(figsize=(max(4.2 * len(rates), 3 * len(targets)), 4.9), layout="constrained")
    axes = figure.subplots(2, len(rates), sharex=True, sharey="row", squeeze=False, height_ratios=(2, 1))
    for (above, below), rate in zip(axes.T, rates, strict=True):
        for number, target in enumerate(targets):
            color, band = f"C{number}", ((1 - TOLERANCE) * target, (1 + TOLERANCE) * target)
            label = f"target {target:g} (dashed; band: {TOLERANCE:.0%} of it)" if rate == rates[0] else None
            above.axhline(target, color=color, linestyle="--", linewidth=0.8, label=label)
            above.axhspan(*band, color=color, alpha=0.12)
            for run in runs:
                if (run["learning_rate"], run["target"]) == (rate, target):
                    for axis, key in ((above, "lengths"), (below, "coefficients")):
                        axis.plot(*moving_mean(run[key]), color=color, linewidth=0.8)
        above.set_title(f"learning rate {rate:g}", fontsize=9)
        below.axhline(0.0, color="black", linewidth=0.6)
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("mean length, tokens")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylabel("length_coef")
    figure.suptitle(f"means of {WINDOW} steps", fontsize=8)
    legend_below(figure, axes[0, 0], ncols=len(targets))
    save_figure(path, figure)


def main(args: SteeringArguments) -> list[dict[str, Any]]:
    """Makes the runs that are missing, prints the table, and draws the picture."""
    choose_threads(1)
    check_writable(args.output_dir)
    path = Path(args.output_dir) / "steering.json"
    settings = {name: getattr(args, name) for name in ("steps", "completions", "vocab", "max_new_tokens")}
    found = read_report(path) or {"settings": settings, "runs": []}
    if found["settings"] != settings:
        raise ValueError(f"{path} was made with other settings, {found['settings']}: give another --output_dir.")
    runs = found["runs"]
    done = {(run["learning_rate"], run["target"], run["seed"]) for run in runs}
    for rate, target, seed in itertools.product(args.learning_rates, args.targets, range(args.seeds)):
        if (rate, target, seed) not in done:
            logger.info("learning rate %g, target %g, seed %d", rate, target, seed)
            runs.append({"learning_rate": rate, "target": target, "seed": seed, **train(args, rate, target, seed)})
            write_json(path, found)
    rows = [{**run, **judge(run["lengths"], run["target"])} for run in runs]
    print_table(Console(width=120, highlight=False), rows, COLUMNS)
    plot(runs, path.with_suffix(".png"))
    return runs


if __name__ == "__main__":
    run_evaluation(SteeringArguments, main, "eval.steering", __doc__)
