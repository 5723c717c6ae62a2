"""How much of length control is lost because V is learned: the same rule under a trained and under the exact value.

    python -m eval.length_control_exact

In scripted worlds the exact value of every state is known. Tokens are sampled from each, a small length value model is
trained on them, and `equal_to` then guides the same policy to the same targets, without force, under either value.
Prints the mean absolute deviation from the target of both and their ratio, and writes length_control_exact.json. The
intervals of one world are 95 % bootstraps over its prompts; those of several worlds are over worlds, each of which has
a value model of its own, because all prompts of a world share the errors of one model.

The exact value is no perfect oracle of control: it says how long the *unguided* policy would go on. So its own
deviation need not be small, and a trained value may come out ahead of it by chance.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from eval.length_control_cells import BASE, LengthSampler
from eval.length_control_report import cell_text, describe
from eval.length_scores import length_deviation
from eval.statistics import mean_interval, statistic_interval
from lenvm_rl.endings import strip_completion
from lenvm_rl.guidance import EQUAL_TO, RULES, LengthGuidance
from lenvm_rl.modeling import LengthValueModel
from lenvm_rl.pretraining import LengthValueTrainer, LengthValueTrainingArguments, fit_gamma_to_rollouts
from lenvm_rl.returns import remaining_from_logits
from lenvm_rl.rollouts import atomic_file
from lenvm_rl.sampling_jobs import batch_seed
from lenvm_rl.sandbox.scripted import (
    EOS,
    PAD,
    START,
    ScriptedLengthValue,
    ScriptedPolicy,
    TokenChain,
    random_chain,
)

EXACT, TRAINED = "exact V", "trained V"
LONGEST_PROMPT, MOST_TOKENS = 4, 256


def ladder_chain(seed: int, levels: int = 12, words: int = 3) -> TokenChain:
    """Tokens stand on levels: most steps lead down or stay, some lead up, and only the lowest level can end.

    Each level has `words` tokens with habits of their own, so that it matters which of them is chosen.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [range(START + 1 + level * words, START + 1 + (level + 1) * words) for level in range(levels)]
    transition = torch.zeros(members[-1].stop, members[-1].stop, dtype=torch.float64)
    for level, own in enumerate(members):
        for token in own:
            down, stay, up = (torch.tensor([0.5, 0.35, 0.15]) * (0.3 + torch.rand(3, generator=generator))).tolist()
            transition[token, list(own)] += stay / words
            transition[token, list(members[min(level + 1, levels - 1)])] += up / words
            goal = [EOS] if level == 0 else list(members[level - 1])
            transition[token, goal] += down / len(goal)
    return _chain(transition)


def topics_chain(seed: int, topics: int = 4, words: int = 6) -> TokenChain:
    """Tokens belong to topics, which are left seldom and end at very different rates, from 1 in 4 to 1 in 50 tokens."""
    generator = torch.Generator().manual_seed(seed)
    size = START + 1 + topics * words
    transition = torch.zeros(size, size, dtype=torch.float64)
    hazards = torch.logspace(-0.6, -1.7, topics, dtype=torch.float64)
    for topic in range(topics):
        own = range(START + 1 + topic * words, START + 1 + (topic + 1) * words)
        for token in own:
            habits = torch.rand(size, generator=generator, dtype=torch.float64)
            habits[: START + 1] = 0.0
            stay = torch.zeros_like(habits)
            stay[list(own)] = habits[list(own)]
            hazard = float(hazards[topic] * (0.5 + torch.rand((), generator=generator)))
            transition[token] = (1 - hazard) * (0.9 * stay / stay.sum() + 0.1 * habits / habits.sum())
            transition[token, EOS] += hazard
    return _chain(transition)


def _chain(transition: torch.Tensor) -> TokenChain:
    """The chain of these transitions up to a factor for each token; from `START` every ordinary token is as likely."""
    transition[START, START + 1 :] = 1.0
    return TokenChain(transition / transition.sum(dim=1, keepdim=True).clamp(min=1e-12))


WORLDS = {"random": lambda seed: random_chain(24, seed), "ladder": ladder_chain, "topics": topics_chain}


def make_world(name: str) -> TokenChain:
    """The chain that a world's name stands for."""
    kind, _, seed = name.partition("-")
    if kind not in WORLDS or not seed.isdigit():
        raise ValueError(f"a world is one of {', '.join(WORLDS)} and a seed, such as ladder-0; got {name!r}.")
    return WORLDS[kind](int(seed))


