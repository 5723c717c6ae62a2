"""Lengths before sampling: exact chains, censored quantiles by hand and by coverage, batches by hand."""

import json
import logging
import math

import pytest
import torch
from tiny import assert_same_logits, tiny_length_value_model, tiny_llama, tiny_tokenizer

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.prediction import (
    LengthQuantiles,
    boundary_logits,
    kaplan_meier,
    length_aware_batches,
    padding_steps,
    predict_length,
    predict_remaining,
    weights_fingerprint,
)
from lenvm_rl.returns import remaining_from_logits
from lenvm_rl.sandbox.scripted import START, ScriptedLengthValue, countdown_chain
from lenvm_rl.tokenization import tokenizer_fingerprint

LONGEST = 61  # START + LONGEST is the last of 64 tokens


def countdown(gamma=0.9):
    """After token ``w(START + n)``, exactly n tokens are to come, the end counted."""
    model = ScriptedLengthValue.from_chain(countdown_chain([1 / LONGEST] * LONGEST), gamma)
    model.config.tokenizer_fingerprint = tokenizer_fingerprint(tiny_tokenizer())
    return model


def word(n):
    return f"w{START + n}"


@pytest.mark.parametrize("gamma", [0.9, 0.999])
def test_a_known_length_is_predicted_without_the_end(gamma):
    prompts = [f"{word(40)} {word(7)}", word(LONGEST), f"{word(5)} {word(5)} {word(25)}", word(4)]
    predicted = predict_length(countdown(gamma), tiny_tokenizer(), prompts, batch_size=3)
    torch.testing.assert_close(predicted, torch.tensor([6.0, LONGEST - 1.0, 24.0, 3.0]), rtol=1e-4, atol=1e-3)


def test_a_length_is_never_below_zero():
    model = tiny_length_value_model(tokenizer=tiny_tokenizer())
    torch.nn.init.zeros_(model.head.output.weight)
    torch.nn.init.constant_(model.head.output.bias, -30.0)
    assert predict_length(model, tiny_tokenizer(), ["w6", "w7 w8"]).tolist() == [0.0, 0.0]


def test_prompts_are_tokenised_as_in_sampling_and_batching_does_not_matter():
    tokenizer = tiny_tokenizer(chat=True)
    model = tiny_length_value_model(tokenizer=tokenizer)
    messages = [{"role": "user", "content": "w6 w9"}]
    prompts = ["w6 w7 w8 w9", messages, "w12", "w20 w21"]
    ids = [[6, 7, 8, 9], [3, 6, 9, 4], [12], [20, 21]]
    alone = [model(torch.tensor([row])).logits[0, -1] for row in ids]
    expected = remaining_from_logits(torch.stack(alone), 0.9).sub(1).clamp(min=0).detach()
    assert expected.std() > 0.1
    for batch_size in (1, 3, 64):
        found = predict_length(model, tokenizer, prompts, batch_size=batch_size)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_single_prompt_is_refused_and_not_taken_for_its_letters_or_messages():
    tokenizer = tiny_tokenizer(chat=True)
    model = tiny_length_value_model(tokenizer=tokenizer)
    for single in ("w6 w7 w8", [{"role": "system", "content": "w8"}, {"role": "user", "content": "w6 w9"}]):
        with pytest.raises(ValueError, match="[Pp]rompt"):
            predict_length(model, tokenizer, single)
        assert predict_length(model, tokenizer, [single]).shape == (1,)
    assert predict_length(model, tokenizer, []).shape == (0,)


def test_what_cannot_be_predicted_is_refused():
    tokenizer, model = tiny_tokenizer(), tiny_length_value_model(tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="64.*70"):
        predict_length(model, tiny_tokenizer(70), ["w6"])
    with pytest.raises(ValueError, match="Prompt 1.*513"):
        predict_length(model, tokenizer, ["w6", " ".join(["w6"] * 513)])
    with pytest.raises(ValueError, match="Prompt 0"):
        predict_length(model, tokenizer, [""])
    with pytest.raises(ValueError, match="Prompt 1"):
        boundary_logits(model, [[6], []])
    with pytest.raises(ValueError, match="batch_size"):
        predict_length(model, tokenizer, ["w6"], batch_size=0)
    with pytest.raises(ValueError, match="input_ids and attention_mask"):
        predict_remaining(model, torch.full((1, 3), 6), torch.ones(1, 2))
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        predict_length(model, tokenizer, ["w6"])
    with pytest.raises(ValueError, match="tokenizer"):
        predict_length(tiny_length_value_model(), tokenizer, ["w6"])


