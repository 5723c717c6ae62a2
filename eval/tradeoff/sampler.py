"""Samples completions of one set of prompts in different ways, grades them, and says how far they are from the base.

One definition of length holds for every arm: the tokens of a completion, end-of-sequence not counted. One candidate
rule (top-k, top-p, min-p) holds for every arm, the base policy included.

How far is a Kullback-Leibler divergence of completions, in nats. By the chain rule, it is the mean, over completions of
the first distribution, of the sum over the states that they visit of the divergence of the next token. So each
completion's sum of *exact* divergences of the next token, over all candidates, is an unbiased estimate, with less
variance than the log-ratio of the sampled tokens, whose conditional expectation it is (Rao & Blackwell). It counts up
to the end or the cut: it is the divergence of completions of at most `max_new_tokens` tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eval.engine import EngineRequest, GuidedEngine
from eval.graded import grade
from lenvm_rl.decoding.generation import LengthGuidance, LengthGuidedLogitsProcessor, generate_guided
from lenvm_rl.endings import end_token_ids, own_length, padding_id, strip_completion
from lenvm_rl.files import atomic_file
from lenvm_rl.modeling.backbones import context_of
from lenvm_rl.modeling.completions import choice_logits, pad_left, pad_right
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.prediction import weights_fingerprint
from lenvm_rl.rollouts.job import batch_seed
from lenvm_rl.tokenization import check_room, check_same_tokenizer, tokenize_prompts

logger = logging.getLogger(__name__)

# Logits held at once by one forward: 128 MiB in float32.
LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Arm:
    """N graded completions of one way of sampling.

    Args:
        name (`str`): unique name in the comparison.
        kind (`str`): a name in `eval.tradeoff.arms.KINDS`, or `"tilt of NAME"` for a trained policy.
        setting (`float`): budget in tokens, number of samples to choose from, strength of a tilt of the base; or NaN.
        completions (list of lists of `int`): sampled ids, end-of-sequence kept.
        lengths (`numpy.ndarray` of shape `(N,)`): tokens, end-of-sequence not counted.
        finished (`numpy.ndarray` of shape `(N,)`): whether the completion ended.
        correct (`numpy.ndarray` of shape `(N,)`): whether it is correct; false where it was not graded.
        prompt (`numpy.ndarray` of shape `(N,)`): index of its prompt.
        kl (`numpy.ndarray` of shape `(N,)`, *optional*):
            Each completion's estimate of the divergence from the base policy, in nats.
        kl_bound (`float`, *optional*): a bound that the divergence is known not to exceed, in nats.
        sampled (`numpy.ndarray` of shape `(N,)`, *optional*): tokens sampled for it, where that is more than its own.
        graded (`numpy.ndarray` of shape `(N,)`, *optional*): whether it was graded; all were when omitted.
    """

    name: str
    kind: str
    setting: float
    completions: list[list[int]]
    lengths: np.ndarray
    finished: np.ndarray
    correct: np.ndarray
    prompt: np.ndarray
    kl: np.ndarray | None = None
    kl_bound: float | None = None
    sampled: np.ndarray | None = None
    graded: np.ndarray | None = None

    @property
    def is_graded(self) -> np.ndarray:
        """`graded`, with one entry per completion in any case."""
        return np.ones(len(self.lengths), dtype=bool) if self.graded is None else self.graded


@dataclass(frozen=True)
class Samples:
    """Sampled completions of an arm before they are graded: ids, whether each ended, and `kl` as [`Arm`] has it."""

    completions: list[list[int]]
    finished: list[bool]
    kl: list[float] | None


class SampleStore:
    """Sampled arms in a folder, a file each, so that an interrupted comparison goes on where it was.

    A file's name is a hash of all that its samples depend on, weights included: another comparison in the same folder
    uses what it shares with this one, and nothing else. The folder is made when the first arm is kept.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._fingerprints: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

    def get(self, name: str, models: Sequence[nn.Module], depends: Any, sample: Callable[[], Samples]) -> Samples:
        """The samples of the arm `name`, read or else made by `sample` and kept.

        They depend on `models`, and on what `depends` holds as JSON can hold it.
        """
        for model in models:
            if model not in self._fingerprints:
                self._fingerprints[model] = weights_fingerprint(model)
        identity = json.dumps([[self._fingerprints[model] for model in models], depends])
        path = self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        if path.is_file():
            logger.info("%s: sampled before, %s", name, path)
            return Samples(**json.loads(path.read_text(encoding="ascii")))
        samples = sample()
        with atomic_file(path) as file:
            file.write(json.dumps(asdict(samples)).encode("ascii"))
        return samples