@dataclass
class ExactArguments:
    """Worlds, the value model that is trained in each, and what is asked of it."""

    worlds: list[str] = field(
        default_factory=lambda: [f"{kind}-{seed}" for kind in WORLDS for seed in range(4)],
        metadata={
            "help": "random-SEED: transitions at random; ladder-SEED: levels that lead down to the end; topics-SEED: "
            "groups of words that are left seldom and differ in how soon they end."
        },
    )
    rollouts: int = field(default=3000, metadata={"help": "Completions that the value model is trained on."})
    epochs: float = field(default=3.0, metadata={"help": "Passes over them."})
    hidden_size: int = field(default=32, metadata={"help": "Width of the value model; it has two layers."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Peak of the cosine schedule."})
    targets: list[int] = field(default_factory=lambda: [8, 16, 24, 32], metadata={"help": "Tokens to ask for."})
    num_prompts: int = field(default=64, metadata={"help": "Prompts per world, not those trained on."})
    num_samples: int = field(default=2, metadata={"help": "Completions per prompt and target."})
    top_k: int = field(default=15, metadata={"help": "Candidate rule: top-k, 0 for none."})
    top_p: float = field(default=0.999, metadata={"help": "Candidate rule: top-p, 1 for none."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling, training and bootstrap."})
    output_dir: str = field(default="outputs/length_control_exact", metadata={"help": "Where to write the result."})

    def __post_init__(self) -> None:
        if min(self.rollouts, self.num_prompts, self.num_samples, *self.targets) < 1 or not self.worlds:
            raise ValueError("rollouts, num_prompts, num_samples and every target must be at least 1; name a world.")


def draw_prompts(chain: TokenChain, count: int, seed: int) -> list[list[int]]:
    """Prompts of 1 to 4 ordinary tokens at random; a chain remembers the last one only."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST_PROMPT + 1, (count,), generator=generator).tolist()
    return [torch.randint(START + 1, chain.vocab_size, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def sample_chain(chain: TokenChain, prompts: Sequence[list[int]], seed: int) -> Dataset:
    """A rollout of each prompt. Only its last token goes into the policy: nothing before it matters to the chain."""
    torch.manual_seed(seed)
    policy = ScriptedPolicy.from_chain(chain)
    last = torch.tensor([[prompt[-1]] for prompt in prompts])
    output = policy.generate(
        last, attention_mask=torch.ones_like(last), do_sample=True, top_k=0, max_new_tokens=MOST_TOKENS
    )
    # Padded to the longest; a row that had no end is as long as that.
    rows = [strip_completion(row, [EOS], output.shape[1] - 1) for row in output[:, 1:].tolist()]
    records = [
        {"prompt": "", "prompt_ids": prompt, "completion_ids": ids, "finish_reason": reason, "group": index}
        for index, (prompt, (ids, reason)) in enumerate(zip(prompts, rows, strict=True))
    ]
    return Dataset.from_list(records)


def train_value_model(args: ExactArguments, rollouts: Dataset, vocab_size: int, folder: Path) -> LengthValueModel:
    """A small length value model, trained on a world's rollouts at the discount that fits their lengths."""
    set_seed(args.seed)
    backbone = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=2 * args.hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=512,
            initializer_range=0.1,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=EOS,
        )
    )
    training = LengthValueTrainingArguments(
        str(folder),
        per_device_train_batch_size=64,
        learning_rate=args.learning_rate,
        num_train_epochs=args.epochs,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    model = LengthValueModel.from_backbone(backbone, gamma=fit_gamma_to_rollouts(rollouts)[0])
    trainer = LengthValueTrainer(model, training, train_dataset=rollouts)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.cpu().freeze()


def control(
    args: ExactArguments, chain: TokenChain, value_model: nn.Module, prompts: list[list[int]], rule: str, arm: str
) -> list[dict[str, Any]]:
    """Completions of every prompt and target, as `{"prompt", "sample", "target", "length"}`, in this order."""
    sampler = LengthSampler(
        policy=ScriptedPolicy.from_chain(chain),
        length_value_model=value_model,
        prompt_ids=prompts,
        asked_ids={},
        caps={target: max(2 * target, target + 64) for target in args.targets},
        candidates=LengthGuidance(top_k=args.top_k, top_p=args.top_p),
        rule=rule,
        tolerance=None,
        eos_token_ids=[EOS],
        pad_token_id=PAD,
        num_samples=args.num_samples,
        batch_size=len(prompts) * args.num_samples,
        seed=args.seed,
    )
    rows = []
    for index, batch in enumerate(sampler.plan([arm], [EQUAL_TO])):
        for one in sampler.sample(batch, batch_seed(args.seed, index)):
            for target in args.targets if one.target is None else [one.target]:
                length = one.cut(sampler.caps[target]).length
                rows.append({"prompt": one.prompt, "sample": one.sample, "target": target, "length": length})
    return sorted(rows, key=lambda row: (row["prompt"], row["sample"], row["target"]))


@torch.no_grad()
def value_error(trained: LengthValueModel, exact: nn.Module, rollouts: Dataset) -> float:
    """Mean distance between the lengths that both values predict at the states of some completions, in tokens."""
    errors = []
    for row in rollouts:
        ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"][:-1]]])
        predicted = [remaining_from_logits(model(ids).logits[0], trained.config.gamma) for model in (trained, exact)]
        errors.append((predicted[0] - predicted[1]).abs()[len(row["prompt_ids"]) - 1 :])
    return float(torch.cat(errors).mean())


def run_world(args: ExactArguments, name: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Trains and controls in one world: what there is to know of it, and the completions of each way of control."""
    chain = make_world(name)
    rollouts = sample_chain(chain, draw_prompts(chain, args.rollouts, args.seed), args.seed)
    trained = train_value_model(args, rollouts, chain.vocab_size, Path(args.output_dir) / name)
    exact = ScriptedLengthValue.from_chain(chain, trained.config.gamma)
    prompts = draw_prompts(chain, args.num_prompts, args.seed + 1)
    lengths = [len(ids) - 1 for ids in rollouts["completion_ids"][:]]
    facts = {
        "mean_length": float(np.mean(lengths)),
        "gamma": trained.config.gamma,
        "error_tokens": value_error(trained, exact, sample_chain(chain, prompts, args.seed + 1)),
    }
    found = {BASE: control(args, chain, exact, prompts, RULES[0], BASE)}
    for rule in RULES:
        for title, model in ((EXACT, exact), (TRAINED, trained)):
            found[f"{rule}, {title}"] = control(args, chain, model, prompts, rule, "guided")
    return facts, found


def compare(found: dict[str, list[dict[str, Any]]], groups: Sequence, rule: str, seed: int) -> dict[str, Any]:
    """Mean absolute deviation in percent under both values and their ratio, over the same prompts and targets.

    Args:
        found (`dict`): rows of each way of control, all in one order.
        groups (sequence): what is resampled: the prompt of each row, or its world.
        rule (`str`): a rule of [`~lenvm_rl.guidance.LengthGuidance`].
        seed (`int`): of the bootstrap.

    Returns:
        `dict`: `exact`, `trained`, `base` and `ratio` as `{"estimate", "low", "high"}`; `ratio` is `None` where the
        exact value misses nothing. `exact_tokens` and `trained_tokens` are the mean misses in tokens.
    """
    numbers: dict[str, Any] = {}
    columns: dict[str, np.ndarray] = {}
    for title, key in (("base", BASE), ("exact", f"{rule}, {EXACT}"), ("trained", f"{rule}, {TRAINED}")):
        lengths, targets = (np.array([row[name] for row in found[key]]) for name in ("length", "target"))
        columns[title] = 100 * np.abs(length_deviation(lengths, targets))
        numbers[title] = describe(mean_interval(columns[title], groups, seed=seed))
        numbers[f"{title}_tokens"] = float(np.abs(lengths - targets).mean())
    numbers["ratio"] = None
    if columns["exact"].any():
        both = np.stack([columns["trained"], columns["exact"]], axis=1)
        numbers["ratio"] = describe(statistic_interval(both, _ratio, groups, seed=seed))
    return numbers


def _ratio(means: np.ndarray) -> np.ndarray:
    """Of the first column to the second; NaN where a resample has nothing to divide by."""
    return np.divide(means[:, 0], means[:, 1], out=np.full(len(means), np.nan), where=means[:, 1] > 0)


def print_table(report: dict[str, Any], console: Console) -> None:
    """A line per world and rule; "in tokens": how far the exact and the trained value miss the target."""
    table = Table(title="equal_to without force: mean absolute deviation from the target, %")
    for column in ("world", "rule", "base policy", EXACT, TRAINED, "trained / exact", "in tokens", "error of V"):
        table.add_column(column, justify="left" if column in ("world", "rule") else "right", no_wrap=True)
    for name, entry in report["worlds"].items():
        error = f"{entry['error_tokens']:.2f}" if "error_tokens" in entry else ""
        for rule in RULES:
            numbers = entry[rule]
            cells = [cell_text(numbers[title], 1) for title in ("base", "exact", "trained")]
            cells += [
                cell_text(numbers["ratio"], 2),
                f"{numbers['exact_tokens']:.1f} / {numbers['trained_tokens']:.1f}",
            ]
            table.add_row(name, rule, *cells, error, end_section=rule == RULES[-1])
    console.print(table)


def main(args: ExactArguments) -> dict[str, Any]:
    """Train and control in every world, print and write the comparison."""
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)  # as fast as two at this size, and the same numbers on any number of cores
    report: dict[str, Any] = {"arguments": asdict(args), "worlds": {}}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in tqdm(args.worlds, desc="worlds"):
        facts, found[name] = run_world(args, name)
        prompts = [row["prompt"] for row in found[name][BASE]]
        report["worlds"][name] = facts | {rule: compare(found[name], prompts, rule, args.seed) for rule in RULES}
    kinds = {kind: [name for name in args.worlds if name.startswith(f"{kind}-")] for kind in WORLDS}
    for title, names in {**{f"all {kind}": own for kind, own in kinds.items()}, "all": args.worlds}.items():
        if len(names) > 1:
            pooled = {key: [row for name in names for row in found[name][key]] for key in found[names[0]]}
            world = [name for name in names for _ in found[name][BASE]]
            report["worlds"][title] = {rule: compare(pooled, world, rule, args.seed) for rule in RULES}
    with atomic_file(Path(args.output_dir) / "length_control_exact.json") as file:
        file.write(json.dumps(report, indent=1, allow_nan=False).encode())
    console = Console(width=170)
    print_table(report, console)
    console.print("In tokens: mean miss under exact / trained V; error of V: between the lengths that both predict.")
    console.print(f"Written to {args.output_dir}/length_control_exact.json")
    return report


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(HfArgumentParser(ExactArguments).parse_args_into_dataclasses()[0])
