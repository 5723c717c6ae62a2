"""Rollout files: what goes in comes out, bad records are named and set aside, and a file is whole or not there."""

import json
import logging
import os

import pytest
from datasets import Dataset

from lenvm_rl.rollouts.record import (
    RolloutMetadata,
    find_problem,
    metadata_path,
    read_rollout_files,
    read_rollouts,
    rejected_path,
    split_by_prompt,
    warn_of_cuts,
    write_rollouts,
)


def make_record(group=0, completion=(7, 8, 1), reason="stop", **extra):
    return {
        "prompt": f"question {group}",
        "prompt_ids": [5, 6],
        "completion_ids": list(completion),
        "finish_reason": reason,
        "group": group,
        **extra,
    }


def make_metadata(**changes):
    fields = {
        "generator": "a policy",
        "tokenizer_fingerprint": {"vocab_size": 10, "eos_token_id": 1, "pad_token_id": 0, "sha256": "x"},
        "sampling": {"temperature": 1.0},
        "seed": 3,
        "eos_token_ids": [1],
    }
    return RolloutMetadata(**{**fields, **changes})


RECORDS = [
    make_record(0, answer="a\u2028b\u0085\n", difficulty=1),
    make_record(0, completion=(9, 9, 9, 9), reason="length", answer="é", difficulty=1),
    make_record(1, completion=(1,), answer=None, difficulty=2),
]


@pytest.mark.parametrize("name", ["rollouts.jsonl", "rollouts.parquet"])
def test_round_trip(tmp_path, name):
    written = write_rollouts(tmp_path / name, RECORDS, make_metadata())
    dataset, metadata = read_rollouts(tmp_path / name)
    assert dataset.to_list() == RECORDS
    assert metadata == written
    assert (metadata.num_prompts, metadata.num_completions, metadata.truncated_share) == (2, 3, 1 / 3)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "rollouts.metadata.json"])


def test_messages_and_late_columns_survive(tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    records = [make_record(0), make_record(1, correct=True)]
    for record in records:
        record["prompt"] = messages
    write_rollouts(tmp_path / "r.jsonl", records, make_metadata())
    dataset, _ = read_rollouts(tmp_path / "r.jsonl")
    assert dataset[0]["prompt"] == messages
    assert dataset["correct"][:] == [None, True]
    write_rollouts(tmp_path / "again.parquet", dataset, make_metadata())
    assert read_rollouts(tmp_path / "again.parquet")[0].to_list() == dataset.to_list()


def test_a_raw_line_separator_inside_a_string_is_no_line_end(tmp_path):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, RECORDS[:1], make_metadata())
    path.write_text(json.dumps(RECORDS[0], ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    assert "\u2028" in path.read_text(encoding="utf-8")
    assert read_rollouts(path)[0].to_list() == RECORDS[:1]


BAD = [
    ({"finish_reason": None}, "missing finish_reason"),
    ({"completion_ids": []}, "completion_ids is empty"),
    ({"prompt_ids": []}, "prompt_ids is empty"),
    ({"completion_ids": [7, 10]}, "token 10, outside the vocabulary of 10"),
    ({"completion_ids": [-1, 1]}, "token -1, outside"),
    ({"completion_ids": [7, "8", 1]}, "completion_ids must be a list of integers"),
    ({"finish_reason": "eos"}, "finish_reason must be one of stop, length"),
    ({"group": "3"}, "group must be an integer"),
    ({"prompt": 5}, "prompt must be text"),
    ({"completion_ids": [7, 8]}, "finish_reason is 'stop' but the last token is 8"),
    ({"finish_reason": "length"}, "finish_reason is 'length' but the last token is 1"),
    ({"completion_ids": [1, 7, 1]}, "end-of-sequence token before its end"),
]


@pytest.mark.parametrize(("change", "problem"), BAD, ids=[problem for _, problem in BAD])
def test_a_bad_record_is_named_by_file_and_line_and_set_aside(tmp_path, caplog, change, problem):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, RECORDS, make_metadata())
    bad = {**make_record(5), **change}
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps(bad), *lines[1:]]) + "\n")
    with caplog.at_level(logging.WARNING):
        dataset, metadata = read_rollouts(path)
    assert f"{path}, line 2: " in caplog.text
    assert problem in caplog.text
    assert "1 of 4 records set aside in r.rejected.jsonl" in caplog.text
    assert dataset.to_list() == RECORDS
    assert metadata.num_completions == 3
    entry = json.loads(rejected_path(path).read_text())
    assert (entry["file"], entry["line"], entry["record"]) == ("r.jsonl", 2, bad)
    assert len(path.read_text().splitlines()) == 4


