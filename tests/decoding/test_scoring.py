"""Candidate scoring: one cached forward gives the values of separate full forwards, whatever stands beside."""

import copy

import pytest
import torch
from tiny import tiny_length_value_model, tiny_llama, tiny_qwen2
from transformers import Lfm2Config, Lfm2Model, MistralConfig, MistralModel

from lenvm_rl.decoding.scoring import CandidateScorer, FullRowScorer
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.sandbox.scripted import ScriptedLengthValue, random_chain

VOCAB, PAD, ROWS = 64, 0, 12


def length_value_model(make=tiny_llama, **config):
    return tiny_length_value_model(make(vocab_size=VOCAB, **config), seed=1).freeze()


def prompts():
    ids = torch.randint(6, VOCAB, (ROWS, 7))
    mask = torch.ones_like(ids)
    for row in range(ROWS):
        padding = row % 7
        ids[row, :padding] = PAD
        mask[row, :padding] = 0
    return ids, mask


def separate(model, prefix, candidate):
    """Logit of one candidate after one unpadded prefix, by a forward of its own."""
    return model(torch.cat([prefix, candidate.view(1)]).unsqueeze(0)).logits[0, -1]


def count_forwards(model):
    calls = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True)
    return calls


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_values_over_many_steps_are_those_of_separate_forwards(make, attention):
    model = length_value_model(make, attn_implementation=attention)
    ids, mask = prompts()
    prefixes = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    scorer = CandidateScorer(model)
    scorer.start(ids, mask)
    live = torch.ones(ROWS, dtype=torch.bool)
    for step in range(6):
        candidates = torch.stack([torch.randperm(VOCAB)[:4] for _ in range(ROWS)])
        valid = (torch.rand(ROWS, 4) < 0.7) & live.unsqueeze(1)
        valid[:, 0] = live
        logits = scorer.score(candidates, valid)
        for row, slot in valid.nonzero().tolist():
            expected = separate(model, prefixes[row], candidates[row, slot])
            torch.testing.assert_close(logits[row, slot], expected, rtol=0, atol=1e-5)
        assert bool((logits[~valid] == 0).all())
        chosen = torch.where(live, candidates[:, 0], torch.tensor(PAD))
        # Rows finish one by one, so that some are masked, some dropped.
        live = live & (torch.arange(ROWS) != [1, 0, 4, 2, 11, ROWS][step])
        scorer.advance(chosen, live)
        for row in live.nonzero().flatten().tolist():
            prefixes[row] = torch.cat([prefixes[row], chosen[row].view(1)])