def token_divergence(scores: Tensor, reference: Tensor) -> Tensor:
    """``KL(p || q)`` of the softmaxes `p` of `scores` and `q` of `reference`, `(..., V)`, in float64: `(...)`."""
    p, q = (each.double().log_softmax(dim=-1) for each in (scores, reference))
    return torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum(dim=-1)


class DivergenceMeter(LogitsProcessor):
    """A tilt that sums up how far it leads away: the divergence of the guided from the unguided distribution.

    Both are over the candidates of the guidance's own rule, at its temperature: what is sampled, and what would be
    sampled at strength 0.

    Attributes:
        total (`torch.Tensor` of shape `(rows,)`): in float64, each completion's sum so far.
    """

    def __init__(self, processor: LengthGuidedLogitsProcessor, guidance: LengthGuidance, eos_token_ids: Sequence[int]):
        self.processor, self.temperature, self.rule = processor, guidance.temperature, guidance.warpers()
        self.eos_token_ids = list(eos_token_ids)
        self.total: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The processor's scores, unchanged."""
        guided = self.processor(input_ids, scores)
        step = token_divergence(guided, self.rule(input_ids, scores / self.temperature))
        if self.total is None:
            self.total, self._alive = torch.zeros_like(step), torch.ones_like(step, dtype=torch.bool)
        else:
            ends = torch.tensor(self.eos_token_ids, device=input_ids.device)
            self._alive = self._alive & ~torch.isin(input_ids[:, -1], ends)
        self.total = self.total + step * self._alive
        return guided


def policy_divergence(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompt_ids: Sequence[list[int]],
    completions: Sequence[list[int]],
    temperature: float,
    reference_prompt_ids: Sequence[list[int]] | None = None,
    sampled: bool = False,
) -> np.ndarray:
    """Divergence of a policy from a reference at the states of sampled completions, `(N,)`, by a forward of both.

    The distributions are over all tokens: a candidate rule (top-k, top-p, min-p) is left out of both, since a
    token that it bars in one of them alone would make the divergence infinite. So it is exact without such a rule. With
    one, completions sampled under it say which states are visited, and the divergence is the policies'.

    Args:
        policy (`PreTrainedModel`), reference (`PreTrainedModel`): with one vocabulary.
        prompt_ids (sequence of lists of `int`): each completion's prompt.
        completions (sequence of lists of `int`): sampled from the policy, end-of-sequence kept.
        temperature (`float`): of both, positive.
        reference_prompt_ids (sequence of lists of `int`, *optional*): prompts that the reference has seen instead.
        sampled (`bool`, *optional*, defaults to `False`):
            Sum the log-ratios of the sampled tokens instead of exact divergences: what is to be added where the
            completions come from a distribution whose divergence from the policy is known.
    """
    pairs = zip(
        row_logits(policy, prompt_ids, completions),
        row_logits(reference, reference_prompt_ids or prompt_ids, completions),
        completions,
        strict=True,
    )
    found = []
    for ours, theirs, completion in pairs:
        ours, theirs = ours / temperature, theirs / temperature
        if sampled:
            chosen = torch.tensor(completion, device=ours.device).unsqueeze(1)
            ratio = ours.double().log_softmax(dim=-1) - theirs.double().log_softmax(dim=-1)
            found.append(float(ratio.gather(1, chosen).sum()))
        else:
            found.append(float(token_divergence(ours, theirs).sum()))
    return np.array(found)


