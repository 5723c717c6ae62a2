"""How a program is started, and whose models it evaluates: a recipe's run's, or models of one's own.

What a run says of itself (prompts, sampling, reward, other policies) holds for its own models, and its results go to
its folder. A model that is named by its path belongs to no run unless one is named too: nothing of the built-in
sandbox's is taken for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.files import read_json
from lenvm_rl.modeling.loading import read_config
from lenvm_rl.programs import ProgramParser, choose_threads, run_program
from lenvm_rl.sandbox import sandbox_tokenizer
from lenvm_rl.tokenization import tokenizer_fingerprint

logger = logging.getLogger(__name__)

SANDBOX_RUN = "outputs/sandbox"
OUTPUTS = "outputs"
# Candidates of every arm where prompts are not the sandbox's: the paper's for LIFEBench.
CANDIDATES = {"top_k": 15, "top_p": 0.999, "min_p": 0.0}
SANDBOX_CANDIDATES = {"top_k": 0, "top_p": 1.0, "min_p": 0.01}
# Where neither the run nor the length value model says how completions are sampled.
UNKNOWN_SAMPLING = {"temperature": 1.0, "max_new_tokens": 256}
# Arguments of a trainer for a small run on a processor that leaves nothing behind.
QUIET = {
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}

GOES_ON = "Interrupted. What was sampled is kept: run the same command again, and it goes on from there."
STARTS_OVER = "Interrupted before anything was written: the same command starts over."


def run_evaluation(
    arguments: type, main: Callable[[Any], Any], program: str, description: str, interrupted: str = GOES_ON
) -> None:
    """Reads the command line and calls `main` with what it says; what is refused ends in a sentence."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = ProgramParser(arguments, prog=f"python -m {program}", description=description)
    run_program(lambda: main(*parser.parse_args_and_config()), interrupted)


@dataclass
class ModelArguments:
    """Which models are looked at, and at which temperature they are sampled."""

    run_dir: str | None = HfArg(
        default=None,
        help="Folder of a recipe's run; its run.json says what was trained, on what, and how it samples. Default: "
        f"{SANDBOX_RUN}, or none where --policy is a model of one's own.",
    )
    policy: str | None = HfArg(
        default=None, help="Base policy, folder or hub id; needs --length_value_model. Default: the run's."
    )
    length_value_model: str | None = HfArg(
        default=None, help="Length value model, folder or hub id. Default: the run's."
    )
    base: str | None = HfArg(
        default=None,
        help="The model that a length value model of form adapter or head was fitted on. Default: the base policy.",
    )
    temperature: float | None = HfArg(
        default=None,
        help="Sampling temperature. Default: as in the run, or in the rollouts that the length value model was "
        "fitted on, else 1.",
    )

    def from_run(self, run: RecipeRun, **defaults: Any) -> Self:
        """These arguments with what is not given filled in by what the run says of itself, or else by `defaults`."""
        defaults |= {name: run.record.get(name) for name in UNKNOWN_SAMPLING} | {"run_dir": run.folder}
        defaults |= {name: run.model(name) for name in ("policy", "length_value_model")}
        unknown = {name: value for name, value in defaults.items() if getattr(self, name, value) is None}
        complete = replace(self, **{name: value for name, value in unknown.items() if hasattr(self, name)})
        for name in ("policy", "length_value_model"):
            if getattr(complete, name) is None:
                raise ValueError(f"the run.json of {run.folder} names no {name}: give --{name}.")
        return complete

    def as_fitted(self) -> Self:
        """These arguments sampled, where nobody said how, as the rollouts that the length value model was fitted on.

        Lengths under other settings are other lengths, of which the model knows nothing.
        """
        unknown = [name for name in UNKNOWN_SAMPLING if getattr(self, name, 0) is None]
        fitted = (read_config(self.length_value_model).sampling or {}) if unknown else {}
        settings = {}
        for name in unknown:
            known = fitted.get(name) is not None
            settings[name] = fitted[name] if known else UNKNOWN_SAMPLING[name]
            where = "as in the rollouts of the length value model" if known else "for nothing says how it was sampled"
            logger.info("%s %s, %s; --%s sets another", name, settings[name], where, name)
        return replace(self, **settings)


