"""Published answers: thinking and answer become one completion, what is not in the file is assumed aloud."""

import json
import logging

import pytest
from places import DATA
from tiny import EOS, tiny_tokenizer

from lenvm_rl.rollouts.formats import completion_text
from lenvm_rl.rollouts.record import read_rollouts, rejected_path, write_rollouts
from lenvm_rl.rollouts.text import import_completions
from recipes import import_rollouts

TRACES = DATA / "misguided_attention"
UNK = 2  # what the word-level tokenizer makes of a tag


def answers(prompt, output, thinking=None, model="m"):
    """One object of a file."""
    return {"prompt_id": f"id of {prompt}", "prompt": prompt, "llm": model, "output": output, "thinking": thinking}


RESULTS = [
    answers("w6 w7", ["w8", "", " w9"], ["w10 w11", "w12 w13 w14", None]),
    answers("w10", ["w8 w9"]),
    answers("w6 w7", ["w15"], [""]),
]


def write(path, results):
    path.write_text(json.dumps({"results": results}), encoding="utf-8")
    return path


def read(path, chat_template=None, **settings):
    tokenizer = tiny_tokenizer(chat=True)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return import_completions(path, "traces", tokenizer, **settings)


def test_thinking_and_answer_become_one_completion(tmp_path, caplog):
    dataset, metadata = read(write(tmp_path / "a.json", RESULTS))
    assert dataset["prompt"][0] == [{"role": "user", "content": "w6 w7"}]
    assert dataset["prompt_ids"][:] == [[3, 6, 7, 4]] * 3 + [[3, 10, 4], [3, 6, 7, 4]]
    assert dataset["group"][:] == [0, 0, 0, 1, 0] and dataset["sample"][:] == [0, 1, 2, 0, 0]
    assert dataset["completion_text"][:] == [
        "<think>\nw10 w11\n</think>\n\nw8", "<think>\nw12 w13 w14", " w9", "w8 w9", "w15",
    ]  # fmt: skip
    assert dataset["completion_ids"][:] == [
        [UNK, 10, 11, UNK, 8, EOS], [UNK, 12, 13, 14], [9, EOS], [8, 9, EOS], [15, EOS],
    ]  # fmt: skip
    # The second one never answered.
    assert dataset["finish_reason"][:] == ["stop", "length", "stop", "stop", "stop"]
    assert dataset["model"][:] == ["m"] * 5 and dataset["prompt_id"][3] == "id of w10"
    assert dataset["tokens_left_out"][:] == [0] * 5
    assert metadata.generator == "m" and metadata.truncated_share == 0.2 and metadata.eos_token_ids == [EOS]
    assert metadata.sampling["finish_reason"] == {
        "assumed": "finished_if_answered", "max_tokens": None, "in_file": 0, "assumed_finished": 4, "assumed_cut": 1,
        "cut_here": 0,
    }  # fmt: skip
    assert metadata.sampling["token_ids"] == "retokenized" and metadata.sampling["set_aside"] == 0
    # The tags are unknown to this tokenizer, so two texts come back changed; a leading blank is lost, too.
    report = metadata.sampling["retokenization"]
    assert report["completions"] == 5 and report["unchecked"] == 5 and report["changed_text"] == 3
    assert "assumed (finished if answered): 4 finished, 1 cut" in caplog.text
    assert "token ids of 5 completions were made from their text" in caplog.text


def test_completions_above_the_limit_are_marked_as_cut_and_counted(tmp_path, caplog):
    dataset, metadata = read(write(tmp_path / "a.json", RESULTS), max_tokens=3)
    assert dataset["completion_ids"][:] == [[UNK, 10, 11], [UNK, 12, 13], [9, EOS], [8, 9, EOS], [15, EOS]]
    assert dataset["finish_reason"][:] == ["length", "length", "stop", "stop", "stop"]
    assert dataset["tokens_left_out"][:] == [3, 1, 0, 0, 0]
    # Nothing of the text is lost.
    assert dataset["completion_text"][0].endswith("</think>\n\nw8")
    assert metadata.sampling["finish_reason"]["cut_here"] == 2
    assert metadata.sampling["finish_reason"]["max_tokens"] == 3 and metadata.truncated_share == 0.4
    assert "2 completions have more than 3 tokens" in caplog.text


def test_a_completion_whose_end_alone_does_not_fit_is_cut(tmp_path):
    dataset, _ = read(write(tmp_path / "a.json", [answers("w6", ["w7 w8 w9"])]), max_tokens=3)
    assert dataset["completion_ids"][:] == [[7, 8, 9]] and dataset["finish_reason"][:] == ["length"]
    assert dataset["tokens_left_out"][:] == [1]


BAD = {
    "`output` is null": answers("w6", [None]),
    "there is no text": answers("w6", [" "]),
    "`output` or `thinking` is not a text": answers("w6", ["w7"], [3]),
    "no list `output`": answers("w6", None),
    "no text `prompt`": answers("", ["w7"]),
    "no text `llm`": answers("w6", ["w7"], model=None),
    "`thinking` is not a list with an entry for each `output`": answers("w6", ["w7", "w8"], ["w9"]),
    "completion_ids holds an end-of-sequence token before its end": answers("w6", ["w7 <eos> w8"]),
    "not an object but a str": "w6",
}


def test_what_cannot_be_used_is_set_aside_with_its_reason(tmp_path, caplog):
    path = write(tmp_path / "a.json", [answers("w6", ["w7", None, "w8"]), *BAD.values()])
    dataset, metadata = read(path, rejected_beside=tmp_path / "out.jsonl")
    assert dataset["completion_ids"][:] == [[7, EOS], [8, EOS]] and dataset["sample"][:] == [0, 2]
    entries = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [1, *range(2, len(BAD) + 2)]
    assert [entry["reason"] for entry in entries] == ["`output` is null", *BAD]
    assert entries[0]["record"]["sample"] == 1 and entries[0]["record"]["output"] is None
    assert metadata.sampling["set_aside"] == len(entries) == len(BAD) + 1
    assert f"{len(entries)} of {len(entries) + 2} records set aside" in caplog.text
    assert not rejected_path(path).exists()
    read(path)
    assert rejected_path(path).exists()