@torch.no_grad()
def row_logits(
    policy: PreTrainedModel, prompt_ids: Sequence[list[int]], completions: Sequence[list[int]]
) -> Iterator[Tensor]:
    """Logits `(T, V)` of the states in which each completion's `T` tokens were chosen, completion by completion."""
    width = max(len(prompt) + len(row) for prompt, row in zip(prompt_ids, completions, strict=True))
    size = max(1, LOGITS_AT_ONCE // (width * policy.get_input_embeddings().weight.shape[0]))
    for start in range(0, len(completions), size):
        prompts, rows = prompt_ids[start : start + size], completions[start : start + size]
        batch = (*pad_left(prompts, device=policy.device), *pad_right(rows, device=policy.device))
        for logits, row in zip(choice_logits(policy, *batch), rows, strict=True):
            yield logits[: len(row)]


@dataclass
class Sampler:
    """Samples and grades arms over one fixed set of prompts.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): shared by every policy and the length value model.
        length_value_model (`LengthValueModel`): frozen; what tilted arms lean on.
        prompts (list): texts or lists of messages.
        columns (`dict`): one list per column, an entry per prompt: what the reward function needs.
        reward (callable): a TRL reward function, see [`~eval.graded.grade`].
        num_samples (`int`): completions per prompt.
        max_new_tokens (`int`): longest completion, end-of-sequence counted.
        batch_size (`int`): completions per `generate` call.
        guidance ([`~lenvm_rl.decoding.generation.LengthGuidance`]): temperature and candidate rule of every arm.
        seed (`int`): every arm starts from it.
        kept ([`SampleStore`], *optional*): where sampled arms are kept; sampled anew each time without.
        engine ([`~eval.engine.GuidedEngine`], *optional*): of the policy; samples in the place of `generate_guided`.
            The divergence of a tilt, which a logits processor does not hand back, is not known then.
    """

    tokenizer: PreTrainedTokenizerBase
    length_value_model: LengthValueModel
    prompts: Sequence[str | list[dict[str, Any]]]
    columns: Mapping[str, Sequence[Any]]
    reward: Callable[..., Sequence[float]]
    num_samples: int
    max_new_tokens: int
    batch_size: int
    guidance: LengthGuidance
    seed: int
    kept: SampleStore | None = None
    engine: GuidedEngine | None = None

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        """The prompts as a policy reads them."""
        return tokenize_prompts(self.tokenizer, self.prompts)

    def sample(self, name: str, kind: str, policy: PreTrainedModel, strength: float = 0.0) -> Arm:
        """Sample and grade an arm: a policy, tilted by `strength` (0 leaves it as it is).

        The arm's `kl` is the divergence from this same policy at strength 0; `None` if it is tilted at temperature 0,
        where one token has all the probability, or by an engine.
        """
        prompt_ids = self.prompt_ids
        check_room([len(ids) for ids in prompt_ids], self.max_new_tokens, context_of(policy.config))
        # Prompts of similar length share a batch, so that little of it is padding.
        order = sorted(range(len(prompt_ids)), key=lambda index: len(prompt_ids[index]))
        rows = [index for index in order for _ in range(self.num_samples)]
        ends = end_token_ids(self.tokenizer, policy.generation_config)

        def sample_all() -> Samples:
            sample_rows = self._sample_rows if self.engine is None else self._sample_by_engine
            return sample_rows(name, policy, [prompt_ids[index] for index in rows], strength, ends)

        if self.kept is None:
            samples = sample_all()
        else:
            models = [policy] if strength == 0 else [policy, self.length_value_model]
            settings = [self.max_new_tokens, self.batch_size, replace(self.guidance, strength=strength), self.seed]
            if self.engine is not None:
                settings[1] = self.engine.description
            samples = self.kept.get(name, models, [prompt_ids, rows, ends, repr(settings)], sample_all)
        correct, graded = self.grade(samples.completions, rows)
        return Arm(
            name=name,
            kind=kind,
            setting=strength if kind == "tilt" else float("nan"),
            completions=samples.completions,
            lengths=np.array([own_length(completion, ends) for completion in samples.completions]),
            finished=np.array(samples.finished),
            correct=correct,
            prompt=np.array(rows),
            kl=None if samples.kl is None else np.array(samples.kl),
            graded=graded,
        )

    def grade(self, completions: Sequence[list[int]], rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """[`~eval.graded.grade`] of completions of the prompts `rows`."""
        return grade(self.reward, self.tokenizer, self.prompts, self.columns, completions, rows, self.num_samples)

    def _sample_rows(
        self, name: str, policy: PreTrainedModel, prompts: list[list[int]], strength: float, ends: list[int]
    ) -> Samples:
        torch.manual_seed(self.seed)
        # Nothing but the guidance acts: a repetition penalty of the model's own would set its arm apart from training.
        policy.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=padding_id(self.tokenizer, ends))
        rows, divergences = [], []
        with tqdm(total=len(prompts), desc=name, unit="completion") as progress:
            for start in range(0, len(prompts), self.batch_size):
                batch = prompts[start : start + self.batch_size]
                ids, mask = pad_left(batch, policy.generation_config.pad_token_id, policy.device)
                inputs = {"input_ids": ids, "attention_mask": mask}
                generated, divergence = self._generate(policy, inputs, replace(self.guidance, strength=strength), ends)
                rows += generated[:, ids.shape[1] :].tolist()
                divergences.append(divergence)
                progress.update(len(batch))
        stripped = [strip_completion(row, ends, self.max_new_tokens) for row in rows]
        known = not any(part is None for part in divergences)
        return Samples(
            completions=[ids for ids, _ in stripped],
            finished=[reason == "stop" for _, reason in stripped],
            kl=np.concatenate(divergences).tolist() if known else None,
        )

    def _sample_by_engine(
        self, name: str, policy: PreTrainedModel, prompts: list[list[int]], strength: float, ends: list[int]
    ) -> Samples:
        guidance = replace(self.guidance, strength=strength)
        requests = [
            EngineRequest(ids, guidance, self.max_new_tokens, batch_seed(self.seed, number))
            for number, ids in enumerate(prompts)
        ]
        rows = dict(tqdm(self.engine.complete(requests, ends), desc=name, total=len(requests), unit="completion"))
        stripped = [strip_completion(rows[number], ends, self.max_new_tokens) for number in range(len(requests))]
        return Samples(
            completions=[ids for ids, _ in stripped],
            finished=[reason == "stop" for _, reason in stripped],
            kl=[0.0] * len(requests) if strength == 0 else None,
        )

    @torch.no_grad()
    def _generate(
        self, policy: PreTrainedModel, inputs: dict[str, torch.Tensor], guidance: LengthGuidance, ends: list[int]
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        """What `generate_guided` gives, to the token, and each row's divergence from the policy itself, where known."""
        model, limit = self.length_value_model, self.max_new_tokens
        if guidance.strength == 0 or guidance.temperature == 0:
            generated = generate_guided(policy, model, inputs, guidance, tokenizer=self.tokenizer, max_new_tokens=limit)
            return generated, np.zeros(len(generated)) if guidance.strength == 0 else None
        check_same_tokenizer(model.config.tokenizer_fingerprint, self.tokenizer)
        mask = inputs["attention_mask"]
        tilt = LengthGuidedLogitsProcessor(model, guidance, eos_token_id=ends, attention_mask=mask, same_tokenizer=True)
        meter = DivergenceMeter(tilt, guidance, ends)
        # The guidance has its own temperature and candidate rule; `generate` would keep 50 tokens by default.
        free = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": limit}
        generated = policy.generate(**inputs, **free, logits_processor=LogitsProcessorList([meter]))
        return generated, meter.total.cpu().numpy()


@torch.no_grad()
def value_scale(model: LengthValueModel, prompt_ids: Sequence[list[int]], completions: Sequence[list[int]]) -> float:
    """Standard deviation of V over the states of sampled completions: one over it is the unit of tilt strengths."""
    values = []
    for prompt, completion in zip(prompt_ids, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion[:-1]]], device=model.device)
        values.append(model(input_ids=ids).values[0, len(prompt) - 1 :])
    scale = float(torch.cat(values).std()) if sum(map(len, values)) > 1 else 0.0
    if not scale > 0:
        raise ValueError(
            "V is the same at every state of the base policy's completions, so there is no unit for tilts: look at "
            "what the length value model says (`python -m eval.length_prediction`)."
        )
    return scale
