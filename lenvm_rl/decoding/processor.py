"""The logits processor of length-guided decoding: at each step, it scores the candidates and applies the guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from lenvm_rl.decoding.guidance import LengthGuidance, as_list, check_temperature
from lenvm_rl.decoding.report import GuidanceReport, RowLog, WatchedCriteria
from lenvm_rl.decoding.scoring import FullRowScorer, SlotScorer
from lenvm_rl.decoding.step import GuidedRow, guide_rows
from lenvm_rl.endings import end_token_ids
from lenvm_rl.modeling.completions import prompt_mask

SCORERS = {"cached": SlotScorer, "full": FullRowScorer}
# Above this many tokens, scoring the whole vocabulary at every step is surely a mistake.
MAX_UNTRUNCATED_VOCABULARY = 4096


class LengthGuidedLogitsProcessor(LogitsProcessor):
    """Guides the policy's scores inside any `model.generate(..., logits_processor=[...])`.

    transformers runs this processor *before* its own temperature, top-k and top-p. Guidance has its own, so generate
    with ``temperature=1.0, top_k=0, top_p=1.0`` (`top_k` defaults to 50 there), or use [`generate_guided`], which sets
    and checks them. A processor cannot see what `generate` does after it.

    Nor can it see that a stopping criterion ended a row while others go on: what `generate` then fills the row with
    may look like tokens. So give `generate` your criteria, stop strings included, as
    ``stopping_criteria=processor.watch([...])`` ([`generate_guided`] does).

    One object serves one `generate` call at a time; it starts afresh when it meets new prompts. Beam search and
    assisted generation take back what it remembers: the latter is refused when it shows.

    Args:
        length_value_model (`LengthValueModel`): frozen, in eval mode.
        guidance ([`LengthGuidance`] or sequence of them): how to guide; one for all rows, or one for each prompt.
        eos_token_id (`int` or sequence of `int`): the tokens that end a sequence: as candidates, their value is 0.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): the prompts' mask (left padding). When omitted,
            it is what `generate` makes of the ids, see [`~lenvm_rl.modeling.completions.prompt_mask`].
        pad_token_id (`int`, *optional*): needed if prompts are padded and no `attention_mask` is given.
        generation_temperature (`float`, *optional*, defaults to `1.0`): the temperature that `generate` applies
            afterwards; the scores are multiplied by it beforehand, so that the result is the guidance's distribution.
        scoring (`str`, *optional*, defaults to `"cached"`): `"cached"` for one forward for each token
            ([`SlotScorer`]), `"full"` to run every candidate as a complete row ([`FullRowScorer`]): slow, for
            backbones whose cache cannot be shared.
        same_tokenizer (`bool`, *optional*, defaults to `False`): set when the tokenizers of both models were compared:
            their embedding tables may then differ in padding.
        record (`bool`, *optional*, defaults to `False`): whether to keep the log-probabilities of the chosen tokens;
            [`LengthGuidedLogitsProcessor.finish`] then completes the report.

    Raises:
        ValueError: at construction, a model that it cannot use; at the first call, what does not fit (vocabularies,
            padding, the number of guidances, an end to be enforced where there is none); at any call, ids that go back
            behind what was seen, or rows beyond the context.
        FloatingPointError: the length value model gives NaN or infinity.
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
        check_temperature("generation_temperature", generation_temperature, greedy=False)
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("prompts are padded on the right: generation needs padding_side='left'.")
        self.guidance = as_list(guidance)
        self.scorer = SCORERS[scoring](length_value_model)
        self.gamma = length_value_model.config.gamma
        self.eos_token_ids = end_token_ids(None, eos_token_id)
        self.attention_mask = attention_mask
        self.pad_token_id = pad_token_id
        self.generation_temperature = generation_temperature
        self.same_tokenizer = same_tokenizer
        self.record = record
        self._log: RowLog | None = None
        self._needs_values = any(each.needs_values for each in self.guidance)
        # Greedy rows beside sampled ones: `generate` samples them all, so their distribution is put on one token.
        self._mixed = len({each.temperature > 0 for each in self.guidance}) > 1
        self._watched = WatchedCriteria()
        self._seen: Tensor | None = None
        # Of the rows that values have a say in and that go on.
        self._slots: dict[int, int] = {}

    def watch(self, criteria: Sequence[StoppingCriteria] = ()) -> StoppingCriteriaList:
        """What to give `generate` as `stopping_criteria`: the given ones (for `stop_strings`, a `StopStringCriteria`),
        and word to this processor of what they end."""
        self._watched = WatchedCriteria(criteria)
        return self._watched.for_generate()

    def check_length(self, tokens: int) -> None:
        """Raises a `ValueError` unless rows of so many tokens, prompt included, can be guided."""
        if self._needs_values:
            self.scorer.check_length(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided scores `(B, V)`, ``-inf`` where a token is no candidate, of the prefixes `input_ids` `(B, S)`."""
        if scores.dtype in (torch.float16, torch.bfloat16):
            # Strength times value would overflow, or be rounded away.
            scores = scores.float()
        if self._continues(input_ids):
            self._advance(input_ids)
        else:
            self._start(input_ids, scores)
        self._seen = input_ids
        guided = self._guided_scores(input_ids, scores)
        self._last = (scores if self.record else None, guided)
        return self._decide_greedy_rows(guided) if self._mixed else guided

    def finish(self, sequences: Tensor) -> GuidanceReport:
        """The report, once the last token stands; `sequences` `(B, S)` are what `generate` returned."""
        if self._continues(sequences):
            self._take(sequences[:, -1])
        elif self._seen is None or not torch.equal(sequences, self._seen):
            # The same as seen: on some devices, `generate` takes a step in advance, and back when all rows are over.
            raise ValueError("these are not the sequences that were guided last: pass what `generate` returned.")
        self._seen = None
        return self._log.close()

    @property
    def report(self) -> GuidanceReport | None:
        """What guidance did to the rows of the current, or last, call; complete after `finish`."""
        return None if self._log is None else self._log.report

    def _take(self, chosen: Tensor) -> None:
        """The tokens that were drawn last."""
        policy, guided = self._last
        if self.record:
            policy, guided = policy / self._temperatures, guided / self.generation_temperature
        self._log.take(chosen, guided, policy, self._watched.ended)

    def _guided_scores(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._untouched:
            return scores
        ends, written = tuple(self._log.ends.tolist()), input_ids.shape[1] - self._prompt_width
        rows = [GuidedRow(each, ends, written, self._slots.get(row)) for row, each in enumerate(self._per_row)]
        step = guide_rows(rows, scores, self.scorer, self.gamma)
        self._log.force(slice(None), step.overruled)
        return step.scores * self.generation_temperature

    def _continues(self, input_ids: Tensor) -> bool:
        """Whether `input_ids` are the prefixes of the last call with one more token."""
        seen = self._seen
        if seen is None or input_ids.shape != (seen.shape[0], seen.shape[1] + 1):
            return False
        return torch.equal(input_ids[:, :-1], seen)

    def _check_new(self, input_ids: Tensor) -> None:
        """Refuses ids that go on from those seen, but not by one token: what a draft model proposed and lost."""
        seen = self._seen
        if seen is None or input_ids.shape[0] != seen.shape[0] or input_ids.shape[1] <= self._prompt_width:
            return
        shared = min(input_ids.shape[1] - 1, seen.shape[1])
        if not torch.equal(input_ids[:, :shared], seen[:, :shared]):
            return
        longer = input_ids.shape[1] > shared + 1
        if longer and bool((self._log.finished | torch.isin(input_ids[:, shared], self._log.ends)).all()):
            # The completions were over: a new turn of the same chats.
            return
        raise ValueError(
            "input_ids go on from ids that were guided, but not by one token: assisted generation (a draft model, "
            "prompt lookup) takes tokens back and cannot be guided. Leave it out; for other prompts, make a new "
            "processor."
        )

    def _start(self, input_ids: Tensor, scores: Tensor) -> None:
        self._check_new(input_ids)
        vocab_size, rows = scores.shape[1], input_ids.shape[0]
        if self._needs_values:
            self._check_vocabulary(vocab_size)
        if rows % len(self.guidance):
            raise ValueError(
                f"{len(self.guidance)} guidances do not fit {rows} rows: give one, or one for each prompt."
            )
        # `num_return_sequences` repeats each prompt in place.
        per_row = self._per_row = [each for each in self.guidance for _ in range(rows // len(self.guidance))]
        device = scores.device
        self._untouched = not (self._needs_values or self._mixed) and all(
            not each.truncates and self.generation_temperature == (each.temperature or 1.0) for each in per_row
        )
        self._greedy = torch.tensor([each.temperature == 0 for each in per_row], device=device)
        self._watched.ended = None
        # An id that the policy has no score for ends nothing.
        ends = [end for end in self.eos_token_ids if 0 <= end < vocab_size]
        if not ends and any(each.forces for each in per_row):
            raise ValueError(f"enforce needs an end: none of eos_token_id={self.eos_token_ids} is among the scores.")
        self._log = RowLog(rows, ends, self.pad_token_id, device)
        self._prompt_width = input_ids.shape[1]
        self._temperatures = torch.tensor([[each.temperature or 1.0] for each in per_row], device=device)
        if self._needs_values:
            mask = prompt_mask(input_ids, self.attention_mask, self.pad_token_id, self.eos_token_ids)
            if not bool(mask[:, -1].all()):
                raise ValueError("prompts are empty or padded on the right: generation needs padding_side='left'.")
            self._fill_slots(input_ids, mask.bool())

    def _fill_slots(self, input_ids: Tensor, exists: Tensor) -> None:
        """Gives a slot to each row that values have a say in; the rows before are over."""
        for slot in self._slots.values():
            self.scorer.remove(slot)
        self._slots = {}
        for row, each in enumerate(self._per_row):
            if each.needs_values:
                self._slots[row] = self.scorer.add(input_ids[row][exists[row]].tolist())

    def _check_vocabulary(self, vocab_size: int) -> None:
        if not self.same_tokenizer and vocab_size != self.scorer.vocab_size:
            raise ValueError(
                f"the policy scores {vocab_size} tokens and the length value model knows {self.scorer.vocab_size}: "
                "they must share a tokenizer. If they do, pass it to generate_guided as tokenizer=, to be compared."
            )
        untruncated = any(each.needs_values and not each.truncates_among(vocab_size) for each in self.guidance)
        if untruncated and vocab_size > MAX_UNTRUNCATED_VOCABULARY:
            raise ValueError(
                f"without truncation, all {vocab_size} tokens are scored at every step: set top_k (e.g. 64), top_p or "
                "min_p in the guidance."
            )

    def _advance(self, input_ids: Tensor) -> None:
        chosen = input_ids[:, -1]
        self._take(chosen)
        if not self._slots:
            return
        tokens, finished = chosen.tolist(), self._log.finished.tolist()
        for row, slot in list(self._slots.items()):
            if finished[row]:
                self.scorer.remove(self._slots.pop(row))
            else:
                self.scorer.append(slot, [tokens[row]])

    def _decide_greedy_rows(self, policy: Tensor) -> Tensor:
        chosen = policy.argmax(dim=1, keepdim=True)
        alone = torch.full_like(policy, -torch.inf).scatter_(1, chosen, 0.0)
        return torch.where(self._greedy.unsqueeze(1), alone, policy)