def test_one_model_of_several_has_to_be_chosen_and_the_others_are_named(tmp_path, caplog):
    path = write(tmp_path / "a.json", [answers("w6", ["w7"]), answers("w6", ["w8"], model="n")])
    with pytest.raises(ValueError, match="m, n: .*models"):
        read(path)
    dataset, metadata = read(path, models=["n"])
    assert dataset["completion_ids"][:] == [[8, EOS]] and metadata.generator == "n"
    assert "objects of other models are not read: {'m': 1}" in caplog.text
    both, metadata = read(path, models=["n", "m"])
    assert both["model"][:] == ["m", "n"] and metadata.generator == "m, n" and both["group"][:] == [0, 0]
    with pytest.raises(ValueError, match="'o'.*m, n in models"):
        read(path, models=["o", "m"])


def test_a_template_that_opens_the_thinking_is_not_opened_twice(tmp_path):
    template = "{{ messages[0]['content'] }} <|assistant|> <think>\n"
    path = write(tmp_path / "a.json", [answers("w6", ["w7", "w8"], ["w9", None])])
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    dataset, metadata = import_completions(path, "traces", tokenizer)
    opening, closing = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert dataset["prompt_ids"][:] == [[6, 4, opening]]
    assert dataset["completion_ids"][:] == [[9, closing, 7, EOS]]
    # One that did not think has no place behind an open tag.
    (entry,) = [json.loads(line) for line in rejected_path(path).read_text().splitlines()]
    assert "it did not think, but the chat template opens <think>" in entry["reason"]
    assert metadata.sampling["set_aside"] == 1


def test_the_text_of_thinking_and_answer():
    assert completion_text(None, " a\n") == " a\n"
    assert completion_text("\nb \n", "\n\na\n") == "<think>\nb\n</think>\n\na\n"
    assert completion_text("b", "a", opened=True) == "b\n</think>\n\na"
    assert completion_text("b, and so ", "") == "<think>\nb, and so "


@pytest.mark.parametrize(
    ("content", "settings", "problem"),
    [
        ("{", {}, "not valid JSON"),
        ("[]", {}, "an object with a list `results`"),
        ('{"results": []}', {}, "no usable completion"),
        (json.dumps({"results": [BAD["there is no text"]]}), {}, "no usable completion"),
        (json.dumps({"results": RESULTS}), {"max_tokens": 0}, "max_tokens must be at least 1"),
        (json.dumps({"results": RESULTS}), {"models": []}, "in models"),
        (json.dumps({"results": RESULTS}), {"assume": "all_finished"}, "assume"),
    ],
)
def test_a_file_or_a_setting_that_will_not_do_is_refused(tmp_path, content, settings, problem):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=problem):
        read(tmp_path / "a.json", **settings)
    with pytest.raises(FileNotFoundError, match="b.json"):
        read(tmp_path / "b.json")
    with pytest.raises(ValueError, match="chat template"):
        import_completions(write(tmp_path / "c.json", RESULTS), "traces", tiny_tokenizer())


def test_the_recipe_writes_a_rollout_file(tmp_path, caplog):
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    traces = write(tmp_path / "a.json", [*RESULTS, answers("w6", [None])])
    arguments = f"--format traces --input {traces} --tokenizer_name_or_path {tmp_path / 'tokenizer'}"
    arguments += f" --output {tmp_path / 'r.jsonl'} --max_tokens 4 --models m"
    (args,) = import_rollouts.make_parser().parse_args_and_config(arguments.split())
    with caplog.at_level(logging.INFO):
        written = import_rollouts.main(args)
    dataset, metadata = read_rollouts(tmp_path / "r.jsonl")
    assert metadata == written and len(dataset) == 5 and metadata.num_prompts == 2
    assert "5 completions of 2 prompts, 2 to 4 tokens (median 3), 40.0% truncated, 1 set aside" in caplog.text
    assert (tmp_path / "r.rejected.jsonl").exists() and not rejected_path(traces).exists()


@pytest.mark.skipif(not TRACES.is_dir(), reason="the MisguidedAttention files are not in ../shared/data")
@pytest.mark.parametrize(
    ("name", "models", "completions", "cut"),
    [
        ("results_long_eval__output_queries_q3_30ba3-think.json", ["qwen3-30b-a3b-think"], 156, 1),
        ("results_long_eval__output_queries_q3_30ba3.json", None, 156, 0),
        ("backup_v02_evals__results_small_models__output_queries.json", ["llama-3.2-1b-instruct"], 65, 0),
    ],
)
def test_real_files_are_read_whole(tmp_path, name, models, completions, cut):
    # A tokenizer of words and blanks: what is tested is that every sample of the file arrives.
    dataset, metadata = read(TRACES / name, models=models, rejected_beside=tmp_path / "r.jsonl")
    assert len(dataset) == completions and metadata.sampling["set_aside"] == 0
    assert dataset["finish_reason"][:].count("length") == cut
    assert metadata.sampling["finish_reason"]["assumed_cut"] == cut
    assert metadata.num_prompts == {156: 52, 65: 13}[completions]
    thinking = [text.startswith("<think>") for text in dataset["completion_text"][:]]
    assert all(thinking) if name.endswith("think.json") else not any(thinking)
    write_rollouts(tmp_path / "r.parquet", dataset, metadata)
