"""Length control, LIFEBench in tokens: asking for a length against guiding the decoding to it, and both together.

    python -m eval.length_control                       # on the sandbox, with what recipes/ppo_shaped.py left
    python -m eval.length_control --policy PATH --length_value_model PATH --dataset_name data_lite_no_summary.jsonl
    .venv-vllm/bin/python -m eval.length_control … --backend vllm --dtype bfloat16   # sampled by vLLM

Arms: the base policy; with the length asked for in the prompt; guided by the length value model without a word in the
prompt; guided and asked; and, on demand, with the bound enforced. All have one candidate rule and one definition of
length: tokens without end-of-sequence. A completion that reaches the cap counts with the length that it was cut at.
Prints a table per mode and writes length_control.json, .csv and .png, completions.jsonl, and samples.journal: a run
that is killed and started again goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

from eval.datasets import sandbox_problems
from eval.engine import VLLM, SamplingArguments
from eval.length_control.prompts import read_tasks, with_length
from eval.length_control.report import ACCURACY, ALL, COLUMNS, SCORED_MODES, plot_length_control, summarise_cell
from eval.length_control.sampler import ARMS, Completion, LengthSampler, cell_completions
from eval.report import print_table, save_report
from eval.runs import OUTPUTS, RecipeRun, check_sandbox, find_run, output_folder, run_evaluation, set_threads
from lenvm_rl.decoding.guidance import RULES
from lenvm_rl.endings import end_token_ids, padding_id
from lenvm_rl.files import atomic_file
from lenvm_rl.modeling.loading import load_length_value_model, load_policy, load_tokenizer
from lenvm_rl.prediction import weights_fingerprint
from lenvm_rl.tokenization import as_chats, tokenize_prompts
from reward.sandbox import sandbox_reward

SANDBOX, SANDBOX_TARGETS, LIFEBENCH_TARGETS = "sandbox", [8, 16, 32], [32, 64, 128, 256]
# What a comparison is about: results about others are not written over.
MODELS = ("policy", "length_value_model", "dataset_name")


@dataclass
class LengthControlArguments(SamplingArguments):
    """What to compare, on which prompts, and where to write it."""

    dataset_name: str | None = HfArg(
        default=None,
        help="A LIFEBench file (JSONL with id, category, lang and task). Default: the sandbox's evaluation prompts, "
        "for its own policies.",
    )
    languages: list[str] = HfArg(default_factory=lambda: ["en", "zh"], help="Languages of the file.")
    chat: bool = HfArg(
        default=True, help="Wrap the dataset's prompts as a user's message, for the policy's chat template."
    )
    num_prompts: int | None = HfArg(
        default=None, help="Prompts, by turns from each language and category. Default: all; sandbox: 320."
    )
    max_characters: int | None = HfArg(
        default=None, help="Leave longer tasks of the file out; how many is logged. Default: none."
    )
    num_samples: int = HfArg(default=1, help="Completions per prompt and cell.")
    arms: list[str] = HfArg(default_factory=list, help=f"Some of {', '.join(ARMS)}. Default: all that enforce nothing.")
    modes: list[str] = HfArg(default_factory=lambda: list(SCORED_MODES), help="Length constraints.")
    targets: list[int] = HfArg(
        default_factory=list, help=f"Tokens to ask for. Default: {LIFEBENCH_TARGETS}; on the sandbox {SANDBOX_TARGETS}."
    )
    cap_factor: float = HfArg(default=2.0, help="Longest completion: this times the target, ...")
    cap_extra: int = HfArg(default=64, help="... or this many tokens more than it, if that is longer.")
    rule: str = HfArg(
        default="feasible", help="Rule of the guidance: paper, feasible, or patient (for equal_to, feasible elsewhere)."
    )
    tolerance: float | None = HfArg(default=None, help="Tolerance of equal_to with feasible.")
    batch_size: int = HfArg(default=48, help="Completions per generate call; vllm: that decode together.")

    def __post_init__(self) -> None:
        super().__post_init__()
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
        possible = [arm for arm in ARMS if self.dataset_name is not None or not ARMS[arm].asked]
        self.arms = self.arms or [arm for arm in possible if not ARMS[arm].enforced]
        if not set(self.arms) <= set(possible):
            raise ValueError(f"arms: the sandbox's prompts cannot ask for a length, so only {possible} are possible.")
        if self.backend == VLLM and any(ARMS[arm].enforced for arm in self.arms):
            raise ValueError("arms: vLLM does not tell what a bound overruled; enforce with --backend transformers.")

    @property
    def caps(self) -> dict[int, int]:
        """Longest completion for each target, end-of-sequence counted."""
        return {target: max(int(self.cap_factor * target), target + self.cap_extra) for target in self.targets}


@dataclass
class LengthPrompts:
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


def length_prompts(args: LengthControlArguments, tokenizer: PreTrainedTokenizerBase) -> LengthPrompts:
    """The dataset's prompts with and without each length instruction, or the sandbox's evaluation prompts."""
    if args.dataset_name is None:
        problems = sandbox_problems(args.num_prompts or 320)
        texts = [problem.prompt for problem in problems]
        answers = [problem.answer for problem in problems]
        return LengthPrompts([SANDBOX] * len(texts), texts, tokenize_prompts(tokenizer, texts), {}, answers)
    tasks = read_tasks(args.dataset_name, args.languages, args.num_prompts, args.max_characters)

    def tokenize(texts: list[str]) -> list[list[int]]:
        chats = as_chats(texts)
        return tokenize_prompts(tokenizer, chats if args.chat else texts)

    asked = {
        (mode, target): tokenize([with_length(task.instruction, task.language, mode, target) for task in tasks])
        for mode in args.modes
        for target in args.targets
    }
    plain = tokenize([task.instruction for task in tasks])
    return LengthPrompts([task.language for task in tasks], [task.name for task in tasks], plain, asked)


def with_models(args: LengthControlArguments) -> tuple[LengthControlArguments, RecipeRun]:
    """The arguments with the models that they name, or the run's, and how those sample; and the run."""
    source = find_run(args.run_dir, args.policy, args.length_value_model)
    data = source.data.get("dataset_name")
    if args.dataset_name is None and data is not None:
        raise ValueError(
            f"{source.folder} was trained on {data}, and the sandbox's prompts mean nothing to its policy: name a "
            "LIFEBench file with --dataset_name."
        )
    return args.from_run(source).as_fitted(), source


