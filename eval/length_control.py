"""Length control, LIFEBench in tokens: asking for a length against guiding the decoding to it, and both together.

    python -m eval.length_control                       # on the sandbox, with what recipes/ppo_shaped.py left
    python -m eval.length_control --policy PATH --length_value_model PATH --dataset_name data_lite_no_summary.jsonl

Arms: the base policy; with the length asked for in the prompt; guided by the length value model without a word in the
prompt; guided and asked; and, on demand, with the bound enforced. All have one candidate rule and one definition of
length: tokens without end-of-sequence. A completion that reaches the cap counts with the length that it was cut at.
Prints a table per mode and writes length_control.json, .csv and .png, completions.jsonl, and samples.journal: a run
that is killed and started again goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from eval.command_line import run
from eval.datasets import sandbox_problems
from eval.length_control_cells import ARMS, BASE, Completion, LengthSampler, cell_completions
from eval.length_control_figures import plot_length_control
from eval.length_control_prompts import read_tasks, with_length
from eval.length_control_report import ALL, print_tables, summarise_cell
from eval.length_scores import SCORED_MODES
from eval.report import save_csv, save_json
from eval.runs import (
    CANDIDATES,
    OUTPUTS,
    SANDBOX_CANDIDATES,
    SANDBOX_RUN,
    Run,
    check_sandbox,
    find_run,
    output_folder,
    set_threads,
)
from lenvm_rl.decoding.guidance import RULES, LengthGuidance
from lenvm_rl.endings import end_token_ids, padding_id
from lenvm_rl.files import atomic_file
from lenvm_rl.modeling.loading import load_length_value_model, load_policy, load_tokenizer, read_config
from lenvm_rl.prediction import weights_fingerprint
from lenvm_rl.tokenization import tokenize_prompts
from reward.sandbox import sandbox_reward

SANDBOX, SANDBOX_TARGETS, LIFEBENCH_TARGETS = "sandbox", [8, 16, 32], [32, 64, 128, 256]
DEFAULT_ARMS = [BASE, "prompt", "guided", "guided+prompt"]
REPORT = "length_control.json"
# What a comparison is about: results about others are not written over.
MODELS = ("policy", "length_value_model", "dataset_name")


@dataclass
class LengthControlArguments:
    """What to compare, on which prompts, and where to write it."""

    run_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a recipe's run; read where a model is not named. Default: "
            f"{SANDBOX_RUN}, or none where --policy is given."
        },
    )
    policy: str | None = field(
        default=None,
        metadata={
            "help": "The policy, folder or hub id; needs --length_value_model and --dataset_name. Default: the run's "
            "base policy."
        },
    )
    length_value_model: str | None = field(
        default=None, metadata={"help": "Length value model, folder or hub id. Default: the run's."}
    )
    base: str | None = field(
        default=None,
        metadata={
            "help": "The model that a length value model of form adapter or head was fitted on. Default: the policy."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A LIFEBench file (JSONL with id, category, lang and task). Default: the sandbox's evaluation "
            "prompts, for its own policies."
        },
    )
    languages: list[str] = field(default_factory=lambda: ["en", "zh"], metadata={"help": "Languages of the file."})
    chat: bool = field(
        default=True,
        metadata={"help": "Wrap the dataset's prompts as a user's message, for the policy's chat template."},
    )
    num_prompts: int | None = field(
        default=None,
        metadata={"help": "Prompts, by turns from each language and category. Default: all; sandbox: 320."},
    )
    max_characters: int | None = field(
        default=None, metadata={"help": "Leave longer tasks of the file out; how many is logged. Default: none."}
    )
    num_samples: int = field(default=1, metadata={"help": "Completions per prompt and cell."})
    arms: list[str] = field(
        default_factory=list, metadata={"help": f"Some of {', '.join(ARMS)}. Default: all that enforce nothing."}
    )
    modes: list[str] = field(default_factory=lambda: list(SCORED_MODES), metadata={"help": "Length constraints."})
    targets: list[int] = field(
        default_factory=list,
        metadata={"help": f"Tokens to ask for. Default: {LIFEBENCH_TARGETS}; on the sandbox {SANDBOX_TARGETS}."},
    )
    cap_factor: float = field(default=2.0, metadata={"help": "Longest completion: this times the target, ..."})
    cap_extra: int = field(default=64, metadata={"help": "... or this many tokens more than it, if that is longer."})
    rule: str = field(
        default="feasible",
        metadata={"help": "Rule of the guidance: paper, feasible, or patient (for equal_to, feasible elsewhere)."},
    )
    tolerance: float | None = field(default=None, metadata={"help": "Tolerance of equal_to with feasible."})
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Sampling temperature of every arm. Default: as in the run, or in the rollouts that the length "
            "value model was fitted on, else 1."
        },
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Candidate rule of every arm: top-k, 0 for none. Default: 15; sandbox: 0."}
    )
    top_p: float | None = field(
        default=None, metadata={"help": "Candidate rule of every arm: top-p, 1 for none. Default: 0.999; sandbox: 1."}
    )
    min_p: float | None = field(
        default=None, metadata={"help": "Candidate rule of every arm: min-p, 0 for none. Default: 0; sandbox: 0.01."}
    )
    batch_size: int = field(default=48, metadata={"help": "Completions per generate call."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling and bootstrap; the prompts do not depend on it."})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where to write. Default: RUN_DIR/length_control; with a dataset, or for models of no run, "
            "outputs/length_control."
        },
    )

    def __post_init__(self) -> None:
        if min(self.num_samples, self.batch_size) < 1 or (self.num_prompts is not None and self.num_prompts < 1):
            raise ValueError("num_prompts, num_samples and batch_size must be at least 1.")
        for name, value in (SANDBOX_CANDIDATES if self.dataset_name is None else CANDIDATES).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.targets = self.targets or (SANDBOX_TARGETS if self.dataset_name is None else LIFEBENCH_TARGETS)
        if min(self.targets) < 1 or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets must be at least 1 token and differ, got {self.targets}.")
        if self.cap_extra < 1 or self.cap_factor < 1:
            raise ValueError("cap_factor and cap_extra must be at least 1: the end takes a token after the target.")
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}.")
        for name, given, known in (("modes", self.modes, SCORED_MODES), ("arms", self.arms, ARMS)):
            if not set(given) <= set(known) or len(set(given)) < len(given) or (name == "modes" and not given):
                raise ValueError(f"{name} must be some of {', '.join(known)}, each once, got {given}.")
        asked = [arm for arm in self.arms if ARMS[arm].asked]
        if self.dataset_name is None and asked:
            raise ValueError(f"the sandbox's prompts cannot ask for a length, so there is no {asked}: leave it out.")
        if not self.arms:
            self.arms = [arm for arm in DEFAULT_ARMS if self.dataset_name is not None or not ARMS[arm].asked]

    @property
    def caps(self) -> dict[int, int]:
        """Longest completion for each target, end-of-sequence counted."""
        return {target: max(int(self.cap_factor * target), target + self.cap_extra) for target in self.targets}


@dataclass
class Prompts:
    """The prompts of a comparison.

    Args:
        languages (list of `str`): of each prompt; the sandbox has one, `"sandbox"`.
        names (list of `str`): what the dataset calls each, or its text.
        ids (list of lists of `int`): each prompt without a length instruction.
        asked_ids (`dict`): `(mode, target)` to the ids of each prompt with that instruction; empty on the sandbox.
        answers (list of `str`, *optional*): the sandbox's.
    """

    languages: list[str]
    names: list[str]
    ids: list[list[int]]
    asked_ids: dict[tuple[str, int], list[list[int]]]
    answers: list[str] | None = None


def load_prompts(args: LengthControlArguments, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """The dataset's prompts with and without each length instruction, or the sandbox's evaluation prompts."""
    if args.dataset_name is None:
        problems = sandbox_problems(args.num_prompts or 320)
        texts = [problem.prompt for problem in problems]
        ids = tokenize_prompts(tokenizer, texts)
        return Prompts([SANDBOX] * len(texts), texts, ids, {}, [problem.answer for problem in problems])
    tasks = read_tasks(args.dataset_name, args.languages, args.num_prompts, args.max_characters)

    def tokenize(texts: list[str]) -> list[list[int]]:
        chats = [[{"role": "user", "content": text}] for text in texts]
        return tokenize_prompts(tokenizer, chats if args.chat else texts)

    asked = {
        (mode, target): tokenize([with_length(task.instruction, task.language, mode, target) for task in tasks])
        for mode in args.modes
        for target in args.targets
    }
    plain = tokenize([task.instruction for task in tasks])
    return Prompts([task.language for task in tasks], [task.name for task in tasks], plain, asked)


def complete(args: LengthControlArguments) -> tuple[LengthControlArguments, Run]:
    """The arguments with the models that they name, or the run's, and how those sample; and the run.

    Raises:
        ValueError: if a model is not named and there is no run, or the run was trained on data of its own.
    """
    run = find_run(args.run_dir, args.policy, args.length_value_model)
    data = run.data.get("dataset_name")
    if args.dataset_name is None and data is not None:
        raise ValueError(
            f"{run.folder} was trained on {data}, and the sandbox's prompts mean nothing to its policy: name a "
            "LIFEBench file with --dataset_name."
        )
    found = {"run_dir": run.folder, "policy": run.model("policy"), "temperature": run.record.get("temperature")}
    found["length_value_model"] = run.model("length_value_model")
    args = replace(args, **{name: value for name, value in found.items() if getattr(args, name) is None})
    for name in ("policy", "length_value_model"):
        if getattr(args, name) is None:
            raise ValueError(f"the run.json of {run.folder} names no {name}: give --{name}.")
    if args.temperature is None:
        fitted = (read_config(args.length_value_model).sampling or {}).get("temperature")
        args = replace(args, temperature=1.0 if fitted is None else fitted)
    return args, run


def make_sampler(args: LengthControlArguments, pad_token: str | None) -> tuple[LengthSampler, Prompts]:
    """The models, the prompts, and the sampler of both."""
    tokenizer = load_tokenizer(args.policy, pad_token)
    if args.dataset_name is None:
        instead = "Name a LIFEBench file with --dataset_name."
        check_sandbox(tokenizer, args.policy, "The prompts are", instead)
    prompts = load_prompts(args, tokenizer)
    value_model = load_length_value_model(args.length_value_model, args.base or args.policy, tokenizer=tokenizer)
    policy = load_policy(args.policy)
    ends = end_token_ids(tokenizer, policy.generation_config)
    sampler = LengthSampler(
        policy=policy,
        length_value_model=value_model,
        prompt_ids=prompts.ids,
        asked_ids=prompts.asked_ids,
        caps=args.caps,
        candidates=LengthGuidance(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p),
        rule=args.rule,
        tolerance=args.tolerance,
        eos_token_ids=ends,
        pad_token_id=padding_id(tokenizer, ends),
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        seed=args.seed,
        tokenizer=tokenizer,
    )
    return sampler, prompts


def summarise(
    args: LengthControlArguments, prompts: Prompts, completions: Sequence[Completion]
) -> tuple[list[dict[str, Any]], dict[tuple[str, str, int], list[Completion]]]:
    """Rows of numbers for each mode, target, arm and language, targets together last; and each cell's completions."""
    rows: list[dict[str, Any]] = []
    every: dict[tuple[str, str, int], list[Completion]] = {}
    languages = list(dict.fromkeys(prompts.languages))
    for mode in args.modes:
        cells = {
            (arm, target): cell_completions(completions, arm, mode, target, args.caps[target])
            for target in args.targets
            for arm in args.arms
        }
        every |= {(arm, mode, target): cell for (arm, target), cell in cells.items()}
        for target in [*args.targets, ALL]:
            for arm in args.arms:
                chosen = [(one, own) for own in args.targets if target in (own, ALL) for one in cells[arm, own]]
                for language in [ALL, *(languages if len(languages) > 1 else [])]:
                    part = [each for each in chosen if language in (ALL, prompts.languages[each[0].prompt])]
                    found, wanted = [one for one, _ in part], [own for _, own in part]
                    numbers = summarise_cell(found, wanted, mode, grade(prompts, found), args.seed)
                    rows.append({"arm": arm, "mode": mode, "target": target, "language": language, **numbers})
    return rows, every


