"""Text and verl's files: every row becomes a rollout, what is assumed is counted, what will not do is refused."""

import json

import pyarrow.parquet as pq
import pytest
from tiny import EOS, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from lenvm_rl.rollouts.record import build_table, read_rollouts, write_rollouts
from lenvm_rl.rollouts.text import import_completions

USER = [{"role": "user", "content": "w6 w7"}]
# What the word-level tokenizer's template makes of it.
USER_IDS = [3, 6, 7, 4]


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(build_table(rows), path)
    elif path.suffix == ".csv":
        cells = [list(rows[0]), *([row[name] for name in rows[0]] for row in rows)]
        path.write_text("".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in cells))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    return path


def read(path, source_format="text", **settings):
    settings = {"assume": "all_finished", "generator": "m", **settings}
    return import_completions(path, source_format, tiny_tokenizer(chat=True), **settings)


def rejected(path):
    return [json.loads(line) for line in path.with_suffix(".rejected.jsonl").read_text().splitlines()]


def ends(metadata):
    found = metadata.sampling["finish_reason"]
    return [found[name] for name in ("in_file", "assumed_finished", "assumed_cut", "cut_here")]


def prompts(metadata):
    return {name: count for name, count in metadata.sampling["prompts"].items() if count}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_rows_of_text_become_rollouts(tmp_path, suffix):
    rows = [
        {"prompt": "w6 w7", "completion": "w8 w9", "level": "03"},
        {"prompt": "w6 w7", "completion": "w10\nw11", "level": "1"},
        {"prompt": "w12", "completion": "w8, and", "level": ""},
    ]
    dataset, metadata = read(write(tmp_path / f"a.{suffix}", rows))
    assert dataset["prompt"][:] == ["w6 w7", "w6 w7", "w12"] and dataset["group"][:] == [0, 0, 1]
    # Text is what the policy was asked, as it is.
    assert dataset["prompt_ids"][:] == [[6, 7], [6, 7], [12]] and prompts(metadata) == {"text": 3}
    assert dataset["completion_ids"][:] == [[8, 9, EOS], [10, 11, EOS], [2, 2, EOS]]
    assert dataset["finish_reason"][:] == ["stop"] * 3 and ends(metadata) == [0, 3, 0, 0]
    assert [json.loads(rest)["level"] for rest in dataset["source_fields"][:]] == ["03", "1", ""]
    # A line break and two unknown words do not come back.
    report = {"completions": 3, "unchecked": 3, "wrong_length": 0, "mean_length_error": None, "changed_text": 2}
    assert metadata.sampling["retokenization"] == report and metadata.sampling["token_ids"] == "retokenized"
    assert metadata.generator == "m" and metadata.sampling["backend"] == "text"
    written = write_rollouts(tmp_path / "r.parquet", dataset, metadata)
    assert read_rollouts(tmp_path / "r.parquet")[1] == written


@pytest.mark.parametrize("messages", [True, False])
def test_messages_and_questions_go_through_the_chat_template(tmp_path, messages):
    row = {"prompt": USER if messages else "w6 w7", "response": [{"role": "assistant", "content": "w8"}]}
    path = write(tmp_path / "a.parquet", [row])
    dataset, metadata = read(path, completion_column="response", chat=not messages)
    assert dataset["prompt"][0] == USER and dataset["prompt_ids"][0] == USER_IDS
    assert dataset["completion_ids"][0] == [8, EOS] and prompts(metadata) == {"chat_template": 1}