def load_sampler(args: LengthControlArguments, pad_token: str | None) -> tuple[LengthSampler, LengthPrompts]:
    """The models, the prompts, and the sampler of both."""
    tokenizer = load_tokenizer(args.policy, pad_token)
    if args.dataset_name is None:
        check_sandbox(tokenizer, args.policy, "The prompts are", "Name a LIFEBench file with --dataset_name.")
    prompts = length_prompts(args, tokenizer)
    policy = load_policy(args.policy)
    ends = end_token_ids(tokenizer, policy.generation_config)
    sampler = LengthSampler(
        policy=policy,
        length_value_model=load_length_value_model(
            args.length_value_model, args.base or args.policy, tokenizer=tokenizer
        ),
        prompt_ids=prompts.ids,
        asked_ids=prompts.asked_ids,
        caps=args.caps,
        candidates=args.candidates,
        rule=args.rule,
        tolerance=args.tolerance,
        eos_token_ids=ends,
        pad_token_id=padding_id(tokenizer, ends),
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        seed=args.seed,
        tokenizer=tokenizer,
        engine=args.make_engine(
            lambda: max(map(len, chain(prompts.ids, *prompts.asked_ids.values()))) + max(args.caps.values())
        ),
    )
    return sampler, prompts


def summarise_cells(
    args: LengthControlArguments, prompts: LengthPrompts, cells: dict[tuple[str, str, int], list[Completion]]
) -> list[dict[str, Any]]:
    """Rows of numbers for each mode, target, arm and language, targets together last."""
    rows: list[dict[str, Any]] = []
    languages = list(dict.fromkeys(prompts.languages))
    for mode in args.modes:
        for target in [*args.targets, ALL]:
            for arm in args.arms:
                chosen = [(one, own) for own in args.targets if target in (own, ALL) for one in cells[arm, mode, own]]
                for language in [ALL, *(languages if len(languages) > 1 else [])]:
                    part = [each for each in chosen if language in (ALL, prompts.languages[each[0].prompt])]
                    found, wanted = zip(*part, strict=True)
                    numbers = summarise_cell(found, wanted, mode, right_answers(prompts, found), args.seed)
                    rows.append({"arm": arm, "mode": mode, "target": target, "language": language, **numbers})
    return rows


