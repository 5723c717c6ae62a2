"""Completions of a length-control comparison: every arm, mode and target, in batches that survive being killed.

A cell is an arm with a mode and a target. The base arm knows neither: it is sampled once, with the largest cap, and
every cell of it is those completions cut at the cell's own cap, which is what sampling with that cap would have given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from eval.engine import EngineRequest, GuidedEngine
from lenvm_rl.decoding.generation import generate_guided
from lenvm_rl.decoding.guidance import AT_LEAST, EQUAL_TO, FEASIBLE, PATIENT, LengthGuidance
from lenvm_rl.endings import strip_completion
from lenvm_rl.files import Journal
from lenvm_rl.modeling.backbones import context_of
from lenvm_rl.modeling.completions import pad_left, pad_right, token_log_probs
from lenvm_rl.rollouts.job import batch_seed
from lenvm_rl.tokenization import check_room

# Tokens in one forward that scores texts: their logits over a large vocabulary fill the memory.
SCORED_TOKENS = 1024
# Completions of an engine that are scored together, and lost together where a run is killed.
SCORED_COMPLETIONS = 32


@dataclass(frozen=True)
class LengthArm:
    """One way to get a length: it is asked for in the prompt, guided by the model, with a hard bound or without."""

    asked: bool = False
    guided: bool = False
    enforced: bool = False


BASE = "base"
ARMS = {
    BASE: LengthArm(),
    "prompt": LengthArm(asked=True),
    "guided": LengthArm(guided=True),
    "guided+prompt": LengthArm(asked=True, guided=True),
    "enforced": LengthArm(guided=True, enforced=True),
    "enforced+prompt": LengthArm(asked=True, guided=True, enforced=True),
}


@dataclass(frozen=True)
class Request:
    """One completion to be sampled.

    Args:
        arm (`str`): a name in [`ARMS`].
        prompt (`int`): index of the prompt.
        sample (`int`): which of the prompt's completions.
        mode (`str`, *optional*), target (`int`, *optional*): what length is wanted; `None` in the base arm.
    """

    arm: str
    prompt: int
    sample: int
    mode: str | None
    target: int | None


@dataclass(frozen=True)
class Completion(Request):
    """What was sampled for a request.

    Args:
        ids (list of `int`): as sampled, the end-of-sequence token included where there is one.
        finished (`bool`): it ended.
        forced (`int`): steps at which `enforce` changed the choice.
        nll (list of `float`): what each token cost, in nats: under the base policy at temperature 1, with no candidate
            rule, after the prompt *without* a length instruction.
    """

    ids: list[int]
    finished: bool
    forced: int
    nll: list[float]

    @property
    def length(self) -> int:
        """Tokens, end-of-sequence not counted."""
        return len(self.ids) - self.finished

    @property
    def text_ids(self) -> list[int]:
        """The tokens without end-of-sequence."""
        return self.ids[: self.length]

    @property
    def natural(self) -> bool:
        """Whether it ended, and `enforce` did not put the end.

        Where `enforce` puts an end after `target` tokens and changed any choice before, an end there counts as put.
        """
        put = ARMS[self.arm].enforced and self.forced > 0 and self.length >= self.target and self.mode != AT_LEAST
        return self.finished and not put

    def cut(self, cap: int) -> Completion:
        """As if at most `cap` tokens had been sampled, end-of-sequence counted."""
        if len(self.ids) <= cap:
            return self
        return replace(self, ids=self.ids[:cap], nll=self.nll[:cap], finished=False)


@dataclass
class LengthSampler:
    """Samples the cells of a comparison.

    The policy's own generation config is replaced by one that holds nothing but the end: no repetition penalty or the
    like acts.

    Args:
        policy (`PreTrainedModel`), length_value_model (`LengthValueModel`): in eval mode, and frozen.
        prompt_ids (sequence of lists of `int`): each prompt without a length instruction.
        asked_ids (mapping): `(mode, target)` to the ids of each prompt with that instruction.
        caps (mapping): target to the longest completion, end-of-sequence counted; at least ``target + 1``.
        candidates ([`LengthGuidance`]): temperature and candidate rule of every arm.
        rule (`str`), tolerance (`float`, *optional*): see [`LengthGuidance`].
        eos_token_ids (list of `int`), pad_token_id (`int`), tokenizer (*optional*): of the policy.
        num_samples (`int`), batch_size (`int`): completions per prompt and cell, and per `generate` call.
        seed (`int`): of the whole.
        engine ([`~eval.engine.GuidedEngine`], *optional*): samples in the place of `generate_guided`, all cells
            together; the policy says what texts cost.
    """

    policy: PreTrainedModel
    length_value_model: nn.Module
    prompt_ids: Sequence[list[int]]
    asked_ids: Mapping[tuple[str, int], Sequence[list[int]]]
    caps: Mapping[int, int]
    candidates: LengthGuidance
    rule: str
    tolerance: float | None
    eos_token_ids: list[int]
    pad_token_id: int
    num_samples: int
    batch_size: int
    seed: int
    tokenizer: PreTrainedTokenizerBase | None = None
    engine: GuidedEngine | None = None

    def __post_init__(self) -> None:
        self.policy.generation_config = GenerationConfig(
            eos_token_id=self.eos_token_ids, pad_token_id=self.pad_token_id
        )

    def plan(self, arms: Sequence[str], modes: Sequence[str]) -> list[list[Request]]:
        """The requests in batches: an arm's with one cap together, whatever their mode, sorted by prompt length. An
        engine makes batches of its own: for it, each request is one."""
        batches, size = [], self.batch_size if self.engine is None else 1
        for arm in arms:
            for cap in [max(self.caps.values())] if arm == BASE else sorted(set(self.caps.values())):
                wanted = [(mode, target) for target, own in self.caps.items() if own == cap for mode in modes]
                requests = [
                    Request(arm, prompt, sample, mode, target)
                    for mode, target in ([(None, None)] if arm == BASE else wanted)
                    for prompt in range(len(self.prompt_ids))
                    for sample in range(self.num_samples)
                ]
                requests.sort(key=lambda request: len(self._prompt(request)))
                widths = {request.prompt: len(self._prompt(request)) for request in requests}
                try:
                    check_room([widths[prompt] for prompt in sorted(widths)], cap, context_of(self.policy.config))
                except ValueError as error:
                    error.add_note("Completions are that long for --targets, --cap_factor and --cap_extra.")
                    raise
                batches += [requests[at : at + size] for at in range(0, len(requests), size)]
        return batches

    def run(self, arms: Sequence[str], modes: Sequence[str], path: Path, identity: Any) -> list[Completion]:
        """Every completion, sampled or read from the journal at `path`; each batch has a seed of its own.

        The journal stays, so that the same comparison can be summarised again; `identity`, anything with a `repr`,
        tells the models apart from others.
        """
        batches = self.plan(arms, modes)
        settings = [self.candidates, self.rule, self.tolerance, dict(self.caps), self.eos_token_ids, self.seed]
        settings += [] if self.engine is None else [self.engine.description]
        plan = [[list(asdict(request).values()) for request in batch] for batch in batches]
        prompts = [list(self.prompt_ids), [[list(key), list(rows)] for key, rows in self.asked_ids.items()]]
        job = json.dumps([repr(identity), repr(settings), plan, prompts])
        journal = Journal(path, hashlib.sha256(job.encode()).hexdigest())
        done = journal.open()
        missing = {index: batch for index, batch in enumerate(batches) if index not in done}
        total = sum(map(len, batches))
        sample = self._sample_by_turns if self.engine is None else self._sample_by_engine
        before = total - sum(map(len, missing.values()))
        with tqdm(total=total, initial=before, desc="sampling", unit="completion") as bar:
            for index, sampled in sample(missing):
                done[index] = [asdict(completion) for completion in sampled]
                journal.append(index, done[index])
                bar.set_postfix_str(f"{sampled[0].arm}, {sampled[0].target or 'any'} tokens")
                bar.update(len(sampled))
        return [Completion(**record) for index in sorted(done) for record in done[index]]

    def _sample_by_turns(self, batches: Mapping[int, list[Request]]) -> Iterator[tuple[int, list[Completion]]]:
        for index, batch in batches.items():
            yield index, self.sample(batch, batch_seed(self.seed, index))

    def _sample_by_engine(self, batches: Mapping[int, list[Request]]) -> Iterator[tuple[int, list[Completion]]]:
        """The completions of all batches, each of one request, as they end; the longest begin first, so that few go on
        when the others are over."""
        requests = sorted(((index, batch[0]) for index, batch in batches.items()), key=lambda each: -self._cap(each[1]))
        asked = [
            EngineRequest(self._prompt(one), self._guidance(one), self._cap(one), batch_seed(self.seed, index))
            for index, one in requests
        ]
        ended: list[tuple[int, list[int]]] = []
        for count, completed in enumerate(self.engine.complete(asked, self.eos_token_ids), start=1):
            ended.append(completed)
            if len(ended) == SCORED_COMPLETIONS or count == len(asked):
                ended.sort(key=lambda each: len(each[1]))
                rows = [ids for _, ids in ended]
                found = self._as_completions([requests[number][1] for number, _ in ended], rows, [0] * len(ended))
                yield from ((requests[number][0], [one]) for (number, _), one in zip(ended, found, strict=True))
                ended = []

    @torch.no_grad()
    def sample(self, batch: Sequence[Request], seed: int) -> list[Completion]:
        """The completions of one batch, whose cap is its largest target's."""
        cap = max(self._cap(request) for request in batch)
        ids, mask = pad_left([self._prompt(request) for request in batch], self.pad_token_id, self.policy.device)
        torch.manual_seed(seed)
        output, report = generate_guided(
            self.policy,
            self.length_value_model,
            {"input_ids": ids, "attention_mask": mask},
            [self._guidance(request) for request in batch],
            tokenizer=self.tokenizer,
            max_new_tokens=cap,
            return_report=True,
        )
        return self._as_completions(batch, output[:, ids.shape[1] :].tolist(), report.forced.tolist())

    def _as_completions(
        self, requests: Sequence[Request], rows: Sequence[list[int]], forced: Sequence[int]
    ) -> list[Completion]:
        """What was sampled for requests, and what it costs; what goes beyond a request's own cap is cut off."""
        stripped = [
            strip_completion(row[: self._cap(request)], self.eos_token_ids, self._cap(request))
            for request, row in zip(requests, rows, strict=True)
        ]
        costs = completion_nll(
            self.policy, [self.prompt_ids[each.prompt] for each in requests], [kept for kept, _ in stripped]
        )
        return [
            Completion(**asdict(request), ids=kept, finished=reason == "stop", forced=steps, nll=cost)
            for request, (kept, reason), cost, steps in zip(requests, stripped, costs, forced, strict=True)
        ]

    def _cap(self, request: Request) -> int:
        return max(self.caps.values()) if request.target is None else self.caps[request.target]

    def _prompt(self, request: Request) -> list[int]:
        if ARMS[request.arm].asked:
            return self.asked_ids[request.mode, request.target][request.prompt]
        return self.prompt_ids[request.prompt]

    def _guidance(self, request: Request) -> LengthGuidance:
        arm = ARMS[request.arm]
        if not arm.guided:
            return self.candidates
        return replace(
            self.candidates,
            mode=request.mode,
            target_length=request.target,
            rule=FEASIBLE if self.rule == PATIENT and request.mode != EQUAL_TO else self.rule,
            tolerance=self.tolerance if request.mode == EQUAL_TO else None,
            enforce=arm.enforced,
        )