def test_how_a_completion_ended_is_taken_from_the_file_where_it_is_there(tmp_path, caplog):
    rows = [
        {"prompt": "w6", "completion": "w7 w8", "finish_reason": "stop"},
        {"prompt": "w6", "completion": "w7 w8 w9", "finish_reason": "length"},
        {"prompt": "w6", "completion": "w7 w8 <eos>", "finish_reason": None},
        {"prompt": "w6", "completion": "w7 w8", "finish_reason": None},
        {"prompt": "w6", "completion": "w7 w8 w9"},
        {"prompt": "w6", "completion": "w7 w8 w9 w10"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    dataset, metadata = read(path, assume="cut_at_max_tokens", max_tokens=3)
    # Two tokens and the end are three, so the fourth finished; three and no end were cut.
    assert dataset["finish_reason"][:] == ["stop", "length", "stop", "stop", "length", "length"]
    assert dataset["completion_ids"][:] == [
        [7, 8, EOS], [7, 8, 9], [7, 8, EOS], [7, 8, EOS], [7, 8, 9], [7, 8, 9, 10]
    ]  # fmt: skip
    assert ends(metadata) == [3, 1, 2, 0]
    assert dataset["completion_text"][2] == "w7 w8 <eos>"
    # One report, with the counts.
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "assumed of its 6 completions" in warnings[0]
    assert "3 as the file says; assumed (cut at max tokens): 1 finished, 2 cut" in warnings[0]
    assert "token ids of 6 completions were made from their text" in warnings[0]
    assert "prompts of 6 completions are from text as it is" in warnings[0]
    with pytest.raises(ValueError, match="assume"):
        read(path, assume=None)
    # What the file says is enough.
    read(write(tmp_path / "b.jsonl", rows[:3]), assume=None)


def test_longer_completions_are_cut_where_nothing_says_that_they_were(tmp_path):
    rows = [{"prompt": "w6", "completion": "w7 w8 w9"}, {"prompt": "w6", "completion": "w7 w8"}]
    dataset, metadata = read(write(tmp_path / "a.jsonl", rows), max_tokens=3)
    assert dataset["completion_ids"][:] == [[7, 8, 9], [7, 8, EOS]]
    assert dataset["finish_reason"][:] == ["length", "stop"] and dataset["tokens_left_out"][:] == [1, 0]
    assert ends(metadata) == [0, 2, 0, 1]


def test_sampled_ids_are_used_as_they_are(tmp_path):
    rows = [
        {"prompt": USER, "prompt_ids": [9, 6, 7], "completion_ids": [8, 8, EOS]},
        {"prompt": USER, "prompt_ids": [9, 6, 7], "completion_ids": [8, 8]},
        {"prompt": USER, "completion_ids": [8], "finish_reason": "stop"},
    ]
    path = write(tmp_path / "a.parquet", rows)
    dataset, metadata = read(path, assume=None)
    assert dataset["prompt_ids"][:] == [[9, 6, 7]] * 2 and dataset["completion_ids"][:] == [[8, 8, EOS], [8, 8]]
    assert dataset["finish_reason"][:] == ["stop", "length"] and ends(metadata) == [2, 0, 0, 0]
    assert metadata.sampling["token_ids"] == "sampled" and metadata.sampling["retokenization"]["completions"] == 0
    assert prompts(metadata) == {"file": 2} and "completion_text" not in dataset.column_names
    # It says that it ended, and does not.
    [entry] = rejected(path)
    assert entry["line"] == 3 and "finish_reason" in entry["reason"]


def test_rows_that_cannot_be_used_are_set_aside(tmp_path):
    good = {"prompt": "w6", "completion": "w7"}
    bad = {
        "not an object": "w6",
        "`finish_reason` is 'abort'": {**good, "finish_reason": "abort"},
        "`completion` is neither": {**good, "completion": 3},
        "`completion` is neither a": {**good, "completion": [{"role": "user", "content": "w7"}]},
        "the prompt is missing": {**good, "prompt": None},
        "the prompt has no tokens": {**good, "prompt": ""},
        "the prompt is a list without": {**good, "prompt": []},
        "prompt must be text": {**good, "prompt": USER},
        "completion_ids must be": {**good, "completion_ids": "w7"},
        "prompt_ids holds token 99": {**good, "prompt_ids": [99]},
    }
    path = write(tmp_path / "a.jsonl", [good, *bad.values()])
    dataset, metadata = read(path, rejected_beside=tmp_path / "out.jsonl")
    entries = rejected(tmp_path / "out.jsonl")
    assert len(dataset) == 1 and metadata.sampling["set_aside"] == len(entries) == len(bad)
    assert [entry["line"] for entry in entries] == list(range(2, len(bad) + 2))
    for entry, (reason, row) in zip(entries, bad.items(), strict=True):
        assert entry["reason"].startswith(reason) and entry["record"] == row


def dump(question, answer, score=1.0):
    # As decoded without special tokens: what the template puts around is gone.
    return {"input": question, "output": answer, "gts": "4", "score": score, "step": 10}


def test_verls_dump_is_tokenised_as_it_is(tmp_path):
    dataset, metadata = read(write(tmp_path / "10.jsonl", [dump("w6 w7", "w8"), dump("w6 w7", "w9", 0.0)]), "verl")
    assert dataset["prompt"][:] == ["w6 w7"] * 2 and dataset["prompt_ids"][:] == [[6, 7]] * 2
    assert dataset["completion_ids"][:] == [[8, EOS], [9, EOS]] and dataset["group"][:] == [0, 0]
    assert json.loads(dataset["source_fields"][1]) == {"gts": "4", "score": 0.0, "step": 10}
    assert prompts(metadata) == {"decoded_text": 2} and ends(metadata) == [0, 2, 0, 0]


def test_nothing_is_put_before_a_prompt_that_the_template_was_applied_to(tmp_path):
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_special_tokens({"bos_token": "w63"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w63 $A", special_tokens=[("w63", 63)])
    path = write(tmp_path / "10.jsonl", [dump("w63 <|user|> w6", "w8")])
    settings = {"assume": "all_finished", "generator": "m"}
    dataset, _ = import_completions(path, "verl", tokenizer, **settings)
    assert dataset["prompt_ids"][0] == [63, 3, 6] and dataset["completion_ids"][0] == [8, EOS]
    # Plain text is read as the tokenizer reads it.
    path = write(tmp_path / "a.jsonl", [{"prompt": "w6", "completion": "w8"}])
    assert import_completions(path, "text", tokenizer, **settings)[0]["prompt_ids"][0] == [63, 6]


def test_verls_data_gives_the_dumps_prompts_back(tmp_path):
    data = [{"data_source": "d", "prompt": USER, "reward_model": {"style": "rule", "ground_truth": "4"}}]
    data_path = write(tmp_path / "train.parquet", data)
    path = write(tmp_path / "10.jsonl", [dump("w6 w7", "w8"), dump("w9", "w8"), {**dump("w6 w7", "w8"), "output": 1}])
    dataset, metadata = read(path, "verl", prompts=str(data_path))
    assert dataset["prompt"][:] == [USER] and dataset["prompt_ids"][:] == [USER_IDS]
    assert prompts(metadata) == {"chat_template": 1}
    assert [entry["reason"] for entry in rejected(path)] == [
        f"`input` is none of the prompts of {data_path}, put into the tokenizer's chat template",
        "no text `output`",
    ]


def test_verls_generation_has_several_responses_a_row(tmp_path):
    data = {"data_source": "d", "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"index": 0}}
    other = [{"role": "system", "content": "w9"}, *USER]
    rows = [{**data, "prompt": USER, "responses": ["w8", None]}, {**data, "prompt": other, "responses": ["", "w8 w9"]}]
    path = write(tmp_path / "a.parquet", [*rows, {**data, "prompt": USER, "responses": []}])
    dataset, metadata = read(path, "verl", assume="cut_at_max_tokens", max_tokens=2)
    assert dataset["prompt_ids"][:] == [USER_IDS, [5, 9, *USER_IDS], [5, 9, *USER_IDS]]
    assert dataset["group"][:] == [0, 1, 1] and dataset["sample"][:] == [0, 0, 1]
    assert dataset["completion_ids"][:] == [[8, EOS], [EOS], [8, 9]] and ends(metadata) == [0, 2, 1, 0]
    assert dataset["finish_reason"][:] == ["stop", "stop", "length"]
    assert json.loads(dataset["source_fields"][0]) == data and prompts(metadata) == {"chat_template": 3}
    assert [entry["reason"] for entry in rejected(path)] == [
        "response 1 (the first is 0) is not a text", "no list `responses`",
    ]  # fmt: skip


TEXT_ROW = {"prompt": "w6", "completion": "w7"}


@pytest.mark.parametrize(
    ("name", "rows", "settings", "problem"),
    [
        ("a.jsonl", [TEXT_ROW], {"source_format": "csv"}, "source_format"),
        ("a.jsonl", [TEXT_ROW], {"prompt_column": "question"}, "question; it has prompt, completion"),
        ("a.csv", [TEXT_ROW], {"completion_column": "response"}, "response"),
        ("a.jsonl", [TEXT_ROW], {"generator": None}, "generator"),
        ("a.jsonl", [{"prompt": USER, "completion": "w7"}], {"chat": True}, "chat"),
        ("a.jsonl", [TEXT_ROW], {"assume": "cut_at_max_tokens"}, "max_tokens"),
        ("a.jsonl", [{"prompt": 3, "completion": "w7"}], {}, "no usable completion"),
        ("a.jsonl", [TEXT_ROW], {"source_format": "verl"}, "input, output"),
        ("a.csv", [TEXT_ROW], {"source_format": "verl"}, ".jsonl"),
        # verl's data, which has no completions.
        ("a.parquet", [{"prompt": USER, "data_source": "d"}], {"source_format": "verl"}, "responses"),
        ("a.parquet", [{"prompt": USER, "responses": ["w7"]}], {"source_format": "verl", "prompts": "b"}, "prompts"),
        ("a.jsonl", [dump("w6", "w7")], {"source_format": "verl", "prompts": "b.jsonl"}, "b.jsonl"),
    ],
)
def test_what_is_not_known_or_not_there_is_refused(tmp_path, name, rows, settings, problem):
    with pytest.raises(ValueError, match=problem):
        read(write(tmp_path / name, rows), **settings)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\n"w6","w7","w8"\n')
    (tmp_path / "a.parquet").write_text("w6")
    (tmp_path / "a.json").write_text("{")
    for name in ("a.csv", "a.parquet", "a.json"):
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="b.csv"):
        read(tmp_path / "b.csv")
    with pytest.raises(FileNotFoundError, match="b.parquet"):
        read(tmp_path / "b.parquet", "verl")
    messages = write(tmp_path / "c.jsonl", [{"prompt": USER, "completion": "w7"}])
    with pytest.raises(ValueError, match="chat template"):
        import_completions(messages, "text", tiny_tokenizer(), assume="all_finished", generator="m")
