"""Length tokens: a world whose shifts are known by hand, nothing dropped, intervals over prompts, what is written."""

import csv
import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import EOS, tiny_length_value_model, tiny_tokenizer, tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eval.length_tokens import (
    Occurrences,
    TokenArguments,
    find_contexts,
    find_occurrences,
    join_words,
    main,
    measure_tokens,
    rank,
    report_tokens,
    word_starts,
)
from eval.statistics import mean_interval
from eval.viewer.tokens import Piece, TokenValues, token_values
from lenvm_rl.pretraining.trainer import LengthValueTrainingArguments, pretrain
from lenvm_rl.rollouts.record import RolloutMetadata, write_rollouts
from lenvm_rl.sandbox import Overthinking, PolicySettings, draw_completion, sandbox_tokenizer, stream_problems
from lenvm_rl.sandbox.policy import new_policy
from lenvm_rl.sandbox.scripted import START, ScriptedLengthValue, countdown_chain
from lenvm_rl.tokenization import tokenizer_fingerprint

GAMMA = 0.9
# Token START + n says that n tokens follow. A completion begins with "wait" (three follow) or "so" (one follows).
SO, SOON, WAIT = START + 1, START + 2, START + 3
VALUE = -(1 - (GAMMA**4 + GAMMA**2) / 2)  # at the start
WAIT_SHIFT = (1 - GAMMA) + GAMMA * (1 - GAMMA**3) + VALUE
SO_SHIFT = (1 - GAMMA) + GAMMA * (1 - GAMMA) + VALUE