@dataclass
class RunArguments(ModelArguments):
    """Which models are evaluated, on which prompts, how they are sampled, and where results are written."""

    policy: str | None = HfArg(
        default=None,
        help="Base policy, folder or hub id; needs --length_value_model and --dataset_name. Default: the run's.",
    )
    dataset_name: str | None = HfArg(
        default=None,
        help="Prompts to evaluate on: a hub id or a local .jsonl, .json, .parquet or .csv file. Default: the "
        "sandbox's, for its own policies.",
    )
    batch_size: int = HfArg(default=256, help="Completions per generate call.")
    seed: int = HfArg(default=0, help="Seed of sampling and bootstrap; the prompts do not depend on it.")
    output_dir: str | None = HfArg(
        default=None,
        help="Where to write. Default: a folder with the program's name, in the run's folder or, for models of no "
        "run, in outputs.",
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_prompts", "num_samples"):
            if getattr(self, name, None) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass
class CandidateArguments(RunArguments):
    """Arguments of a program whose arms all have one candidate rule."""

    _argument_group_name = "Candidate tokens"

    top_k: int | None = HfArg(
        default=None, help="Candidate rule of every arm: top-k, 0 for none. Default: 15; sandbox: 0."
    )
    top_p: float | None = HfArg(
        default=None, help="Candidate rule of every arm: top-p, 1 for none. Default: 0.999; sandbox: 1."
    )
    min_p: float | None = HfArg(
        default=None, help="Candidate rule of every arm: min-p, 0 for none. Default: 0; sandbox: 0.01."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (SANDBOX_CANDIDATES if self.dataset_name is None else CANDIDATES).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def candidates(self) -> LengthGuidance:
        """Temperature and candidate rule; no guidance."""
        rule = {name: getattr(self, name) for name in CANDIDATES}
        return LengthGuidance(temperature=self.temperature, **rule)

    @property
    def candidate_text(self) -> str:
        """The same in words."""
        return (
            f"temperature {self.temperature:g}, top-k {self.top_k}, top-p {self.top_p:g}, min-p {self.min_p:g}; seed "
            f"{self.seed}"
        )


@dataclass(frozen=True)
class RecipeRun:
    """A recipe's run, or none: its folder, and what its run.json holds."""

    folder: str | None
    record: Mapping[str, Any]

    def place(self, name: str) -> str:
        """A path of run.json: inside the run's folder if it is there, as it is otherwise."""
        inside = Path(self.folder or "") / name
        return str(inside) if inside.exists() else name

    def model(self, name: str) -> str | None:
        """Path of the run's `policy` or `length_value_model`; `None` if it names none."""
        return self.place(self.record[name]) if self.record.get(name) else None

    @property
    def trained(self) -> dict[str, str]:
        """Name and path of every trained policy."""
        return {name: self.place(path) for name, path in self.record.get("trained", {}).items()}

    @property
    def data(self) -> Mapping[str, Any]:
        """What the run was trained on; empty for the sandbox."""
        return self.record.get("data", {})


def find_run(
    run_dir: str | None, policy: str | None, length_value_model: str | None, among_trained: bool = False
) -> RecipeRun:
    """The run that the arguments of a program name: the sandbox's, unless a folder or a model of one's own is named.

    With `among_trained`, the policy may be the name of one that the sandbox's run has trained.
    """
    if run_dir is None and among_trained and policy is not None and not Path(policy).exists():
        sandbox = read_report(Path(SANDBOX_RUN) / "run.json") or {}
        run_dir = SANDBOX_RUN if policy in sandbox.get("trained", {}) else None
    if run_dir is None and policy is not None:
        if length_value_model is None:
            raise ValueError(
                f"--policy {policy} is a model of your own: give the --length_value_model that was made for it too, or "
                "name the folder of the run that it belongs to with --run_dir."
            )
        return RecipeRun(None, {})
    folder = run_dir or SANDBOX_RUN
    path = Path(folder) / "run.json"
    record = read_report(path)
    if record is None and not (policy and length_value_model):
        raise ValueError(
            f"{path} does not exist: run `make quickstart` or `accelerate launch recipes/ppo_shaped.py` first, name "
            "the run's folder with --run_dir, or give --policy and --length_value_model."
        )
    return RecipeRun(folder, record or {})


def read_report(path: Path) -> dict[str, Any] | None:
    """What a program wrote as JSON; `None` if the file is not there."""
    remedy = "move it away; what wrote it writes it anew"
    record = read_json(path, remedy) if path.is_file() else None
    if not isinstance(record, dict | None):
        raise ValueError(f"{path} holds no record: {remedy}.")
    return record


def is_sandbox(tokenizer: PreTrainedTokenizerBase | Mapping[str, Any]) -> bool:
    """Whether a tokenizer, or a fingerprint, is the built-in sandbox's, so that its prompts mean something."""
    found = tokenizer if isinstance(tokenizer, Mapping) else tokenizer_fingerprint(tokenizer)
    return found.get("sha256") == tokenizer_fingerprint(sandbox_tokenizer())["sha256"]


def check_sandbox(tokenizer: PreTrainedTokenizerBase, policy: str, what: str, instead: str) -> None:
    """Raise unless a policy, named by its path, reads the sandbox's words: say what it is given, and what to give."""
    if not is_sandbox(tokenizer):
        raise ValueError(
            f"{what} the built-in sandbox's, which mean nothing to {policy}: its vocabulary is another. {instead}"
        )
    logger.info("%s the built-in sandbox's.", what)


def set_threads(sandbox: bool) -> None:
    """Threads on a CPU: one for models of the sandbox's size, else all cores, unless the environment says how many.

    With one the sandbox is as fast as with two, and the numbers do not depend on the cores.
    """
    if not torch.cuda.is_available():
        choose_threads(1 if sandbox else None)


def output_folder(
    given: str | None, default: str | Path, report: str, arguments: Mapping[str, Any], about: Sequence[str]
) -> Path:
    """The folder that a program writes to, made if it is not there and checked to be writable.

    Args:
        given (`str`, *optional*): what was asked for.
        default (`str` or path): where to write otherwise; refused if results about other models are there.
        report (`str`): name of the report there, which holds the `arguments` that it was made with.
        arguments (mapping): of this call.
        about (sequence of `str`): which of them name what is evaluated.
    """
    folder = Path(given or default)
    before = (read_report(folder / report) or {}).get("arguments", {}) if given is None else {}
    changed = [name for name in about if before and _inside_run(before, name) != _inside_run(arguments, name)]
    if changed:
        theirs = ", ".join(f"{name} {before.get(name)}" for name in changed)
        raise ValueError(
            f"{folder} has results about something else ({theirs}): name another folder with --output_dir, or this one "
            "to write over them."
        )
    check_writable(folder)
    return folder


def check_writable(folder: str | Path) -> None:
    """Makes a folder if it is not there, and raises an `OSError` now if nothing can be written to it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    probe = Path(folder) / ".writable"
    probe.write_bytes(b"")
    probe.unlink()


def _inside_run(arguments: Mapping[str, Any], name: str) -> Any:
    """An argument; a path inside the run's folder without that folder, which may have been moved."""
    value, folder = arguments.get(name), arguments.get("run_dir")
    inside = isinstance(value, str) and folder is not None and Path(value).is_relative_to(folder)
    return str(Path(value).relative_to(folder)) if inside else value