def test_siblings_do_not_see_each_other():
    model = length_value_model()
    ids, mask = prompts()
    candidates = torch.stack([torch.randperm(VOCAB)[:6] for _ in range(ROWS)])
    everyone = torch.ones(ROWS, 6, dtype=torch.bool)

    def scored(candidates, valid):
        scorer = CandidateScorer(model)
        scorer.start(ids, mask)
        return scorer.score(candidates, valid)

    together = scored(candidates, everyone)
    assert together.std() > 0.1
    order = torch.randperm(6)
    torch.testing.assert_close(scored(candidates[:, order], everyone), together[:, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(scored(candidates[:, :2], everyone[:, :2]), together[:, :2], rtol=0, atol=1e-5)
    changed = torch.cat([candidates[:, :3], (candidates[:, 3:] + 1) % VOCAB], dim=1)
    torch.testing.assert_close(scored(changed, everyone)[:, :3], together[:, :3], rtol=0, atol=1e-5)


def test_one_forward_for_each_token_and_the_chosen_cache_is_that_of_the_full_row():
    model = length_value_model()
    ids, mask = prompts()
    scorer = CandidateScorer(model)
    calls = count_forwards(model)
    scorer.start(ids, mask)
    live = torch.ones(ROWS, dtype=torch.bool)
    rows, exists = ids, mask
    for _ in range(3):
        candidates = torch.stack([torch.randperm(VOCAB)[:3] for _ in range(ROWS)])
        scorer.score(candidates, torch.ones(ROWS, 3))
        chosen = candidates[torch.arange(ROWS), torch.randint(0, 3, (ROWS,))]
        scorer.advance(chosen, live)
        rows = torch.cat([rows, chosen.unsqueeze(1)], dim=1)
        exists = torch.cat([exists, torch.ones(ROWS, 1, dtype=torch.long)], dim=1)
    assert calls == [(ROWS, 7), (ROWS, 3), (ROWS, 3), (ROWS, 3)]
    full = model(input_ids=rows, attention_mask=exists, use_cache=True).past_key_values
    for ours, theirs in zip(scorer.cache.layers, full.layers, strict=True):
        where = exists.bool()[:, None, :, None]
        torch.testing.assert_close(ours.keys * where, theirs.keys * where, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.values * where, theirs.values * where, rtol=0, atol=1e-5)


def test_the_cache_holds_the_prefix_once():
    model = length_value_model()
    ids, mask = prompts()
    sizes = {}
    for width in (1, 20):
        scorer = CandidateScorer(model)
        scorer.start(ids, mask)
        sizes[width] = [scorer.cache_bytes()]
        for _ in range(3):
            candidates = torch.arange(6, 6 + width).expand(ROWS, -1)
            scorer.score(candidates, torch.ones_like(candidates))
            scorer.advance(candidates[:, 0], torch.ones(ROWS))
            sizes[width].append(scorer.cache_bytes())
    # Keys and values of every layer in float32, for 7 to 10 tokens of each row.
    layers, heads = model.backbone.config.num_hidden_layers, model.backbone.config.num_key_value_heads
    head_size = model.backbone.config.hidden_size // model.backbone.config.num_attention_heads
    token = 2 * layers * heads * head_size * 4
    assert sizes[1] == sizes[20] == [ROWS * token * length for length in (7, 8, 9, 10)]


def test_tokens_that_were_not_scored_wait_for_the_next_forward():
    """Whatever rows wait, and however long: values are as in separate forwards, with a forward for each scoring."""
    model = length_value_model()
    ids, mask = prompts()
    scorer, calls = CandidateScorer(model), count_forwards(model)
    scorer.start(ids, mask)
    prefixes = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    live = torch.ones(ROWS, dtype=torch.bool)
    forwards = len(calls)
    for step in range(8):
        scored = torch.zeros(ROWS, 3)
        candidates = torch.stack([torch.randperm(58)[:3] + 6 for _ in range(ROWS)])
        if step not in (1, 2, 5):
            scored = scorer.score(candidates, live.unsqueeze(1).expand(-1, 3))
            forwards += 1
            reference = count_free(model)
            for row in live.nonzero().flatten().tolist():
                for slot in range(3):
                    expected = separate(reference, prefixes[row], candidates[row, slot])
                    torch.testing.assert_close(scored[row, slot], expected, rtol=0, atol=1e-5)
        assert len(calls) == forwards
        # Rows take a candidate or a token that was not scored, as it comes; some finish.
        chosen = torch.where(torch.rand(ROWS) < 0.5, candidates[:, 1], torch.randint(6, VOCAB, (ROWS,)))
        live = live & (torch.arange(ROWS) != [0, 3, ROWS, 7, 5, 1, ROWS, ROWS][step])
        scorer.advance(chosen, live)
        for row in live.nonzero().flatten().tolist():
            prefixes[row] = torch.cat([prefixes[row], chosen[row].view(1)])


def count_free(model):
    """The same model for reference forwards that are not to be counted."""
    twin = copy.deepcopy(model)
    twin._forward_pre_hooks.clear()
    return twin


def test_a_token_that_was_no_candidate_is_appended_all_the_same():
    model = length_value_model()
    ids, mask = prompts()
    scorer, reference = CandidateScorer(model), FullRowScorer(count_free(model))
    calls = count_forwards(model)
    candidates, valid = torch.tensor([[6, 7]] * ROWS), torch.ones(ROWS, 2)
    for either in (scorer, reference):
        either.start(ids, mask)
        either.score(candidates, valid)
        either.advance(torch.tensor([6, 7, 50] + [6] * (ROWS - 3)), torch.ones(ROWS))
    torch.testing.assert_close(scorer.score(candidates, valid), reference.score(candidates, valid), rtol=0, atol=1e-5)
    # The row whose token waits lends its place to the others: one forward of three tokens.
    assert calls == [(ROWS, 7), (ROWS, 2), (ROWS, 3)]


def test_chunks_of_candidates_change_nothing():
    model = length_value_model()
    ids, mask = prompts()
    whole, parts = CandidateScorer(model), CandidateScorer(model, max_tokens=30)
    live = torch.ones(ROWS)
    for either in (whole, parts):
        either.start(ids, mask)
    for step in range(3):
        candidates = torch.stack([torch.randperm(VOCAB)[:7] for _ in range(ROWS)])
        valid = torch.ones(ROWS, 7)
        torch.testing.assert_close(parts.score(candidates, valid), whole.score(candidates, valid), rtol=0, atol=1e-5)
        for either in (whole, parts):
            either.advance(candidates[:, 6 - step], live)


def test_padding_ids_that_the_model_lacks_do_no_harm_but_candidates_do():
    model = length_value_model()
    ids, mask = prompts()
    strange = ids.masked_fill(mask == 0, 9999)
    for scorer in (CandidateScorer(model), FullRowScorer(model)):
        scorer.start(ids, mask)
        expected = scorer.score(torch.full((ROWS, 1), 8), torch.ones(ROWS, 1))
        scorer.start(strange, mask)
        torch.testing.assert_close(scorer.score(torch.full((ROWS, 1), 8), torch.ones(ROWS, 1)), expected)
        scorer.advance(torch.tensor([8] * (ROWS - 1) + [9999]), torch.tensor([1] * (ROWS - 1) + [0]))
        with pytest.raises(ValueError, match="outside the length value model's vocabulary"):
            scorer.score(torch.full((ROWS, 1), VOCAB), torch.ones(ROWS, 1))


def test_nothing_happens_once_all_rows_have_finished():
    model = length_value_model()
    ids, mask = prompts()
    scorer = CandidateScorer(model)
    scorer.start(ids, mask)
    calls = count_forwards(model)
    for _ in range(2):
        scorer.advance(torch.full((ROWS,), PAD), torch.zeros(ROWS))
        assert not scorer.score(torch.ones(ROWS, 2, dtype=torch.long), torch.zeros(ROWS, 2)).any()
    assert calls == []


def test_the_scripted_model_scores_exactly():
    chain = random_chain(8, seed=0)
    model = ScriptedLengthValue.from_chain(chain, 0.9)
    scorer = CandidateScorer(model)
    scorer.start(torch.tensor([[2, 3]]), torch.ones(1, 2))
    logits = scorer.score(torch.tensor([[5, 7, 2]]), torch.ones(1, 3))
    torch.testing.assert_close(-logits.sigmoid()[0], chain.value(0.9)[[5, 7, 2]].float())


def backbone(config_class, model_class, **config):
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
    return model_class(config_class(**sizes, **config)).eval()


def test_sliding_windows_and_recurrent_states_are_refused_by_name():
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    sliding = backbone(MistralConfig, MistralModel, sliding_window=4, **attention)
    recurrent = backbone(Lfm2Config, Lfm2Model, layer_types=["conv", "full_attention"], **attention)
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer.*scoring='full'"):
        CandidateScorer(LengthValueModel.from_backbone(sliding, gamma=0.9).freeze())
    with pytest.raises(ValueError, match="LinearAttentionLayer.*scoring='full'"):
        CandidateScorer(LengthValueModel.from_backbone(recurrent, gamma=0.9).freeze())


def test_full_rows_serve_a_sliding_window():
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    sliding = backbone(MistralConfig, MistralModel, sliding_window=4, **attention)
    model = tiny_length_value_model(sliding)
    ids, mask = prompts()
    scorer = FullRowScorer(model.freeze(), max_tokens=20)
    scorer.start(ids, mask)
    candidates = torch.stack([torch.randperm(VOCAB)[:3] for _ in range(ROWS)])
    logits = scorer.score(candidates, torch.ones(ROWS, 3))
    for row in range(ROWS):
        for slot in range(3):
            expected = separate(model, ids[row][mask[row].bool()], candidates[row, slot])
            torch.testing.assert_close(logits[row, slot], expected, rtol=0, atol=1e-5)


def test_a_model_in_training_mode_is_refused():
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=0.9)
    with pytest.raises(ValueError, match="training mode"):
        CandidateScorer(model.train())
    with pytest.raises(ValueError, match="training mode"):
        FullRowScorer(model)