def test_a_half_written_last_line_is_set_aside(tmp_path, caplog):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, RECORDS, make_metadata())
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        dataset, _ = read_rollouts(path)
    assert f"{path}, line 3: half-written last line" in caplog.text
    assert dataset.to_list() == [{**record} for record in RECORDS[:2]]


def test_a_line_lost_without_a_trace_is_noticed(tmp_path, caplog):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, RECORDS, make_metadata())
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    with caplog.at_level(logging.WARNING):
        read_rollouts(path)
    assert "has 2 records, but its metadata says 3" in caplog.text


def test_bad_rows_of_parquet_are_named_by_number(tmp_path, caplog):
    path = tmp_path / "r.parquet"
    write_rollouts(path, RECORDS, make_metadata())
    metadata_path(path).write_text(json.dumps({**make_metadata().__dict__, "eos_token_ids": [1, 9]}))
    with caplog.at_level(logging.WARNING):
        assert len(read_rollouts(path)[0]) == 2
    assert "line 2: completion_ids holds an end-of-sequence token before its end" in caplog.text


def test_prompts_of_two_kinds_do_not_mix(tmp_path, caplog):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, RECORDS, make_metadata())
    other = make_record(7)
    other["prompt"] = [{"role": "user", "content": "hi"}]
    path.write_text(path.read_text() + json.dumps(other) + "\n")
    with caplog.at_level(logging.WARNING):
        assert len(read_rollouts(path)[0]) == 3
    assert "line 4: prompt must be text, got list" in caplog.text


@pytest.mark.parametrize("content", ["", "not json\n", "[1]\n"])
def test_a_file_without_a_valid_record_is_an_error(tmp_path, content):
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="holds no valid rollout"):
        read_rollouts(path, make_metadata())


def test_missing_files_say_what_to_do(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(FileNotFoundError, match="sample_rollouts"):
        read_rollouts(path)
    path.write_text(json.dumps(make_record()) + "\n")
    with pytest.raises(FileNotFoundError, match="r.metadata.json"):
        read_rollouts(path)
    assert len(read_rollouts(path, make_metadata())[0]) == 1
    with pytest.raises(ValueError, match=".jsonl or .parquet"):
        read_rollouts(tmp_path / "r.txt")


def test_metadata_is_checked(tmp_path):
    path = tmp_path / "m.metadata.json"
    make_metadata().save(path)
    assert RolloutMetadata.load(path) == make_metadata()
    path.write_text(json.dumps({"generator": "g", "seed": 1}))
    with pytest.raises(ValueError, match="sampling.*tokenizer_fingerprint"):
        RolloutMetadata.load(path)
    path.write_text(json.dumps({**make_metadata().__dict__, "sede": 1}))
    with pytest.raises(ValueError, match="only the fields"):
        RolloutMetadata.load(path)


def test_the_writer_refuses_bad_records_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, RECORDS, make_metadata())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Record 2 .*completion_ids"):
        write_rollouts(path, [RECORDS[0], make_record(completion=())], make_metadata())
    with pytest.raises(ValueError, match="no record to write"):
        write_rollouts(path, [], make_metadata())
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["r.jsonl", "r.metadata.json"]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, RECORDS, make_metadata())
    before = path.read_bytes(), metadata_path(path).read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_rollouts(path, RECORDS[:1], make_metadata())
    assert (path.read_bytes(), metadata_path(path).read_bytes()) == before
    assert sorted(os.listdir(tmp_path)) == ["r.jsonl", "r.metadata.json"]