def named_tokenizer():
    words = ["<pad>", "<eos>", "go", "so", "soon", "wait"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="go"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def record(completion, group, prompt=(START,)):
    reason = "stop" if completion[-1] == EOS else "length"
    return {
        "prompt": "go",
        "prompt_ids": list(prompt),
        "completion_ids": completion,
        "finish_reason": reason,
        "group": group,
    }


def world(prompts=12):
    """Per prompt: one long and one short completion, and one that was cut."""
    rows = []
    for group in range(prompts):
        rows += [record([WAIT, SOON, SO, EOS], group), record([SO, EOS], group), record([WAIT, SOON], group)]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    model = ScriptedLengthValue.from_chain(countdown_chain([0.5, 0.0, 0.5]), GAMMA)
    args = TokenArguments("unused", min_count=5, output_dir=str(folder))
    return report_tokens(args, world(), model, named_tokenizer()), folder


def test_shifts_in_a_world_that_is_known(report):
    found, _ = report
    (longer,) = [row for row in found["longer"] if row["shift"]["estimate"] > 1e-5]
    assert longer["token"] == "wait" and longer["count"] == 24 and longer["prompts"] == 12
    assert longer["shift"]["estimate"] == pytest.approx(WAIT_SHIFT, abs=1e-6)
    # All occurrences are alike, and so are all resamples.
    assert longer["shift"]["low"] == pytest.approx(WAIT_SHIFT, abs=1e-6) == longer["shift"]["high"]
    at_start = np.log(1 + VALUE) / np.log(GAMMA)
    assert longer["shift_in_tokens"]["estimate"] == pytest.approx(4 - at_start, abs=1e-4)
    shorter = found["shorter"][0]
    # Chosen first it decides; as the last word of a long completion it was expected. Each as often.
    assert shorter["token"] == "so" and shorter["count"] == 24
    assert shorter["shift"]["estimate"] == pytest.approx(SO_SHIFT / 2, abs=1e-6)


def test_the_end_is_worth_what_was_expected_and_no_completion_is_lost(report):
    found, folder = report
    rows = {row["token"]: row for row in csv.DictReader((folder / "length_tokens.csv").open(encoding="utf-8"))}
    # A value of -0.5 after the end, where it must be 0, would be a shift of 0.45.
    assert float(rows["<eos>"]["shift"]) == pytest.approx(0.0, abs=1e-6)
    assert float(rows["<eos>"]["shift_in_tokens"]) == pytest.approx(0.0, abs=1e-4)
    assert {name: int(row["count"]) for name, row in rows.items()} == {"wait": 24, "so": 24, "soon": 24, "<eos>": 24}
    assert found["completions"] == 36 and found["cut"] == 12 and found["prompts"] == 12
    assert found["occurrences"] == 12 * (4 + 2 + 2) and found["tokens"] == 4
    assert found["below_min_count"] == {"tokens": 0, "occurrences": 0}


def test_contexts_show_the_text_around_an_occurrence(report):
    found, _ = report
    contexts = found["longer"][0]["contexts"]
    assert len(contexts) == 3 and len({context["row"] for context in contexts}) == 3
    for context in contexts:
        assert context["token"] == " wait" and context["before"] == "go" and context["place"] == 0
        assert context["after"] == (" soon so<eos>" if context["row"] % 3 == 0 else " soon")
        assert context["shift"] == pytest.approx(WAIT_SHIFT, abs=1e-6)


def test_rare_tokens_are_counted_and_not_ranked(tmp_path):
    model = ScriptedLengthValue.from_chain(countdown_chain([0.5, 0.0, 0.5]), GAMMA)
    rollouts = Dataset.from_list([*world(2), record([SO, EOS], 2)])
    args = TokenArguments("unused", min_count=5, contexts=0, output_dir=str(tmp_path))
    found = report_tokens(args, rollouts, model, named_tokenizer())
    # wait 4, soon 4, so 5, end 5.
    assert found["below_min_count"] == {"tokens": 2, "occurrences": 8}
    assert {row["token"] for side in ("longer", "shorter") for row in found[side]} <= {"so", "<eos>"}
    assert found["shorter"][0]["contexts"] == []
    rows = {row["token"]: row for row in csv.DictReader((tmp_path / "length_tokens.csv").open(encoding="utf-8"))}
    assert float(rows["wait"]["shift"]) == pytest.approx(WAIT_SHIFT, abs=1e-6) and rows["wait"]["shift_low"] == ""


def random_occurrences(seed=0, count=3000, prompts=30, kinds=7):
    generator = np.random.default_rng(seed)
    prompt = np.sort(generator.integers(0, prompts, count))
    token = generator.integers(0, kinds, count) * 3
    token[prompt > 24] = 0  # not every token occurs in every prompt
    shift = generator.normal(size=count) + 0.1 * token + generator.normal(size=prompts)[prompt]
    return Occurrences(token, prompt, np.arange(count), prompt, shift, 10 * shift, np.ones(count, dtype=int))


def test_intervals_are_those_of_the_cluster_bootstrap(monkeypatch):
    found = random_occurrences()
    # Tokens are resampled a few at a time, all with the same draws.
    monkeypatch.setattr("eval.length_tokens.HELD_TOKENS", 2)
    rows = measure_tokens(found, 1, num_resamples=300, seed=4)
    assert [row["shift"]["estimate"] for row in rows] == sorted((r["shift"]["estimate"] for r in rows), reverse=True)
    assert {row["token_id"] for row in rows} == {0, 3, 6, 9, 12, 15, 18}
    for row in rows:
        weights = (found.token == row["token_id"]).astype(float)
        assert row["count"] == weights.sum()
        assert row["prompts"] == len(set(found.prompt[found.token == row["token_id"]]))
        for name, values in (("shift", found.shift), ("shift_in_tokens", found.shift_in_tokens)):
            expected = mean_interval(values, found.prompt, weights, num_resamples=300, seed=4)
            assert row[name]["estimate"] == pytest.approx(expected.estimate)
            assert row[name]["low"] == pytest.approx(expected.low)
            assert row[name]["high"] == pytest.approx(expected.high)


def test_a_token_of_too_few_prompts_has_no_interval():
    found = random_occurrences()
    found.token[found.prompt == 3] = 21
    found.token[(found.prompt != 3) & (found.token == 21)] = 0
    (row,) = [row for row in measure_tokens(found, 1, num_resamples=300) if row["token_id"] == 21]
    assert row["prompts"] == 1 and row["count"] > 20 and row["shift"]["low"] is None is row["shift"]["high"]


def test_ranking_takes_the_sign_and_the_count_into_account():
    rows = [{"shift": {"estimate": estimate}, "count": count, "prompts": count // 2} for estimate, count in
            ((0.4, 1), (0.3, 9), (0.2, 9), (0.0, 9), (-0.1, 9), (-0.5, 9), (-0.9, 1))]  # fmt: skip
    found = rank(rows, min_count=2, top=1)
    assert [row["shift"]["estimate"] for row in found["longer"]] == [0.3]
    assert [row["shift"]["estimate"] for row in found["shorter"]] == [-0.5]
    assert rank(rows, min_count=2, top=1, min_prompts=5) == {"longer": [], "shorter": []}


def test_occurrences_keep_the_order_of_the_rollouts():
    rollouts = Dataset.from_list([record([SO, EOS], 7), record([WAIT, SOON, SO, EOS], 3)])
    model = ScriptedLengthValue.from_chain(countdown_chain([0.5, 0.0, 0.5]), GAMMA)
    found = find_occurrences(rollouts, token_values(model, rollouts))
    assert found.token.tolist() == [SO, EOS, WAIT, SOON, SO, EOS]
    assert found.row.tolist() == [0, 0, 1, 1, 1, 1] and found.place.tolist() == [0, 1, 0, 1, 2, 3]
    assert found.prompt.tolist() == [1, 1, 0, 0, 0, 0]
    assert found.shift[[0, 2]] == pytest.approx([SO_SHIFT, WAIT_SHIFT], abs=1e-6)


def test_where_words_begin():
    part, whole = Piece("", 1, 2), Piece("é", 2, 2)
    end = Piece("<eos>", special=True)
    texts = ["W", "ait", ",", " un", "do", " 1", "23", "\n", "\n", "Caf", part, whole, "s", "中", "文", end, "x", end]
    pieces = [text if isinstance(text, Piece) else Piece(text) for text in texts]
    words = ["".join(piece.text for piece in own) for own in np.split(pieces, word_starts(pieces)[1:])]
    assert words == [*("Wait", ",", " undo", " 123", "\n", "\n", "Cafés", "中", "文", "<eos>", "x", "<eos>")]
    # A sign of two parts is not of the word before it, and what is cut in its middle has no text.
    smile = [Piece("so"), Piece("", 1, 2), Piece("🙂", 2, 2), Piece("", 1, 2)]
    assert word_starts(smile).tolist() == [0, 1, 3]


def test_a_word_has_the_shifts_of_its_pieces():
    """`_wait` is `_w` and `ait`: in value the second counts a step later, in tokens both count whole."""
    core = Tokenizer(models.BPE({"<eos>": 0, "w": 1, "ait": 2, "!": 3, "▁": 4}, []))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    rollouts = Dataset.from_list([record([1, 2, 3, 1], 0, prompt=(4,)), record([1, 2, 0], 1, prompt=(4,))])
    shifts = [torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.5, -1.0, 3.0])]
    values = [TokenValues(shift, shift, shift, 10 * shift) for shift in shifts]
    found, words = join_words(find_occurrences(rollouts, values), rollouts, tokenizer, GAMMA)
    assert [words[number] for number in found.token] == ["wait", "!", "w", "wait", "<eos>"]
    assert found.row.tolist() == [0, 0, 0, 1, 1] and found.place.tolist() == [0, 2, 3, 0, 2]
    assert found.prompt.tolist() == [0, 0, 0, 1, 1] and found.width.tolist() == [2, 1, 1, 2, 1]
    assert found.shift == pytest.approx([1 + 0.9 * 2, 4, 8, 0.5 - 0.9, 3])
    assert found.shift_in_tokens == pytest.approx([30, 40, 80, -5, 30])
    contexts = find_contexts(found, rollouts, tokenizer, int(found.token[0]), TokenArguments("unused"))
    assert [(each["token"], each["after"]) for each in contexts] == [("wait", "!w"), ("wait", "<eos>")]


