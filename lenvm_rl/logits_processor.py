"""The logits processor of length-guided decoding: at each step, it scores the candidates and applies the guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from lenvm_rl.guidance import TILT, LengthGuidance
from lenvm_rl.returns import remaining_from_logits
from lenvm_rl.scoring import CandidateScorer, FullRowScorer

SCORERS = {"cached": CandidateScorer, "full": FullRowScorer}
# Above this many tokens, scoring the whole vocabulary at every step is surely a mistake.
MAX_UNTRUNCATED_VOCABULARY = 4096


@dataclass
class GuidanceReport:
    """What guidance did to each row.

    Args:
        lengths (`torch.Tensor` of shape `(B,)`, int64): tokens of each completion, end-of-sequence not counted.
        forced (`torch.Tensor` of shape `(B,)`, int64): steps at which more than half of the guided probability was
            overruled, because the end was barred or put.
        overruled (`torch.Tensor` of shape `(B,)`): the overruled probability, summed over steps: the expected number
            of choices that enforcement changed.
        log_probs (`torch.Tensor` of shape `(B, T)`): log-probability of each token under the guided distribution that
            it was drawn from; 0 after the end. (Greedy choices are certain; theirs is that of the distribution.)
        policy_log_probs (`torch.Tensor` of shape `(B, T)`): the same under the policy at the guidance's temperature,
            without guidance and candidate rule. The importance ratio of a token is ``exp(policy - guided)``.
    """

    lengths: Tensor
    forced: Tensor
    overruled: Tensor
    log_probs: Tensor
    policy_log_probs: Tensor


class LengthGuidedLogitsProcessor(LogitsProcessor):
    """Guides the policy's scores inside any `model.generate(..., logits_processor=[...])`.

    transformers runs this processor *before* its own temperature, top-k and top-p. Guidance has its own, so generate
    with ``temperature=1.0, top_k=0, top_p=1.0`` (`top_k` defaults to 50 there), or use [`generate_guided`], which sets
    and checks them. A processor cannot see what `generate` does after it.

    One object serves one `generate` call at a time; it starts afresh when it meets new prompts. Beam search and
    assisted generation reorder what it remembers and are not supported.

    Args:
        length_value_model (`LengthValueModel`): frozen, in eval mode.
        guidance ([`LengthGuidance`] or sequence of them): how to guide; one for all rows, or one for each prompt.
        eos_token_id (`int` or sequence of `int`): the tokens that end a sequence: as candidates, their value is 0.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*):
            The prompts' mask (left padding). When omitted, leading `pad_token_id` tokens are taken as padding.
        pad_token_id (`int`, *optional*): needed if prompts are padded and no `attention_mask` is given.
        generation_temperature (`float`, *optional*, defaults to `1.0`):
            The temperature that `generate` applies afterwards; the scores are multiplied by it beforehand, so that the
            result is the guidance's distribution.
        scoring (`str`, *optional*, defaults to `"cached"`):
            `"cached"` for one forward for each token ([`CandidateScorer`]), `"full"` to run every candidate as a
            complete row ([`FullRowScorer`]): slow, for backbones whose cache cannot be shared.
        same_tokenizer (`bool`, *optional*, defaults to `False`):
            Set when the tokenizers of both models were compared: their embedding tables may then differ in padding.
        record (`bool`, *optional*, defaults to `False`):
            Whether to keep the log-probabilities of the chosen tokens; [`LengthGuidedLogitsProcessor.finish`] then
            completes the report.

    Attributes:
        report ([`GuidanceReport`] or `None`): of the rows of the current, or last, call of `generate`.

    Raises:
        ValueError: at construction, on an unknown `scoring` or a model that it cannot use; at the first call, on
            vocabularies that differ, right padding, a number of guidances that does not fit the rows, or a vocabulary
            too large to be scored without truncation.
        FloatingPointError: if the length value model gives NaN or infinity.
    """

    def __init__(
        self,
        length_value_model: nn.Module,
        guidance: LengthGuidance | Sequence[LengthGuidance],
        *,
        eos_token_id: int | Sequence[int],
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        generation_temperature: float = 1.0,
        scoring: str = "cached",
        same_tokenizer: bool = False,
        record: bool = False,
    ):
        if scoring not in SCORERS:
            raise ValueError(f"scoring must be one of {sorted(SCORERS)}, got {scoring!r}.")
        if generation_temperature <= 0:
            raise ValueError(f"generation_temperature must be positive, got {generation_temperature}.")
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("prompts are padded on the right: generation needs padding_side='left'.")
        self.guidance = as_list(guidance)
        self.scorer = SCORERS[scoring](length_value_model)
        self.gamma = length_value_model.config.gamma
        self.eos_token_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        self.attention_mask = attention_mask
        self.pad_token_id = pad_token_id
        self.generation_temperature = generation_temperature
        self.same_tokenizer = same_tokenizer
        self.record = record
        self.report: GuidanceReport | None = None
        self._warpers = {each: each.warpers() for each in set(self.guidance)}
        self._needs_values = any(each.needs_values for each in self.guidance)
        self._needs_lengths = any(each.mode != TILT for each in self.guidance)
        # Greedy rows beside sampled ones: `generate` samples them all, so their distribution is put on one token.
        self._mixed = len({each.temperature > 0 for each in self.guidance}) > 1
        self._unbarred: dict[LengthGuidance, Tensor] = {}
        self._seen: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided scores `(B, V)`, ``-inf`` where a token is no candidate, of the prefixes `input_ids` `(B, S)`."""
        if self._continues(input_ids):
            self._advance(input_ids)
        else:
            self._start(input_ids, scores)
        self._seen = input_ids
        guided = self._guided_scores(input_ids, scores)
        if self.record:
            self._last = (scores, guided)
        return guided

    def finish(self, sequences: Tensor) -> GuidanceReport:
        """The report, once the last token stands.

        Args:
            sequences (`torch.Tensor` of shape `(B, S)`): what `generate` returned.

        Raises:
            ValueError: the sequences are not those of the last call.
        """
        if not self._continues(sequences):
            raise ValueError("these are not the sequences that were guided last: pass what `generate` returned.")
        self._take(sequences[:, -1])
        self._seen = None
        return self.report

    def _take(self, chosen: Tensor) -> None:
        """The tokens that were drawn last: what they add to the report, and which rows they end."""
        if self.record:
            self._record(chosen)
        self._finished = self._finished | torch.isin(chosen, self._eos)
        self.report.lengths += (~self._finished).long()

    def _record(self, chosen: Tensor) -> None:
        """Adds the log-probabilities of the tokens that were drawn from the last scores."""
        scores, guided = self._last
        chosen = chosen.to(guided.device).unsqueeze(1)
        guided = (guided / self.generation_temperature).log_softmax(dim=1).gather(1, chosen)
        policy = (scores / self._temperatures).log_softmax(dim=1).gather(1, chosen)
        for name, column in (("log_probs", guided), ("policy_log_probs", policy)):
            column = column.masked_fill(self._finished.unsqueeze(1), 0.0)
            setattr(self.report, name, torch.cat([getattr(self.report, name), column], dim=1))

    def _guided_scores(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._untouched:
            return scores
        written = input_ids.shape[1] - self._prompt_width
        policy = self._by_group(lambda each, rows: self._candidates(each, rows, input_ids, scores, written))
        if self._needs_values:
            values, remaining = self._score(policy)
            base = policy
            policy = self._by_group(
                lambda each, rows: self._guide(each, rows, base[rows], values[rows], remaining[rows], written)
            )
        if self._mixed:
            policy = self._decide_greedy_rows(policy)
        return policy * self.generation_temperature

    def _by_group(self, of_rows: Callable[[LengthGuidance, Tensor | slice], Tensor]) -> Tensor:
        """`(B, V)` in the order of the rows, from what is made for those of each guidance."""
        if len(self._groups) == 1:
            return of_rows(self._groups[0][0], slice(None))
        return torch.cat([of_rows(each, rows) for each, rows in self._groups])[self._back]

    def _continues(self, input_ids: Tensor) -> bool:
        """Whether `input_ids` are the prefixes of the last call with one more token."""
        seen = self._seen
        if seen is None or input_ids.shape != (seen.shape[0], seen.shape[1] + 1):
            return False
        return torch.equal(input_ids[:, :-1], seen)

    def _start(self, input_ids: Tensor, scores: Tensor) -> None:
        vocab_size, rows = scores.shape[1], input_ids.shape[0]
        if self._needs_values:
            self._check_vocabulary(vocab_size)
        if rows % len(self.guidance):
            raise ValueError(
                f"{len(self.guidance)} guidances do not fit {rows} rows: give one, or one for each prompt."
            )
        # `num_return_sequences` repeats each prompt in place.
        per_row = [each for each in self.guidance for _ in range(rows // len(self.guidance))]
        device = scores.device
        self._groups = [
            (each, torch.tensor([row for row, own in enumerate(per_row) if own == each], device=device))
            for each in dict.fromkeys(per_row)
        ]
        self._back = torch.cat([members for _, members in self._groups]).argsort()
        self._untouched = not (self._needs_values or self._mixed) and all(
            not each.truncates and self.generation_temperature == (each.temperature or 1.0) for each in per_row
        )
        self._greedy = torch.tensor([each.temperature == 0 for each in per_row], device=device)
        self._asks = torch.tensor([each.needs_values for each in per_row], device=device)
        self._finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self._eos = torch.tensor(self.eos_token_ids, device=device)
        self._prompt_width = input_ids.shape[1]
        self._temperatures = torch.tensor([[each.temperature or 1.0] for each in per_row], device=device)
        self.report = GuidanceReport(
            lengths=torch.zeros(rows, dtype=torch.int64, device=device),
            forced=torch.zeros(rows, dtype=torch.int64, device=device),
            overruled=torch.zeros(rows, dtype=torch.float64, device=device),
            log_probs=scores.new_zeros(rows, 0),
            policy_log_probs=scores.new_zeros(rows, 0),
        )
        if self._needs_values:
            mask = self._prompt_mask(input_ids)
            if not bool(mask[:, -1].all()):
                raise ValueError("prompts are empty or padded on the right: generation needs padding_side='left'.")
            self.scorer.start(input_ids, mask)

    def _check_vocabulary(self, vocab_size: int) -> None:
        if not self.same_tokenizer and vocab_size != self.scorer.vocab_size:
            raise ValueError(
                f"the policy scores {vocab_size} tokens and the length value model knows {self.scorer.vocab_size}: "
                "they must share a tokenizer. If they do, pass it to generate_guided as tokenizer=, to be compared."
            )
        untruncated = any(each.needs_values and not each.truncates for each in self.guidance)
        if untruncated and vocab_size > MAX_UNTRUNCATED_VOCABULARY:
            raise ValueError(
                f"without truncation, all {vocab_size} tokens are scored at every step: set top_k (e.g. 64), top_p or "
                "min_p in the guidance."
            )

    def _prompt_mask(self, input_ids: Tensor) -> Tensor:
        mask = self.attention_mask
        if mask is None:
            if self.pad_token_id is None:
                return torch.ones_like(input_ids)
            return (input_ids != self.pad_token_id).int().cummax(dim=1).values
        rows, width = input_ids.shape
        if mask.shape[1] != width or rows % mask.shape[0]:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)} but the prompts {tuple(input_ids.shape)}: make one "
                "processor for each batch of prompts."
            )
        return mask.to(input_ids.device).repeat_interleave(rows // mask.shape[0], dim=0)

    def _advance(self, input_ids: Tensor) -> None:
        chosen = input_ids[:, -1]
        self._take(chosen)
        if self._needs_values:
            self.scorer.advance(chosen, ~self._finished & self._asks)

    def _candidates(
        self, guidance: LengthGuidance, rows: Tensor | slice, input_ids: Tensor, scores: Tensor, written: int
    ) -> Tensor:
        """The policy after temperature and candidate rule; where the end is barred, among the other tokens."""
        warpers, ids = self._warpers[guidance], input_ids[rows]
        own = scores[rows] / (guidance.temperature or 1.0)
        policy = warpers(ids, own)
        if not guidance.bars_end(written):
            return policy
        # What there was to choose from stays a candidate, for [`_guide`] to see what barring the end overrules.
        self._unbarred[guidance] = policy
        policy_without = warpers(ids, own.index_fill(1, self._eos, -torch.inf))
        policy_without[:, self._eos] = policy[:, self._eos]
        return policy_without

    def _score(self, policy: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the states after each candidate and tokens still to come there, `(B, V)`.

        Both are 0 at end-of-sequence. Where there is no candidate, and in rows that have nothing to choose or are not
        guided, what stands there does not matter. Lengths are left out where no row asks for one.
        """
        candidate = torch.isfinite(policy) & (~self._finished & self._asks).unsqueeze(1)
        # The only candidate of a row is chosen whatever its value; its forward waits until one is needed.
        decided = candidate.sum(dim=1) <= 1
        values = torch.zeros_like(policy)
        # Any token but the end has at least the end still to come.
        remaining = torch.ones_like(policy) if self._needs_lengths else values
        if not bool(decided.all()):
            candidate[:, self._eos] = False
            width = int(candidate.sum(dim=1).max())
            candidates = candidate.int().topk(width, dim=1).indices
            scored = self.scorer.score(candidates, candidate.gather(1, candidates))
            if not bool(torch.isfinite(scored).all()):
                raise FloatingPointError(
                    "the length value model gave NaN or infinity: check its weights and its dtype."
                )
            values.scatter_(1, candidates, -scored.sigmoid().to(values.dtype))
            if self._needs_lengths:
                lengths = remaining_from_logits(scored, self.gamma).clamp(min=1.0)
                remaining.scatter_(1, candidates, lengths.to(remaining.dtype))
        values[:, self._eos] = 0.0
        remaining[:, self._eos] = 0.0
        return values, remaining

    def _guide(
        self,
        guidance: LengthGuidance,
        rows: Tensor | slice,
        policy: Tensor,
        values: Tensor,
        remaining: Tensor,
        written: int,
    ) -> Tensor:
        """The guided scores of rows with one guidance, with the hard bound on top."""
        if guidance.bars_end(written):
            unbarred = guidance.guide(self._unbarred[guidance], values, remaining, written)
            overruled = unbarred.softmax(dim=1)[:, self._eos].sum(dim=1)
            without = policy.index_fill(1, self._eos, -torch.inf)
            guided = guidance.guide(without, values, remaining, written)
        else:
            guided = guidance.guide(policy, values, remaining, written)
            if not guidance.puts_end(written):
                return guided
            overruled = 1.0 - guided.softmax(dim=1)[:, self._eos].sum(dim=1)
            guided = torch.full_like(guided, -torch.inf)
            guided[:, self._eos[0]] = 0.0
        overruled = overruled.masked_fill(self._finished[rows], 0.0)
        self.report.forced[rows] += (overruled > 0.5).long()
        self.report.overruled[rows] += overruled.double()
        return guided

    def _decide_greedy_rows(self, policy: Tensor) -> Tensor:
        chosen = policy.argmax(dim=1, keepdim=True)
        alone = torch.full_like(policy, -torch.inf).scatter_(1, chosen, 0.0)
        return torch.where(self._greedy.unsqueeze(1), alone, policy)


def as_list(guidance: LengthGuidance | Sequence[LengthGuidance]) -> list[LengthGuidance]:
    """One guidance as a list, and several as they are; a `ValueError` if there is none."""
    several = [guidance] if isinstance(guidance, LengthGuidance) else list(guidance)
    if not several:
        raise ValueError("no guidance is given: give one, or one for each prompt.")
    return several