def grade(prompts: Prompts, completions: Sequence[Completion]) -> list[bool] | None:
    """Whether each of the sandbox's answers is right; `None` for a dataset."""
    if prompts.answers is None:
        return None
    paid = sandbox_reward([one.ids for one in completions], [prompts.answers[one.prompt] for one in completions])
    return [value > 0.5 for value in paid]


def completion_lines(prompts: Prompts, completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase) -> bytes:
    """What was written, for people to read: a line of JSON for each completion."""
    lines = []
    for one in completions:
        text = tokenizer.decode(one.text_ids)
        entry = {"arm": one.arm, "mode": one.mode, "target": one.target, "prompt": prompts.names[one.prompt]}
        entry |= {"language": prompts.languages[one.prompt], "sample": one.sample, "tokens": one.length}
        entry |= {"finished": one.finished, "forced": one.forced, "text": text}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8", errors="backslashreplace")


def main(args: LengthControlArguments) -> dict[str, Any]:
    """Sample, score, print and write the comparison."""
    transformers_logging.set_verbosity_error()
    set_threads(sandbox=args.dataset_name is None)
    args, source = complete(args)
    home = Path(source.folder or OUTPUTS) if args.dataset_name is None else Path(OUTPUTS)
    output_dir = output_folder(args.output_dir, home / "length_control", REPORT, asdict(args), MODELS)
    sampler, prompts = make_sampler(args, source.data.get("pad_token"))
    identity = [weights_fingerprint(sampler.policy), weights_fingerprint(sampler.length_value_model)]
    completions = sampler.run(args.arms, args.modes, output_dir / "samples.journal", identity)
    rows, cells = summarise(args, prompts, completions)
    report = {"arguments": asdict(args), "caps": args.caps, "gamma": sampler.length_value_model.config.gamma}
    report |= {"prompts": len(prompts.ids), "cells": rows}
    save_json(output_dir / REPORT, report)
    save_csv(output_dir / "length_control.csv", rows)
    with atomic_file(output_dir / "completions.jsonl") as file:
        file.write(completion_lines(prompts, completions, sampler.tokenizer))
    plot_length_control(rows, cells, output_dir / "length_control.png")
    rule = f"temperature {args.temperature:g}, top-k {args.top_k}, top-p {args.top_p:g}, min-p {args.min_p:g}"
    title = f"{len(prompts.ids)} prompts x {args.num_samples} completions, rule {args.rule}; {rule}; seed {args.seed}"
    console = Console(width=190)
    print_tables(rows, title, console)
    empty = int(np.sum([one.length == 0 for one in completions]))
    if len(prompts.ids) == 1:
        console.print("There is one prompt, so no number has an interval: give more prompts.")
    console.print(f"{empty} of {len(completions)} completions are empty; they count. Written to {output_dir}/")
    return report


if __name__ == "__main__":
    run(LengthControlArguments, main, "eval.length_control", __doc__)
