"""Rows that something else than an end-of-sequence id ended: what guidance counts, scores and reports of them."""

import math

import pytest
import torch
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from lenvm_rl.decoding.generation import LengthGuidance, LengthGuidedLogitsProcessor, generate_guided, mean_length_at
from lenvm_rl.decoding.scoring import SlotScorer
from lenvm_rl.sandbox.scripted import (
    EOS,
    PAD,
    START,
    ScriptedLengthValue,
    ScriptedPolicy,
    countdown_chain,
    geometric_chain,
)

WIDTH, LONGEST = 4, 10


def tokenizer():
    """One that knows the word with which `StopStringCriteria` asks how tokens are joined."""
    made = tiny_tokenizer(64)
    core = Tokenizer.from_str(made.backend_tokenizer.to_str().replace('"w63"', '"abcdef"'))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


class EndsRows(StoppingCriteria):
    """Ends each row after so many tokens; `math.inf` leaves it to itself."""

    def __init__(self, width, after):
        self.width, self.after = width, torch.tensor(after)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.width >= self.after


def models(policy_vocabulary=64):
    """A policy that never ends by itself, and a length value model of the first 64 tokens."""
    policy = tiny_llama(vocab_size=policy_vocabulary, seed=3)
    with torch.no_grad():
        policy.lm_head.weight[EOS] = 0.0
        policy.lm_head.weight[64:] = 0.0
    value = tiny_length_value_model(tiny_llama(), 0.9, 1, tokenizer()).freeze()
    return policy, value


def prompts(rows=3):
    return torch.randint(6, 64, (rows, WIDTH), generator=torch.Generator().manual_seed(5))


GREEDY = LengthGuidance(strength=6.0, temperature=0, top_k=5)
AFTER = [2, math.inf, 6]


def guided(pad=PAD, guidance=GREEDY, ids=None, policy_vocabulary=64, **arguments):
    policy, value = models(policy_vocabulary)
    calls = []
    SlotScorer(value).check_length(64)
    value.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True)
    out, report = generate_guided(
        policy,
        value,
        prompts() if ids is None else ids,
        guidance,
        tokenizer=tokenizer(),
        max_new_tokens=LONGEST,
        pad_token_id=pad,
        return_report=True,
        **arguments,
    )
    return out[:, WIDTH:], report, calls


# What may fill a row: a token of its own, the end, one that the policy could choose, one that only the policy has.
@pytest.mark.parametrize("pad", [PAD, EOS, 17, 70])
class TestACriterionEndsARow:
    def test_what_is_counted_and_recorded_stops_there(self, pad):
        whole, alone, _ = guided(policy_vocabulary=80)
        assert alone.lengths.tolist() == [LONGEST] * 3 and alone.finish_reason == ["length"] * 3
        out, report, _ = guided(pad, policy_vocabulary=80, stopping_criteria=[EndsRows(WIDTH, AFTER)])
        assert report.lengths.tolist() == [2, LONGEST, 6]
        assert report.finish_reason == ["criterion", "length", "criterion"]
        for row, length in enumerate((2, LONGEST, 6)):
            assert torch.equal(out[row, :length], whole[row, :length]) and bool((out[row, length:] == pad).all())
            for name in ("log_probs", "policy_log_probs"):
                found, expected = getattr(report, name)[row], getattr(alone, name)[row]
                torch.testing.assert_close(found[:length], expected[:length], rtol=0, atol=1e-5)
                assert bool((found[length:] == 0).all())

    def test_no_forward_is_paid_for_it(self, pad):
        _, _, calls = guided(pad, policy_vocabulary=80, stopping_criteria=[EndsRows(WIDTH, AFTER)])
        # Rows 0 to 2 up to the token that ends one, five candidates each; beside the first, the prompts.
        assert calls[0] == (1, 3 * WIDTH + 3 * 5)
        assert calls[1:] == [(1, 3 * 5)] + [(1, 2 * 5)] * 4 + [(1, 5)] * 4

    def test_enforcement_leaves_it_alone(self, pad):
        guidance = LengthGuidance(mode="equal_to", target_length=8, temperature=0, top_k=5, enforce=True)
        out, report, _ = guided(pad, guidance, policy_vocabulary=80, stopping_criteria=[EndsRows(WIDTH, AFTER)])
        assert report.lengths.tolist() == [2, 8, 6] and report.finish_reason == ["criterion", "eos", "criterion"]
        assert out[1, 8] == EOS and report.forced[0] == 0


