"""Answers side by side, for the page: of the base policy, tilted ones, and of the policies that a run has trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.compare.training import World
from eval.graded import sandbox_prompts
from eval.runs import RecipeRun, read_report
from eval.tradeoff.sampler import Arm, value_scale
from lenvm_rl.modeling.loading import load_policy
from lenvm_rl.sandbox import DIFFICULTIES, read_completion
from lenvm_rl.sandbox.task import EOS

# Strength of the tilt, in units of 1/std(V).
TILT = 0.5
# Arms of `eval.tradeoff` that train nothing for length, by their kinds: those of the base policy, and tilted answers of
# the policy that the task's reward alone has trained, which is the first of its kind itself.
TASK_POLICY = "task_only"
TILTED, TASK_TILTED = "tilt", f"tilt of {TASK_POLICY}"
DECODING = ("base", "truncation", TILTED, TASK_TILTED)


def sample_answers(world: World) -> list[dict[str, Any]]:
    """A prompt of each difficulty, with an answer of every policy, and which of its tokens are waste."""
    data = sandbox_prompts(len(DIFFICULTIES))
    sampler = replace(world.sampler, prompts=data.prompts, columns=data.columns, num_samples=1)
    run = RecipeRun(world.folder, read_report(Path(world.folder) / "run.json") or {})
    base = load_policy(world.path("policy"))
    arms = [sampler.sample("base", "base", base)]
    unit = 1.0 / value_scale(world.length_value_model(), sampler.prompt_ids, arms[0].completions)
    arms.append(sampler.sample(f"tilt {TILT:+g}", "tilt", base, TILT * unit))
    arms += [sampler.sample(name, "trained", load_policy(path)) for name, path in run.trained.items()]
    return [
        {"prompt": prompt, "rows": [answer_row(world, arm, number) for arm in arms]}
        for number, prompt in enumerate(data.prompts)
    ]


def answer_row(world: World, arm: Arm, prompt: int) -> dict[str, Any]:
    """The answer of an arm to a prompt."""
    place = arm.prompt.tolist().index(prompt)
    tokens = world.tokenizer.convert_ids_to_tokens(arm.completions[place])
    tokens = [token for token in tokens if token != EOS]
    wasted = read_completion(tokens).wasted
    return {
        "name": arm.name,
        "text": " ".join(tokens),
        "waste": [*wasted, *[False] * (len(tokens) - len(wasted))],
        "correct": bool(arm.correct[place]),
    }


def decoding_arms(world: World) -> list[dict[str, Any]]:
    """What `eval.tradeoff` found of a world's policies without a price on length, if it has been run in the folder."""
    report = read_report(Path(world.folder) / "tradeoff" / "tradeoff.json") or {"arms": []}
    found = []
    for arm in report["arms"]:
        kind = TASK_TILTED if arm["name"] == TASK_POLICY else arm["kind"]
        if kind in DECODING:
            point = {name: arm[name] for name in ("name", "tokens", "accuracy")}
            found.append({"policy": world.fingerprint, "kind": kind, **point})
    return found