def test_the_program_reads_files_and_writes_table_json_csv_and_figure(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tiny_length_value_model(tokenizer=tokenizer).save_pretrained(tmp_path / "lenvm")
    tokenizer.save_pretrained(tmp_path / "lenvm")
    rows = [record([*tokens(1, 4 + n % 3, seed=n)[0].tolist(), EOS], n // 2, prompt=(6, 7)) for n in range(40)]
    metadata = RolloutMetadata("p", tokenizer_fingerprint(tokenizer), {}, 0, [EOS])
    write_rollouts(tmp_path / "r.jsonl", rows, metadata)
    paths = str(tmp_path / "lenvm"), str(tmp_path / "r.jsonl")
    args = TokenArguments(*paths, min_count=3, output_dir=str(tmp_path / "o"), unit="token")
    found = main(args)
    assert json.loads((tmp_path / "o" / "length_tokens.json").read_text()) == json.loads(json.dumps(found))
    assert found["completions"] == 40 and found["occurrences"] == sum(len(row["completion_ids"]) for row in rows)
    assert (tmp_path / "o" / "length_tokens.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "o" / "length_tokens.csv").open(encoding="utf-8") as file:
        assert sum(int(row["count"]) for row in csv.DictReader(file)) == found["occurrences"]
    assert "40 completions of 20 prompts, 0 of them cut" in capsys.readouterr().out
    other = tiny_tokenizer(vocab_size=63)
    other.save_pretrained(tmp_path / "other")
    assert {weight.dtype for weight in args.load_reader().parameters()} == {torch.float32}
    args.value_dtype = "bfloat16"
    dtypes = {name: weight.dtype for name, weight in args.load_reader().named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "head" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "head" not in name} == {torch.bfloat16}
    args.tokenizer_name_or_path = str(tmp_path / "other")
    with pytest.raises(ValueError, match="the tokenizer"):
        main(args)


def test_settings_that_make_no_sense_are_refused():
    for settings in ({"min_count": 0}, {"top": 0}, {"contexts": -1}):
        with pytest.raises(ValueError, match="must"):
            TokenArguments("m", **settings)


@pytest.mark.slow
def test_a_pass_of_checking_is_found_to_lengthen_the_sandboxs_completions(tmp_path):
    """A model fitted to completions of the sandbox's teacher sees what the word costs that begins a needless pass."""
    tokenizer, rng = sandbox_tokenizer(), random.Random(0)
    problems = stream_problems(0, "train")
    rows = []
    for group in range(1500):
        problem = next(problems)
        prompt = tokenizer.convert_tokens_to_ids(problem.prompt.split())
        for _ in range(4):
            ids = tokenizer.convert_tokens_to_ids(draw_completion(rng, problem, Overthinking()))
            rows.append(record(ids, group, tuple(prompt)))
    metadata = RolloutMetadata("teacher", tokenizer_fingerprint(tokenizer), {}, 0, [tokenizer.eos_token_id])
    settings = LengthValueTrainingArguments(
        str(tmp_path / "lenvm"), max_steps=150, per_device_train_batch_size=64, learning_rate=3e-3, report_to="none",
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    policy = new_policy(PolicySettings(hidden_size=32, num_layers=1), tokenizer)
    pretrain(policy, Dataset.from_list(rows[:5600]), metadata, settings, tokenizer)
    write_rollouts(tmp_path / "r.jsonl", rows[5600:], metadata)
    found = main(TokenArguments(str(tmp_path / "lenvm"), str(tmp_path / "r.jsonl"), output_dir=str(tmp_path / "o")))
    first = found["longer"][0]
    assert first["token"] == "redo" and first["shift"]["low"] > 0
