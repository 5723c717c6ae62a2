"""Candidate scoring: whatever rows come, go and wait, scores are those of separate full forwards, and cost no more."""

import random

import pytest
import torch
from tiny import tiny_gpt2, tiny_length_value_model, tiny_llama, tiny_qwen2
from transformers import Lfm2Config, Lfm2Model, MistralConfig, MistralModel

from lenvm_rl.decoding.scoring import FullRowScorer, SlotScorer
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.sandbox.scripted import ScriptedLengthValue, random_chain

VOCAB, GAMMA = 64, 0.9


def length_value_model(make=tiny_llama, **config):
    return tiny_length_value_model(make(vocab_size=VOCAB, **config), seed=1).freeze()


def adapter_form(base=None):
    """A length value model on a base that it shares, its adapter far from nothing."""
    model = LengthValueModel.from_backbone(base or tiny_llama(vocab_size=VOCAB), gamma=GAMMA, form="adapter")
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3, generator=torch.Generator().manual_seed(weight.numel()))
    return model.freeze()


def separate(model, prefix, candidates):
    """Logits of candidates after a prefix, each in a row of its own; within rounding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prefix, candidate] for candidate in candidates])).logits[:, -1]
    return pytest.approx(logits.tolist(), rel=2e-6, abs=1e-5)


def count_forwards(model):
    """The ids of every forward from now on."""
    calls = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["input_ids"]), with_kwargs=True)
    return calls


def score_lists(scorer, asked):
    """Scores `{slot: candidates}`, in an order and a layout of chance; a list for each slot."""
    slots, width = list(asked), max(map(len, asked.values())) + random.randrange(2)
    candidates, valid = torch.full((len(slots), width), 9999), torch.zeros(len(slots), width)
    columns = [sorted(random.sample(range(width), len(asked[slot]))) for slot in slots]
    for row, slot in enumerate(slots):
        candidates[row, columns[row]] = torch.tensor(asked[slot], dtype=torch.long)
        valid[row, columns[row]] = 1
    logits = scorer.score(slots, candidates, valid)
    assert logits.shape == valid.shape and bool((logits[valid == 0] == 0).all())
    return {slot: logits[row, columns[row]].tolist() for row, slot in enumerate(slots)}


class Schedule:
    """Rows that come, go, are interrupted and come back, let tokens wait, and are scored, as chance has it.

    `rows` is what a scorer should know: the tokens of each slot, how many of them it has read, and what it scored last.
    """

    def __init__(self, scorer, seed):
        self.scorer, self.rows = scorer, {}
        random.seed(seed)

    def tokens(self, most):
        return [random.randrange(VOCAB) for _ in range(random.randint(1, most))]

    def come(self, ids=None):
        ids = ids or self.tokens(9)
        self.rows[self.scorer.add(ids)] = {"ids": list(ids), "read": 0, "last": []}

    def go(self):
        if self.rows:
            slot = random.choice(list(self.rows))
            self.scorer.remove(slot)
            return self.rows.pop(slot)["ids"]

    def come_back(self):
        self.come(self.go())

    def write(self):
        for slot, row in random.sample(list(self.rows.items()), random.randint(0, len(self.rows))):
            chosen = [random.choice(row["last"])] if row["last"] and random.random() < 0.7 else self.tokens(4)
            row["read"] += row["read"] == len(row["ids"]) and chosen[0] in row["last"]
            row["ids"] += chosen
            row["last"] = []
            self.scorer.append(slot, chosen)

    def score(self):
        """Scores some rows; returns what each gave and which tokens had to be read for it."""
        some = random.sample(list(self.rows), random.randint(0, len(self.rows)))
        asked = {slot: random.sample(range(VOCAB), random.choice([0, 1, 2, 7])) for slot in some}
        asked = {slot: candidates for slot, candidates in asked.items() if len(self.rows[slot]["ids"]) < 30}
        if not asked:
            return {}, 0
        found, needed = score_lists(self.scorer, asked), 0
        for slot, candidates in asked.items():
            row = self.rows[slot]
            if candidates:
                needed += len(row["ids"]) - row["read"] + len(candidates)
                row["read"], row["last"] = len(row["ids"]), candidates
        return {slot: dict(zip(asked[slot], found[slot], strict=True)) for slot in asked}, needed

    def step(self):
        for action in random.choices([self.come, self.go, self.come_back, self.write], [4, 1, 2, 6], k=4):
            action()
        return self.score()


MODELS = {
    "rotated": length_value_model,
    "rotated, eager": lambda: length_value_model(attn_implementation="eager"),
    "with biases": lambda: length_value_model(tiny_qwen2),
    "absolute positions": lambda: tiny_length_value_model(tiny_gpt2(vocab_size=VOCAB), seed=1).freeze(),
    "shared heads": lambda: length_value_model(hidden=32, num_attention_heads=4, num_key_value_heads=2),
    "an adapter": adapter_form,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", MODELS)
def test_scores_of_any_schedule_are_those_of_separate_forwards(kind, seed):
    model = MODELS[kind]()
    # Every other bound is none; and a forward holds all, or hardly a row.
    bounds = {"max_cached_tokens": [None, 70, 31][seed], "max_tokens": [16384, 40, 6][seed]}
    schedule = Schedule(SlotScorer(model, **bounds), seed)
    compared = 0
    for _ in range(25):
        found, _ = schedule.step()
        for slot, scores in found.items():
            if scores:
                assert list(scores.values()) == separate(model, schedule.rows[slot]["ids"], scores)
                compared += len(scores)
    assert compared > 100


@pytest.mark.parametrize("seed", range(3))
def test_a_forward_reads_what_waits_and_what_is_asked_and_nothing_else(seed):
    """One forward for each scoring, without padding, rows that are not scored, and tokens that are read already."""
    model = length_value_model()
    schedule = Schedule(SlotScorer(model), seed)
    # What is asked of a model once is none of the forwards that are counted.
    schedule.scorer.check_length(31)
    calls = count_forwards(model)
    for _ in range(40):
        calls.clear()
        _, needed = schedule.step()
        assert [call.shape for call in calls] == ([(1, needed)] if needed else [])


@pytest.mark.parametrize(("bound", "seed"), [(31, 0), (45, 1), (200, 2)])
def test_the_cache_never_holds_more_than_its_bound(bound, seed):
    model = length_value_model()
    scorer, held = SlotScorer(model, max_cached_tokens=bound), []
    model.register_forward_pre_hook(lambda *_: held.append(scorer.cached_tokens))
    schedule = Schedule(scorer, seed)
    for _ in range(40):
        schedule.step()
        held.append(scorer.cached_tokens)
    assert max(held) <= bound and max(held) > bound - 20
    # Keys and values of both layers, one head of 8 numbers in float32; padding points at a token of zeros.
    assert scorer.cache_bytes() <= (bound + 1) * 2 * 2 * 8 * 4
    for slot in schedule.rows:
        scorer.remove(slot)
    assert scorer.cached_tokens == 0


def test_places_are_used_again():
    """Rows that come and go for long take no more than those that are there at once."""
    scorer, sizes = SlotScorer(length_value_model()), []
    for _ in range(30):
        slots = [scorer.add(list(range(1, 40))) for _ in range(4)]
        score_lists(scorer, {slot: [5, 6, 7] for slot in slots})
        assert scorer.cached_tokens == 4 * (39 + 3)
        for slot in slots:
            scorer.append(slot, [6])
        assert scorer.cached_tokens == 4 * 40
        for slot in slots:
            scorer.remove(slot)
        sizes.append(scorer.cache_bytes())
    assert len(set(sizes)) == 1


def test_the_rows_that_were_scored_longest_ago_are_dropped_and_read_again():
    model = length_value_model()
    scorer, calls = SlotScorer(model, max_cached_tokens=20), count_forwards(model)
    first, second, third = (scorer.add([start, 2, 3, 4, 5]) for start in (10, 11, 12))
    for slot in (first, second, first):
        score_lists(scorer, {slot: [7, 8]})
    # Five and two for each; the two candidates of the first are scored anew.
    assert [call.numel() for call in calls] == [7, 7, 2] and scorer.cached_tokens == 14
    score_lists(scorer, {third: [7, 8]})
    # The second was scored longest ago.
    assert scorer.cached_tokens == 14 and calls[-1].numel() == 7
    score_lists(scorer, {first: [7, 8]})
    assert calls[-1].numel() == 2
    score_lists(scorer, {second: [7, 8]})
    assert calls[-1].numel() == 7 and scorer.cached_tokens == 14


def test_rows_that_do_not_fit_together_are_scored_one_after_the_other():
    model = length_value_model()
    scorer, calls = SlotScorer(model, max_cached_tokens=16), count_forwards(model)
    slots = [scorer.add([start, 2, 3, 4, 5, 6]) for start in (10, 11, 12)]
    found = score_lists(scorer, {slot: [7, 8, 9] for slot in slots})
    # Beside the 9 tokens of the first is place for the second's 6 and one candidate; beside its 9, for the third's.
    assert [call.numel() for call in calls] == [9 + 7, 2 + 7, 2]
    for start, slot in zip((10, 11, 12), slots, strict=True):
        assert found[slot] == separate(model, [start, 2, 3, 4, 5, 6], [7, 8, 9])


def test_a_row_beyond_the_bound_is_refused_by_name():
    scorer = SlotScorer(length_value_model(), max_cached_tokens=8)
    slot = scorer.add([1] * 8)
    with pytest.raises(ValueError, match="max_cached_tokens=8"):
        score_lists(scorer, {slot: [3]})
    with pytest.raises(ValueError, match="max_cached_tokens must be at least 2"):
        SlotScorer(length_value_model(), max_cached_tokens=1)


def test_siblings_do_not_see_each_other():
    scorer = SlotScorer(length_value_model())
    slots = [scorer.add(ids) for ids in ([9, 8, 7], [5], [3, 4, 5, 6, 7, 8])]

    def scored(candidates):
        return torch.tensor(list(score_lists(scorer, {slot: candidates for slot in slots}).values()))

    together = scored([10, 20, 30, 40, 50, 60])
    assert together.std() > 0.1
    torch.testing.assert_close(scored([60, 30, 10]), together[:, [5, 2, 0]], rtol=0, atol=1e-5)
    torch.testing.assert_close(scored([10, 21, 31, 41])[:, :1], together[:, :1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["full", "adapter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, form):
    """As near to float32 as full rows in that dtype are."""
    make = {"full": length_value_model, "adapter": adapter_form}[form]
    exact, model = make(), make()
    model.backbone.to(dtype)
    scorers = SlotScorer(model), FullRowScorer(model), FullRowScorer(exact)
    found = [[], [], []]
    for scorer, logits in zip(scorers, found, strict=True):
        slots = [scorer.add([*range(row, 12)]) for row in range(3, 9)]
        for step in range(4):
            logits += score_lists(scorer, {slot: [step, 20 + step, 40 + step] for slot in slots}).values()
            for slot in slots:
                scorer.append(slot, [20 + step])
    cached, full, true = map(torch.tensor, found)
    assert (cached - true).abs().mean() < 1.5 * (full - true).abs().mean() + 1e-4
    torch.testing.assert_close(cached, full, rtol=0, atol=0.1 * float(true.std()) + 0.02)


def test_the_attention_is_the_models_own_before_and_after():
    model = adapter_form(tiny_llama(vocab_size=VOCAB, attn_implementation="eager"))
    scorer = SlotScorer(model)
    slot = scorer.add([1, 2, 3])
    score_lists(scorer, {slot: [4, 5]})
    assert model.backbone.config._attn_implementation == "eager"
    handle = model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    scorer.append(slot, [6, 7])
    with pytest.raises(ZeroDivisionError):
        score_lists(scorer, {slot: [4, 5]})
    assert model.backbone.config._attn_implementation == "eager"
    # What failed was not read: it is when it is asked for again.
    handle.remove()
    assert scorer.cached_tokens == 3 and score_lists(scorer, {slot: [4]})[slot] == separate(model, [1, 2, 3, 6, 7], [4])


@pytest.mark.parametrize("kind", [SlotScorer, FullRowScorer])
def test_what_is_no_token_is_refused(kind):
    scorer = kind(length_value_model())
    slot = scorer.add([8])
    for wrong in (VOCAB, -1):
        for refused in (
            lambda wrong=wrong: scorer.add([wrong]),
            lambda wrong=wrong: scorer.append(slot, [3, wrong]),
            lambda wrong=wrong: scorer.score([slot], torch.tensor([[8, wrong]]), torch.ones(1, 2)),
        ):
            with pytest.raises(ValueError, match=f"token {wrong} is outside the length value model's vocabulary"):
                refused()
    with pytest.raises(ValueError, match="token_ids is empty"):
        scorer.add([])
    # Where there is no candidate, any id may stand.
    scorer.score([slot], torch.tensor([[8, 9999]]), torch.tensor([[1, 0]]))


def test_nothing_is_read_before_something_is_asked():
    model = length_value_model()
    scorer, calls = SlotScorer(model), count_forwards(model)
    slot = scorer.add([1, 2, 3])
    scorer.append(slot, [4, 5])
    assert not scorer.score([slot], torch.ones(1, 2, dtype=torch.long), torch.zeros(1, 2)).any()
    assert scorer.score([], torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)).shape == (0, 2)
    scorer.remove(slot)
    assert calls == []


def test_the_scripted_model_scores_exactly():
    chain = random_chain(8, seed=0)
    scorer = SlotScorer(ScriptedLengthValue.from_chain(chain, GAMMA))
    logits = scorer.score([scorer.add([2, 3])], torch.tensor([[5, 7, 2]]), torch.ones(1, 3))
    torch.testing.assert_close(-logits.sigmoid()[0], chain.value(GAMMA)[[5, 7, 2]].float())


def backbone(config_class, model_class, **config):
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
    return model_class(config_class(**sizes, **config)).eval()


def test_sliding_windows_and_recurrent_states_are_refused_by_name():
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    sliding = backbone(MistralConfig, MistralModel, sliding_window=4, **attention)
    recurrent = backbone(Lfm2Config, Lfm2Model, layer_types=["conv", "full_attention"], **attention)
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer.*scoring='full'"):
        SlotScorer(LengthValueModel.from_backbone(sliding, gamma=GAMMA).freeze())
    with pytest.raises(ValueError, match="LinearAttentionLayer.*scoring='full'"):
        SlotScorer(LengthValueModel.from_backbone(recurrent, gamma=GAMMA).freeze())


def test_full_rows_serve_a_sliding_window():
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    model = tiny_length_value_model(backbone(MistralConfig, MistralModel, sliding_window=4, **attention)).freeze()
    schedule = Schedule(FullRowScorer(model, max_tokens=20), seed=0)
    for _ in range(8):
        for slot, scores in schedule.step()[0].items():
            if scores:
                assert list(scores.values()) == separate(model, schedule.rows[slot]["ids"], scores)


def test_a_model_in_training_mode_is_refused():
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    with pytest.raises(ValueError, match="training mode"):
        SlotScorer(model.train())
    with pytest.raises(ValueError, match="training mode"):
        FullRowScorer(model)