def right_answers(prompts: LengthPrompts, completions: Sequence[Completion]) -> list[bool] | None:
    """Whether each of the sandbox's answers is right; `None` for a dataset."""
    if prompts.answers is None:
        return None
    paid = sandbox_reward([one.ids for one in completions], [prompts.answers[one.prompt] for one in completions])
    return [value > 0.5 for value in paid]


def completion_lines(
    prompts: LengthPrompts, completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase
) -> bytes:
    """What was written, for people to read: a line of JSON for each completion."""
    lines = []
    for one in completions:
        entry = {"arm": one.arm, "mode": one.mode, "target": one.target, "prompt": prompts.names[one.prompt]}
        entry |= {"language": prompts.languages[one.prompt], "sample": one.sample, "tokens": one.length}
        entry |= {"finished": one.finished, "forced": one.forced, "text": tokenizer.decode(one.text_ids)}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8", errors="backslashreplace")


def main(args: LengthControlArguments) -> dict[str, Any]:
    """Sample, score, print and write the comparison."""
    transformers_logging.set_verbosity_error()
    set_threads(sandbox=args.dataset_name is None)
    args, source = with_models(args)
    home = Path(source.folder or OUTPUTS) if args.dataset_name is None else Path(OUTPUTS)
    output_dir = output_folder(args.output_dir, home / "length_control", "length_control.json", asdict(args), MODELS)
    sampler, prompts = load_sampler(args, source.data.get("pad_token"))
    identity = [weights_fingerprint(sampler.policy), weights_fingerprint(sampler.length_value_model)]
    completions = sampler.run(args.arms, args.modes, output_dir / "samples.journal", identity)
    cells = {
        (arm, mode, target): cell_completions(completions, arm, mode, target, cap)
        for arm in args.arms
        for mode in args.modes
        for target, cap in args.caps.items()
    }
    rows = summarise_cells(args, prompts, cells)
    report = {"arguments": asdict(args), "caps": args.caps, "gamma": sampler.length_value_model.config.gamma}
    report |= {"prompts": len(prompts.ids), "cells": rows}
    save_report(output_dir, "length_control", report, rows)
    with atomic_file(output_dir / "completions.jsonl") as file:
        file.write(completion_lines(prompts, completions, sampler.tokenizer))
    plot_length_control(rows, cells, output_dir / "length_control.png")
    console = Console(width=190)
    count = f"{len(prompts.ids)} prompts x {args.num_samples} completions"
    console.print(f"{count}, rule {args.rule}; {args.candidate_text}")
    columns = COLUMNS if prompts.answers is None else [*COLUMNS, ACCURACY]
    for mode in args.modes:
        shown = [row for row in rows if (row["mode"], row["language"]) == (mode, ALL)]
        print_table(console, shown, columns, mode.replace("_", " "), sections=lambda row: row["target"])
    console.print(
        "Ended: by itself, neither cut nor put there. Perplexity, NLL and end NLL: under the base policy without a "
        "length instruction. All intervals are in the files."
    )
    if len(prompts.ids) == 1:
        console.print("There is one prompt, so no number has an interval: give more prompts.")
    empty = sum(one.length == 0 for one in completions)
    console.print(f"{empty} of {len(completions)} completions are empty; they count. Written to {output_dir}/")
    return report


if __name__ == "__main__":
    run_evaluation(LengthControlArguments, main, "eval.length_control", __doc__)