def cell_completions(completions: Sequence[Completion], arm: str, mode: str, target: int, cap: int) -> list[Completion]:
    """The completions of one cell, by prompt and sample; the base arm's are cut at `cap` tokens, the end counted."""
    wanted = (None, None) if arm == BASE else (mode, target)
    own = [each.cut(cap) for each in completions if each.arm == arm and (each.mode, each.target) == wanted]
    return sorted(own, key=lambda each: (each.prompt, each.sample))


@torch.no_grad()
def completion_nll(
    policy: PreTrainedModel, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]]
) -> list[list[float]]:
    """Negative log-probability of each completion's tokens after its prompt, in nats, at temperature 1 and with all
    tokens candidates; the end-of-sequence token is one of them where there is one."""
    width = max(len(row) for row in prompt_ids) + max(len(row) for row in completion_ids)
    size = max(1, SCORED_TOKENS // width)
    found: list[list[float]] = []
    for start in range(0, len(prompt_ids), size):
        prompts, completions = prompt_ids[start : start + size], completion_ids[start : start + size]
        batch = (*pad_left(prompts, device=policy.device), *pad_right(completions, device=policy.device))
        costs = (-token_log_probs(policy, *batch)).tolist()
        # Ten thousandths of a nat: no measure needs more, and the journal holds one number a token.
        found += [[round(value, 4) for value in row[: len(own)]] for row, own in zip(costs, completions, strict=True)]
    return found
