"""ShareGPT rollouts: what is in the file is kept, what is not is assumed aloud, what cannot be used is set aside."""

import json
import os

import pytest
from tiny import EOS, tiny_tokenizer

from lenvm_rl.rollouts.record import read_rollouts, rejected_path, write_rollouts
from lenvm_rl.rollouts.text import import_completions


def conversation(question, answer, length, index=0, **meta):
    meta = {"answer_token_length": length, "lenvm_idx": index, "model_name": "m", **meta}
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "meta_info": meta, "source_fields": {"level": index}}


# The server counted the end of sequence, or, for the last one, stopped at four tokens.
CONVERSATIONS = [
    conversation("w6 w7", "w8 w9", 3),
    conversation("w6 w7", "w8", 2),
    conversation("w10", "", 1, index=1),
    conversation("w10", "w8 w9 w10 w11", 4, index=1),
]


def write(path, items):
    text = json.dumps(items) if path.suffix == ".json" else "".join(json.dumps(item) + "\n" for item in items)
    path.write_text(text, encoding="utf-8")
    return path


def read(path, **arguments):
    return import_completions(path, "sharegpt", tiny_tokenizer(chat=True), **{"assume": "all_finished", **arguments})


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_the_prompt_is_what_the_template_makes_and_the_end_is_put_after_the_text(tmp_path, name):
    dataset, metadata = read(write(tmp_path / name, CONVERSATIONS))
    assert dataset["prompt"][0] == [{"role": "user", "content": "w6 w7"}]
    assert dataset["prompt_ids"][:] == [[3, 6, 7, 4]] * 2 + [[3, 10, 4]] * 2
    assert dataset["completion_ids"][:] == [[8, 9, EOS], [8, EOS], [EOS], [8, 9, 10, 11, EOS]]
    assert dataset["group"][:] == [0, 0, 1, 1]
    assert dataset["finish_reason"][:] == ["stop"] * 4
    # The last one was cut: assumed to have finished, it has a token more than was sampled.
    assert dataset["length_error"][:] == [0, 0, 0, 1]
    assert dataset["completion_text"][:] == ["w8 w9", "w8", "", "w8 w9 w10 w11"]
    assert [json.loads(fields) for fields in dataset["source_fields"][:]] == [{"level": i} for i in (0, 0, 1, 1)]
    assert metadata.generator == "m" and metadata.truncated_share == 0.0 and metadata.eos_token_ids == [EOS]
    assert metadata.sampling["finish_reason"] == {
        "assumed": "all_finished", "max_tokens": None, "in_file": 0, "assumed_finished": 4, "assumed_cut": 0,
        "cut_here": 0,
    }  # fmt: skip
    assert metadata.sampling["prompts"] == {"chat_template": 4, "text": 0, "decoded_text": 0, "file": 0}
    report = {"completions": 4, "unchecked": 0, "wrong_length": 1, "mean_length_error": 0.25, "changed_text": 0}
    assert metadata.sampling["token_ids"] == "retokenized" and metadata.sampling["retokenization"] == report


@pytest.mark.parametrize("given", [True, False])
def test_completions_at_the_limit_can_be_assumed_cut(tmp_path, given):
    meta = {} if given else {"max_tokens": 4}
    items = [{**item, "meta_info": {**item["meta_info"], **meta}} for item in CONVERSATIONS]
    path = write(tmp_path / "a.jsonl", items)
    dataset, metadata = read(path, assume="cut_at_max_tokens", max_tokens=4 if given else None)
    assert dataset["finish_reason"][:] == ["stop"] * 3 + ["length"]
    assert dataset["completion_ids"][3] == [8, 9, 10, 11]
    assert dataset["length_error"][:] == [0] * 4
    assert metadata.truncated_share == 0.25
    ends = metadata.sampling["finish_reason"]
    assert (ends["assumed"], ends["assumed_finished"], ends["assumed_cut"]) == ("cut_at_max_tokens", 3, 1)
    assert metadata.sampling.get("max_tokens") == (None if given else 4)


def test_what_was_read_becomes_a_rollout_file(tmp_path):
    dataset, metadata = read(write(tmp_path / "a.json", CONVERSATIONS))
    written = write_rollouts(tmp_path / "r.parquet", dataset, metadata)
    again, read_back = read_rollouts(tmp_path / "r.parquet")
    assert again.to_list() == dataset.to_list() and read_back == written
    assert read_back.num_prompts == 2 and read_back.num_completions == 4