def test_what_remains_after_each_position_counts_the_end_and_ignores_padding():
    down = torch.tensor([START + 4, START + 3, START + 2, START + 1])
    ids = torch.full((2, 6), 999)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    ids[0, 2:], ids[1, :3] = down, down[1:]
    found = predict_remaining(countdown(), ids, mask)
    expected = torch.tensor([[0.0, 0, 4, 3, 2, 1], [3, 2, 1, 0, 0, 0]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # At the prompt's last token: one more than the length that a person counts.
    shorter = predict_length(countdown(), tiny_tokenizer(), [word(4)])
    assert float(found[0, 2]) - float(shorter[0]) == pytest.approx(1.0, abs=1e-4)


def test_kaplan_meier_by_hand():
    times = torch.tensor([3.0, 2.0, 1.0, 2.0, 5.0, 4.0])
    observed = torch.tensor([1, 1, 1, 0, 1, 0])
    # In sight 6 at 1, 5 at 2 (the one lost at 2 among them), 3 at 3, 1 at 5.
    shares = [5 / 6, 5 / 6 * 4 / 5, 4 / 6 * 2 / 3, 0.0]
    found_times, found = kaplan_meier(times, observed)
    assert found_times.tolist() == [1, 2, 3, 5]
    assert found.tolist() == pytest.approx(shares)
    # A weight of 2 is two of the kind; all weights doubled change nothing.
    weights = torch.tensor([1.0, 2, 1, 1, 1, 2])
    twice = kaplan_meier(times.repeat_interleave(weights.long()), observed.repeat_interleave(weights.long()))[1]
    assert kaplan_meier(times, observed, 3 * weights)[1].tolist() == pytest.approx(twice.tolist())
    # Further weight beyond every time stays in sight: 1/7, 1/6, 1/4, 1/2 of it fall.
    beyond = kaplan_meier(times, observed, beyond=1.0)[1]
    assert beyond.tolist() == pytest.approx([6 / 7, 5 / 7, 15 / 28, 15 / 56])
    # Nothing lost: the share of events that come later.
    assert kaplan_meier(times, torch.ones(6))[1].tolist() == pytest.approx([5 / 6, 3 / 6, 2 / 6, 1 / 6, 0])


def quantiles(lengths, finished=None, groups=None, levels=(0.5, 0.8), predicted=9.0):
    lengths = torch.tensor(lengths)
    finished = torch.ones(len(lengths)) if finished is None else torch.tensor(finished)
    groups = torch.arange(len(lengths)) if groups is None else torch.tensor(groups)
    return LengthQuantiles.fit(torch.full((len(lengths),), predicted), lengths, finished, groups, levels)


def test_quantiles_by_hand(caplog):
    # Predicted 9 + the end = 10; true 5, 10, 20, 40 with the end. Each of 4 prompts has a weight of 1/5.
    plain = quantiles([4, 9, 19, 39])
    assert plain.log_ratios == pytest.approx([math.log(2), math.log(4)])
    torch.testing.assert_close(plain.predict(torch.tensor([9.0, 0.0])), torch.tensor([[19.0, 39], [1, 3]]).double())
    assert (plain.prompts, plain.completions, plain.censored_share) == (4, 4, 0.0)
    # Cut after 20 tokens: then 1/5 + 1/5 are in sight at 40, and half of what was left falls: 1 - 3/5 * 1/2 = 0.7.
    with caplog.at_level(logging.INFO):
        cut = quantiles([4, 9, 20, 39], [1, 1, 0, 1])
    assert cut.log_ratios == pytest.approx([math.log(4), math.inf])
    assert cut.censored_share == 0.25 and cut.predict(torch.tensor([9.0])).tolist() == [[pytest.approx(39), math.inf]]
    assert "4 completions of 4 prompts, 25.0% cut" in caplog.text
    assert "levels [0.8] lie beyond the last completion seen to end" in caplog.text
    # Cut after 10 tokens means 11 or more: it is in sight at 10, where another one ends, and no longer at 11, where
    # that leaves one and the one beyond: 1 - 3/4 * 1/2 = 0.625.
    assert quantiles([9, 10, 10], [1, 0, 1], levels=(0.25, 0.6)).log_ratios == pytest.approx([0, math.log(1.1)])


def test_each_prompt_has_the_same_weight():
    # Prompt 5 has three short completions and prompt 7 a long one: 1/9 each and 1/3, 1/3 beyond.
    found = quantiles([9, 9, 19, 39], groups=[5, 5, 5, 7], levels=(0.2, 0.3, 0.6))
    assert found.log_ratios == pytest.approx([0, math.log(2), math.log(4)])


def test_too_few_prompts_for_a_level_are_an_error():
    groups = [0, 1, 2, 3, 4, 5, 6, 7] * 10
    with pytest.raises(ValueError, match="level 0.9.* 9 prompts"):
        quantiles([5] * 80, groups=groups, levels=(0.5, 0.9))
    # The bound itself is allowed: 10 * (1 - 0.9) = 1, whatever rounding makes of it.
    assert quantiles(list(range(9)), levels=(0.9,)).predict(torch.tensor([9.0])).tolist() == [[pytest.approx(8)]]
    assert quantiles(list(range(99)), levels=(0.99,)).predict(torch.tensor([9.0])).tolist() == [[pytest.approx(98)]]
    for levels in ((), (0.9, 0.5), (0.5, 0.5), (0.0,), (1.0,)):
        with pytest.raises(ValueError, match="levels"):
            quantiles([5] * 80, groups=groups, levels=levels)
    with pytest.raises(ValueError, match="predicted"):
        LengthQuantiles.fit(torch.ones(3), torch.ones(2), torch.ones(3), torch.arange(3))
    with pytest.raises(ValueError, match="predictions"):
        quantiles([5, 0], [1, 0], levels=(0.5,))


def simulate(prompts, generator, samples=None):
    """Ratios that vary between and within prompts; what is easy to predict has many completions."""
    center = 0.5 * torch.randn(prompts, generator=generator).double()
    count = (1 + 11 * torch.rand(prompts, generator=generator) * (center < 0)).long() if samples is None else samples
    group = torch.arange(prompts).repeat_interleave(count)
    predicted = 20.0 + 200 * torch.rand(prompts, generator=generator).double()[group]
    noise = 0.3 * torch.randn(len(group), generator=generator).double()
    return predicted, (predicted * torch.exp(center[group] + noise)).round(), group


def coverage(fit, trials=150, prompts=30):
    """Share of new completions, one for each of many new prompts, that are no longer than the quantiles."""
    generator, hits = torch.Generator().manual_seed(0), []
    for _ in range(trials):
        found = fit(*simulate(prompts, generator), generator)
        predicted, lengths, _ = simulate(200, generator, samples=1)
        hits.append((lengths.unsqueeze(1) <= found.predict(predicted)).double().mean(0))
    return torch.stack(hits).mean(0).tolist()


def test_a_new_completion_is_covered_as_often_as_promised():
    levels = (0.5, 0.8, 0.9)

    def fit(predicted, lengths, group, generator):
        return LengthQuantiles.fit(predicted, lengths, torch.ones(len(group)), group, levels)

    for level, share in zip(levels, coverage(fit), strict=True):
        assert level - 0.015 <= share <= level + 1 / 31 + 0.025

    def pooled(predicted, lengths, group, generator):
        return LengthQuantiles.fit(predicted, lengths, torch.ones(len(group)), torch.arange(len(group)), levels)

    # Every completion taken for a prompt of its own, the prompts that have many of them decide: too short.
    assert all(share < level - 0.03 for level, share in zip(levels, coverage(pooled), strict=True))


def test_cut_completions_are_neither_dropped_nor_taken_for_short():
    levels = (0.5, 0.8)

    def cut(predicted, lengths, generator):
        limit = (predicted * torch.exp(0.3 + 0.6 * torch.randn(len(predicted), generator=generator))).round()
        limit = limit.clamp(min=1)
        return torch.minimum(lengths, limit), lengths < limit

    def censored(predicted, lengths, group, generator):
        return LengthQuantiles.fit(predicted, *cut(predicted, lengths, generator), group, levels)

    def dropped(predicted, lengths, group, generator):
        seen, ended = cut(predicted, lengths, generator)
        assert 0.1 < float((~ended).double().mean()) < 0.5
        return LengthQuantiles.fit(predicted[ended], seen[ended], ended[ended], group[ended], levels)

    right, wrong = coverage(censored), coverage(dropped)
    assert all(level - 0.02 <= share <= level + 0.07 for level, share in zip(levels, right, strict=True))
    assert all(share < level - 0.03 for level, share in zip(levels, wrong, strict=True))


def test_quantiles_ascend_with_the_level_and_survive_a_file(tmp_path):
    predicted, lengths, group = simulate(40, torch.Generator().manual_seed(1))
    ended = torch.rand(len(group), generator=torch.Generator().manual_seed(2)) < 0.6
    found = LengthQuantiles.fit(predicted, lengths, ended, group, tuple(level / 100 for level in range(2, 98, 3)))
    steps = found.predict(predicted).diff(dim=1).nan_to_num(0.0)  # inf - inf where several lie beyond the last event
    assert bool((steps >= 0).all()) and bool((steps > 0).any())
    found.save(tmp_path / "quantiles.json")
    assert LengthQuantiles.load(tmp_path / "quantiles.json") == found
    beyond = quantiles([4, 9, 20, 39], [1, 1, 0, 0], levels=(0.25, 0.75))
    beyond.save(tmp_path / "beyond.json")
    assert json.loads((tmp_path / "beyond.json").read_text())["log_ratios"][1] is None
    assert LengthQuantiles.load(tmp_path / "beyond.json") == beyond


def test_batches_by_hand():
    lengths = [3.0, 9.0, 1.0, 9.0, 5.0]
    assert length_aware_batches(lengths, 2) == [[1, 3], [4, 0], [2]]
    assert length_aware_batches(torch.tensor(lengths), 2, order="ascending") == [[2, 0], [4, 1], [3]]
    assert length_aware_batches(lengths, 9) == [[1, 3, 4, 0, 2]]
    assert length_aware_batches([], 2) == []
    # 3 rows of 9 tokens, 2 of 5, 1 of 1 are computed for 9 + 9 + 5 + 3 + 1 tokens that are there.
    assert padding_steps([3, 9, 1, 9, 5], [[1, 3], [4, 0], [2]]) == 0 + 2 + 0
    assert padding_steps(torch.tensor([3, 9, 1, 9, 5]), [[0, 1], [2, 3, 4]]) == 6 + (8 + 0 + 4)
    for wrong in ([[0, 1], [2, 3]], [[0, 1, 2, 3, 4], [0]], [[1, 2, 3, 4, 5]]):
        with pytest.raises(ValueError, match="batches"):
            padding_steps([3, 9, 1, 9, 5], wrong)


@pytest.mark.parametrize("order", ["descending", "ascending", "random"])
def test_every_index_is_there_once_and_padding_is_least_for_the_true_lengths(order):
    lengths = torch.randint(1, 300, (157,), generator=torch.Generator().manual_seed(3))
    seed = 4 if order == "random" else None
    batches = length_aware_batches(lengths, 16, order=order, seed=seed)
    assert sorted(index for batch in batches for index in batch) == list(range(157))
    assert sorted(len(batch) for batch in batches) == [13] + [16] * 9
    shuffled = torch.randperm(157, generator=torch.Generator().manual_seed(5)).tolist()
    drawn = [shuffled[start : start + 16] for start in range(0, 157, 16)]
    assert padding_steps(lengths, batches) < 0.2 * padding_steps(lengths, drawn)
    if order == "random":
        kept = length_aware_batches(lengths, 16)
        assert batches != kept and sorted(batches) == sorted(kept)
        assert batches == length_aware_batches(lengths, 16, order=order, seed=4)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"order": "longest"}, "order one of descending, ascending, random"),
        ({"order": "random"}, "seed=None: the seed belongs"),
        ({"seed": 1}, "seed=1: the seed belongs"),
        ({"predicted_lengths": [1.0, math.nan]}, "hold no NaN"),
        ({"predicted_lengths": [[1.0]]}, r"must be \(N,\)"),
    ],
)
def test_bad_batches_are_refused(change, problem):
    with pytest.raises(ValueError, match=problem):
        length_aware_batches(**{"predicted_lengths": [1.0, 2.0], "batch_size": 2, **change})


def test_the_fingerprint_is_that_of_the_weights(tmp_path):
    model = tiny_length_value_model()
    known = weights_fingerprint(model)
    model.save_pretrained(tmp_path)
    loaded = LengthValueModel.from_pretrained(tmp_path)
    assert_same_logits(model, loaded)
    assert weights_fingerprint(loaded) == known == weights_fingerprint(tiny_length_value_model())
    with torch.no_grad():
        loaded.head.output.bias += 1e-3
    assert weights_fingerprint(loaded) != known
    assert weights_fingerprint(model.to(torch.bfloat16)) != known
    # A base that is shared is no part of the model, but of what it predicts.
    of = [LengthValueModel.from_backbone(tiny_llama(seed=seed), gamma=0.9, form="head") for seed in (0, 1, 0)]
    with torch.no_grad():
        for each in of:
            each.head.load_state_dict(model.float().head.state_dict())
    first, other, same = map(weights_fingerprint, of)
    assert first == same != other
