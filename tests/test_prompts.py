"""What a person hands over as prompts: read from where it lies, and refused by its row where it is none."""

import gzip
import json

import pytest
from tiny import tiny_tokenizer

from lenvm_rl.rollouts.job import SamplingJob, SamplingSettings
from lenvm_rl.tokenization import check_context, check_prompts, check_room, load_prompts, tokenize_prompts

ROWS = [{"prompt": "w7 w8", "answer": 1}, {"prompt": "w9", "answer": 2}]
GOOD = [[{"role": "user", "content": "w7"}], [{"role": "assistant", "content": None, "tool_calls": [{}]}]]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.JSONL", lines(ROWS).encode()),
        ("p.tsv", b"prompt\tanswer\nw7 w8\t1\nw9\t2\n"),
        ("p.csv", b"prompt,answer\nw7 w8,1\nw9,2\n"),
        ("p.jsonl.gz", gzip.compress(lines(ROWS).encode(), mtime=0)),
        ("v1.2.jsonl", lines(ROWS).encode()),
    ],
)
def test_files_of_every_known_kind_are_read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert load_prompts(str(path)).to_list() == ROWS


def test_a_folder_of_files_is_read(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(lines(ROWS))
    assert load_prompts(str(tmp_path / "data")).to_list() == ROWS


@pytest.mark.parametrize(
    "name, content, kind, problem",
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt":\n', ValueError, "p.jsonl.*row 1"),
        ("p.parquet", b"PAR1", ValueError, "p.parquet"),
        ("p.txt", b"a\n", ValueError, r"p.txt.*\.jsonl, "),
        ("p", b"a\n", ValueError, r"\.jsonl, "),
        ("p.jsonl", b"\n\n", ValueError, "p.jsonl is empty"),
        ("p.tsv", None, FileNotFoundError, "p.tsv"),
        ("nowhere", None, FileNotFoundError, "nowhere"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, kind, problem):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=problem):
        load_prompts(str(path))


def test_an_unknown_split_of_a_folder_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(ROWS))
    with pytest.raises(ValueError, match="valid"):
        load_prompts(str(tmp_path), split="valid")


BAD = [
    (None, "missing"),
    (3, "int"),
    (float("nan"), "float"),
    ({"role": "user", "content": "w7"}, "dict"),
    ([], "without a message"),
    (["w7"], "str"),
    ([{"content": "w7"}], "message 0"),
    ([{"role": "system", "content": "w7"}, {"role": "user", "content": None}], "message 1"),
]


@pytest.mark.parametrize("bad, problem", BAD)
def test_what_is_no_prompt_is_named_by_its_row(bad, problem):
    tokenizer = tiny_tokenizer(chat=True)
    check_prompts(GOOD, "data.jsonl, column 'q'", tokenizer)
    for prompts in (["w7", "w8", bad], ["w7", "w8", bad, bad]):
        with pytest.raises(ValueError, match=f"data.jsonl, column 'q': row 2 .*{problem}") as caught:
            check_prompts(prompts, "data.jsonl, column 'q'", tokenizer)
        assert ("1 further rows" in str(caught.value)) == (len(prompts) == 4)
    with pytest.raises(ValueError, match=f"Prompt 2 .*{problem}"):
        tokenize_prompts(tokenizer, ["w7", "w8", bad])


def test_texts_and_messages_do_not_mix():
    with pytest.raises(ValueError, match="data: row 2 .*another kind"):
        check_prompts([*GOOD, "w7"], "data")


def test_texts_are_for_chat_and_messages_are_not():
    tokenizer = tiny_tokenizer(chat=True)
    check_prompts(["w7"], "data", tokenizer, chat=True)
    # One of the two is at fault, and it is not --chat.
    with pytest.raises(ValueError, match="row 1 .*missing") as caught:
        check_prompts(["w7", None], "data", tokenizer, chat=True)
    assert "--chat" not in str(caught.value)
    with pytest.raises(ValueError, match="row 0 .*--chat"):
        check_prompts(GOOD, "data", tokenizer, chat=True)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt_is_one_where_something_is_put_before_it(text):
    tokenizer = tiny_tokenizer(chat=True)
    for chat in (False, True):
        with pytest.raises(ValueError, match="row 1 .*empty"):
            check_prompts(["w7", text], "data", tokenizer, chat)

    class WithBeginning:
        def __call__(self, text):
            return {"input_ids": [5, *tokenizer(text)["input_ids"]]}

    check_prompts(["w7", text], "data", WithBeginning())
    with pytest.raises(ValueError, match="row 1 .*empty"):
        check_prompts(["w7", text], "data", WithBeginning(), chat=True)