def test_tokens_that_are_not_the_sampled_ones_are_counted(tmp_path):
    # Seven tokens were sampled for a text of two: special tokens, or another spelling.
    _, metadata = read(write(tmp_path / "a.json", [conversation("w6", "w7 w8", 8), conversation("w6", "w7", None)]))
    report = {"completions": 2, "unchecked": 1, "wrong_length": 1, "mean_length_error": -5.0, "changed_text": 0}
    assert metadata.sampling["retokenization"] == report
    _, metadata = read(write(tmp_path / "b.json", [conversation("w6", "w7  w8", 3)]))
    assert metadata.sampling["retokenization"]["changed_text"] == 1


def test_one_number_for_two_prompts_is_two_groups_and_one_prompt_is_one(tmp_path):
    items = [conversation("w6", "w7", 2, index=0), conversation("w8", "w7", 2, index=0)]
    items.append(conversation("w6", "w9", 2, index=5))
    dataset, _ = read(write(tmp_path / "a.json", items))
    assert dataset["group"][:] == [0, 1, 0] and dataset["lenvm_idx"][:] == [0, 0, 5]


BAD = {
    "no list `conversations`": {"conversations": "w6", "meta_info": {}},
    "no `meta_info` with an `answer_token_length`": {**CONVERSATIONS[0], "meta_info": {"lenvm_idx": 1}},
    "`answer_token_length` is not a number of tokens": conversation("w6", "w7", "2"),
    "it has images": {**CONVERSATIONS[0], "images": ["a.png"]},
    "no prompt before the completion": {**CONVERSATIONS[0], "conversations": [{"from": "gpt", "value": "w6"}]},
    "a turn is not one of system, human, gpt": {
        **CONVERSATIONS[0],
        "conversations": [{"from": "observation", "value": "w6"}, {"from": "gpt", "value": "w7"}],
    },
    "the last turn is not the completion": {
        **CONVERSATIONS[0],
        "conversations": [{"from": "gpt", "value": "w6"}, {"from": "human", "value": "w7"}],
    },
    "completion_ids holds an end-of-sequence token before its end": conversation("w6", "w7 <eos> w8", 4),
}


def test_what_cannot_be_used_is_set_aside_with_its_line_and_reason(tmp_path):
    path = write(tmp_path / "a.jsonl", [CONVERSATIONS[0], *BAD.values()])
    path.write_bytes(path.read_bytes() + b'{"conversations": [')
    dataset, metadata = read(path)
    assert len(dataset) == 1 and metadata.sampling["set_aside"] == len(BAD) + 1
    rejected = [json.loads(line) for line in rejected_path(path).read_text().splitlines()]
    assert [entry["line"] for entry in rejected] == list(range(2, len(BAD) + 3))
    for entry, (reason, source) in zip(rejected, BAD.items(), strict=False):
        assert entry["reason"].startswith(reason) and entry["record"] == source
    assert rejected[-1]["reason"] == "half-written last line"


@pytest.mark.parametrize(
    ("items", "arguments", "problem"),
    [
        (CONVERSATIONS, {"assume": "stop"}, "assume"),
        (CONVERSATIONS, {"assume": None}, "assume"),
        (CONVERSATIONS, {"assume": "cut_at_max_tokens"}, "max_tokens"),
        (list(BAD.values()), {}, "no usable completion"),
        ([], {}, "no usable completion"),
        ({"a": 1}, {}, "must hold a list of objects, but holds a dict"),
        ([conversation("w6", "w7", 2), conversation("w6", "w7", 2, model_name="n")], {}, "generator"),
        ([conversation("w6", "w7", 2, model_name=None)], {}, "generator"),
    ],
)
def test_what_is_not_known_has_to_be_said(tmp_path, items, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        read(write(tmp_path / "a.json", items), **arguments)


def test_a_file_or_a_tokenizer_that_will_not_do_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.json"):
        read(tmp_path / "a.json")
    with pytest.raises(ValueError, match="a.txt"):
        read(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="chat template"):
        import_completions(
            write(tmp_path / "a.json", CONVERSATIONS), "sharegpt", tiny_tokenizer(), assume="all_finished"
        )
    assert os.listdir(tmp_path) == ["a.json"]