class TestWhoseEnd:
    def test_several_samples_of_a_prompt(self):
        after = [1, 3, math.inf, 2, 5, 4]
        guidance = LengthGuidance(strength=2.0, top_k=6)
        criteria = StoppingCriteriaList([EndsRows(WIDTH, after)])
        _, report, _ = guided(guidance=guidance, num_return_sequences=2, stopping_criteria=criteria)
        assert report.lengths.tolist() == [1, 3, LONGEST, 2, 5, 4]
        assert report.finish_reason == ["criterion"] * 2 + ["length"] + ["criterion"] * 3

    def test_all_rows_at_the_first_token(self):
        out, report, calls = guided(stopping_criteria=[EndsRows(WIDTH, [1, 1, 1])])
        assert out.shape == (3, 1) and report.lengths.tolist() == [1, 1, 1] and len(calls) == 1
        policy = ScriptedPolicy.from_chain(geometric_chain(1.0))
        value = ScriptedLengthValue.from_chain(geometric_chain(1.0), 0.9)
        out, report = generate_guided(
            policy, value, torch.full((2, 1), START), LengthGuidance(strength=1.0), return_report=True
        )
        assert out[:, 1:].tolist() == [[EOS], [EOS]]
        assert report.lengths.tolist() == [0, 0] and report.finish_reason == ["eos", "eos"]

    def test_an_end_by_both_is_an_end_by_the_id(self):
        chain = countdown_chain([0.0, 0.0, 1.0])
        policy, value = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, 0.9)
        criteria = [EndsRows(1, [4, 2])]
        out, report = generate_guided(
            policy,
            value,
            torch.full((2, 1), START),
            LengthGuidance(strength=1.0),
            max_new_tokens=9,
            stopping_criteria=criteria,
            return_report=True,
        )
        # Three tokens and the end, at the very step of the criterion; or two tokens.
        assert out[0, 1:].tolist() == [START + 3, START + 2, START + 1, EOS]
        assert report.lengths.tolist() == [3, 2] and report.finish_reason == ["eos", "criterion"]

    def test_a_stop_string(self):
        whole, *_ = guided()
        word = f"w{int(whole[0, 3])}"
        place = (whole == whole[0, 3]).int()
        expected = [int(row.argmax()) + 1 if bool(row.any()) else LONGEST for row in place]
        _, report, _ = guided(stop_strings=[word])
        assert report.lengths.tolist() == expected and expected[0] <= 4
        assert report.finish_reason[0] == "criterion"
        _, given, _ = guided(stopping_criteria=[StopStringCriteria(tokenizer(), [word])])
        assert given.lengths.tolist() == expected and given.finish_reason == report.finish_reason

    def test_a_stop_string_of_the_models_own_settings(self):
        whole, *_ = guided()
        policy, value = models()
        policy.generation_config.stop_strings = [f"w{int(whole[0, 1])}"]
        out, report = generate_guided(
            policy, value, prompts(), GREEDY, tokenizer=tokenizer(), max_new_tokens=LONGEST, return_report=True
        )
        assert report.lengths[0] <= 2 and report.finish_reason[0] == "criterion"
        with pytest.raises(ValueError, match="stop_strings.*tokenizer="):
            generate_guided(policy, value, prompts(), GREEDY, max_new_tokens=LONGEST)

    def test_criteria_that_generate_makes_itself_keep_their_meaning(self):
        """One that is given takes the place of its own: a longer budget, other ends."""
        out, report, _ = guided(stopping_criteria=[MaxLengthCriteria(WIDTH + 3)])
        assert out.shape[1] == 3 and report.finish_reason == ["length"] * 3
        policy, value = models()
        longer = [MaxLengthCriteria(WIDTH + 24)]
        guidance = LengthGuidance(mode="at_least", target_length=23, top_k=3, temperature=0)
        out = generate_guided(policy, value, prompts(), guidance, stopping_criteria=longer)
        assert out.shape[1] == WIDTH + 24
        plain = LengthGuidance(temperature=0, top_k=5)
        whole, *_ = guided(guidance=plain)
        token = int(whole[1, 4])
        first = int((whole[1] == token).int().argmax())
        _, report, _ = guided(guidance=plain, stopping_criteria=[EosTokenCriteria(eos_token_id=[token])])
        assert report.finish_reason[1] == "eos" and report.lengths[1] == first
        _, report, _ = guided(stopping_criteria=[MaxTimeCriteria(0.0)])
        assert report.lengths.tolist() == [1] * 3 and report.finish_reason == ["length"] * 3

    def test_the_mean_length_counts_no_padding(self):
        policy, value = models()
        measure = mean_length_at(
            policy,
            value,
            prompts(),
            LengthGuidance(top_k=4),
            seed=0,
            max_new_tokens=LONGEST,
            stopping_criteria=[EndsRows(WIDTH, [1, 3, 8])],
        )
        assert measure(1.0) == measure(-1.0) == 4.0