def test_a_column_that_changes_its_type_is_named(tmp_path):
    with pytest.raises(ValueError, match="'answer'"):
        write_rollouts(
            tmp_path / "r.parquet", [make_record(0, answer="x"), make_record(1, answer=[1])], make_metadata()
        )


def test_find_problem_without_a_vocabulary_still_bounds_ids():
    assert find_problem(make_record()) is None
    assert "outside the vocabulary" in find_problem(make_record(completion=(2**31,)))


@pytest.mark.parametrize("cut, warned", [(0, 0), (20, 0), (21, 1), (100, 1)])
def test_many_cut_completions_are_told(cut, warned, caplog):
    warn_of_cuts(["length"] * cut + ["stop"] * (100 - cut))
    assert [f"{cut} of 100" in record.message for record in caplog.records] == [True] * warned


def test_a_split_keeps_the_completions_of_a_prompt_together():
    dataset = Dataset.from_list([make_record(group, prompt_ids=[group]) for group in range(10) for _ in range(3)])
    train, held_out = split_by_prompt(dataset, 0.3, seed=1)
    assert (len(train), len(held_out)) == (21, 9)
    assert not set(train["group"]) & set(held_out["group"])
    assert held_out["group"][:] == split_by_prompt(dataset, 0.3, seed=1)[1]["group"][:]
    assert set(held_out["group"]) != set(split_by_prompt(dataset, 0.3, seed=2)[1]["group"])
    with pytest.raises(ValueError, match="Cannot hold out"):
        split_by_prompt(dataset.select(range(3)), 0.5)


def test_a_prompt_that_stands_twice_in_the_data_is_on_one_side():
    """Groups 0 to 9 are rows of the data, whose last five say the same as the first."""
    dataset = Dataset.from_list([make_record(group, prompt_ids=[group % 5]) for group in range(10)])
    for seed in range(4):
        train, held_out = split_by_prompt(dataset, 0.4, seed=seed)
        assert (len(train), len(held_out)) == (6, 4)
        assert not {ids[0] for ids in train["prompt_ids"]} & {ids[0] for ids in held_out["prompt_ids"]}


def test_files_of_one_policy_are_read_as_one(tmp_path):
    """Prompts A, A, B of the first file and B, C of the second: groups 0, 0, 1, 1, 2, so that B is held out whole."""
    records = [make_record(group) for group in (0, 0, 4)] + [make_record(group, answer="7") for group in (0, 1)]
    for record, prompt_ids in zip(records, ([5], [5], [6], [6], [5, 6]), strict=True):
        record["prompt_ids"] = prompt_ids
    settings = {"temperature": 1.0, "top_k": 5}
    write_rollouts(tmp_path / "a.jsonl", records[:3], make_metadata(sampling=settings))
    write_rollouts(tmp_path / "b.jsonl", records[3:], make_metadata(sampling={**settings, "temperature": 0.5}))
    rollouts, joined = read_rollout_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert rollouts["group"][:] == [0, 0, 1, 1, 2] and rollouts["answer"][:] == [None] * 3 + ["7"] * 2
    assert rollouts["completion_ids"][:] == [record["completion_ids"] for record in records]
    assert joined.sampling == {"top_k": 5} and joined.num_prompts == 3 and joined.num_completions == 5
    alone, one = read_rollout_files([tmp_path / "a.jsonl"])
    assert alone["group"][:] == [0, 0, 4] and one.sampling == settings
    write_rollouts(tmp_path / "c.jsonl", records[3:], make_metadata(generator="another"))
    with pytest.raises(ValueError, match="generator"):
        read_rollout_files([tmp_path / "a.jsonl", tmp_path / "c.jsonl"])