def test_messages_that_make_no_tokens_are_named():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="Prompt 1 .*chat_template"):
        tokenize_prompts(tokenizer, ["w7", GOOD[0]])
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}w7"
    )
    assert tokenize_prompts(tokenizer, [GOOD[0]]) == [[7]]
    with pytest.raises(ValueError, match="Prompt 0 .*no system role"):
        tokenize_prompts(tokenizer, [[{"role": "system", "content": "w7"}]])


def test_one_text_is_no_list_of_its_letters():
    with pytest.raises(ValueError, match="prompts is one text"):
        tokenize_prompts(tiny_tokenizer(), "w7 w8")
    with pytest.raises(ValueError, match="prompts is one text"):
        Job(tiny_tokenizer(), "w7 w8", SamplingSettings(1, 4, 1), seed=0)


def test_the_longest_prompt_leaves_room():
    check_room([3, 5, 2], max_new_tokens=5, context=10)
    check_room([3, 5, 2], max_new_tokens=5, context=None)
    with pytest.raises(ValueError, match="Prompt 1 has 5 tokens.* 6 .*max_new_tokens"):
        check_room([3, 5, 2], max_new_tokens=6, context=10)


@pytest.mark.parametrize("chat, has_template, warned", [(False, True, 1), (True, True, 0), (False, False, 0)])
def test_a_template_that_prompts_do_not_go_through_is_named(chat, has_template, warned, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}" if has_template else None
    check_prompts(["w1", "w2"], "data", tokenizer, chat)
    assert sum("--chat true" in record.message for record in caplog.records) == warned


@pytest.mark.parametrize("tokens, warned", [(80, 0), (81, 1), (90, 1)])
def test_a_prompt_that_nearly_fills_the_context_is_named(tokens, warned, caplog):
    """Nine tenths of 100: 80 tokens and a completion of 10."""
    check_room([3, tokens, 5], 10, 100)
    assert [record.message.startswith(f"Prompt 1 has {tokens} ") for record in caplog.records] == [True] * warned


@pytest.mark.parametrize("chat", [False, True])
def test_a_row_that_is_too_long_is_found_where_few_are_tokenised(chat):
    tokenizer = tiny_tokenizer(chat=True)
    texts = ["w7", "w7 " * 30, "w8 " * 40, "w9 " * 35]
    # The template puts one token before a message and one behind all.
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    longest = 42 if chat else 40
    check_context(prompts, "data", tokenizer, max_new_tokens=10, context=longest + 10)
    check_context(prompts, "data", tokenizer, max_new_tokens=10, context=None)
    with pytest.raises(ValueError, match=f"data: row 2 .* {longest} tokens"):
        check_context(prompts, "data", tokenizer, max_new_tokens=10, context=longest + 9)

    def counting(asked):
        lengths.append(len(asked))
        return tokenizer(asked)

    lengths = []
    if not chat:
        check_context(["w7", *["w9 w9"] * 1000, "w8 " * 40], "data", counting, max_new_tokens=10, context=60)
        assert lengths == [2, 120]


class Job(SamplingJob):
    def sample(self, steps):
        raise AssertionError("nothing is sampled")


@pytest.mark.parametrize("bad", [b"bytes", {1: 2}, {"a": [object()]}])
def test_a_column_that_no_file_of_rollouts_holds_is_refused_before_sampling(bad):
    with pytest.raises(ValueError, match="'c' .* at prompt 1"):
        Job(tiny_tokenizer(), ["w7", "w8"], SamplingSettings(1, 4, 1), seed=0, extra_columns={"c": [None, bad]})
    with pytest.raises(ValueError, match="'c'"):
        Job(tiny_tokenizer(), ["w7", "w8"], SamplingSettings(1, 4, 1), seed=0, extra_columns={"c": [1, "1"]})
    for good in (None, 1.5, {"a": [True, False]}):
        Job(tiny_tokenizer(), ["w7", "w8"], SamplingSettings(1, 4, 1), seed=0, extra_columns={"c": [None, good]})