class TestTheProcessorAlone:
    def test_watched_criteria_say_what_they_end(self):
        expected, report, _ = guided(stopping_criteria=[EndsRows(WIDTH, AFTER)])
        policy, value = models()
        processor = LengthGuidedLogitsProcessor(value, GREEDY, eos_token_id=EOS, record=True)
        for _ in range(2):
            out = policy.generate(
                prompts(),
                logits_processor=[processor],
                stopping_criteria=processor.watch([EndsRows(WIDTH, AFTER)]),
                max_new_tokens=LONGEST,
                do_sample=False,
                pad_token_id=PAD,
            )
            found = processor.finish(out)
            assert torch.equal(out[:, WIDTH:], expected)
            assert found.lengths.tolist() == report.lengths.tolist() and found.finish_reason == report.finish_reason

    def test_a_pad_token_that_could_not_be_drawn_is_padding(self):
        """Without the watch, too: it was barred, or the policy has no such token."""
        policy, value = models(80)
        for pad in (70, PAD):
            processor = LengthGuidedLogitsProcessor(
                value, GREEDY, eos_token_id=EOS, pad_token_id=pad, same_tokenizer=True
            )
            out = policy.generate(
                prompts(),
                logits_processor=[processor],
                stopping_criteria=[EndsRows(WIDTH, AFTER)],
                max_new_tokens=LONGEST,
                do_sample=False,
                pad_token_id=pad,
            )
            report = processor.finish(out)
            assert report.lengths.tolist() == [2, LONGEST, 6]
            assert report.finish_reason == ["criterion", "length", "criterion"]

    def test_a_step_that_generate_takes_back_does_no_harm(self):
        """On some devices it asks one step late whether all rows are over."""
        chain = countdown_chain([0.0, 1.0])
        value = ScriptedLengthValue.from_chain(chain, 0.9)
        processor = LengthGuidedLogitsProcessor(value, LengthGuidance(strength=1.0), eos_token_id=EOS, record=True)
        rows = torch.tensor([[START, START + 2, START + 1, EOS]])
        for width in (1, 2, 3, 4):
            processor(rows[:, :width], torch.zeros(1, chain.vocab_size))
        report = processor.finish(rows)
        assert report.lengths.tolist() == [2] and report.log_probs.shape == (1, 3) and report.finish_reason == ["eos"]
        with pytest.raises(ValueError, match="not the sequences"):
            processor.finish(rows)
