"""Two models agree on tokens, or the error says where they do not."""

import json
import re

import pytest
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lenvm_rl.tokenization import check_pad_is_not_eos, check_same_tokenizer, tokenizer_fingerprint


def tokenizer_of(words, eos="<eos>", pad="<pad>"):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token=pad)


def test_the_fingerprint_names_size_ends_and_digest():
    fingerprint = tokenizer_fingerprint(tokenizer_of(["<pad>", "b", "<eos>", "a"]))
    # The digest of [["<eos>", 2], ["<pad>", 0], ["a", 3], ["b", 1]], worked out with `sha256sum`.
    assert fingerprint == {
        "vocab_size": 4,
        "largest_id": 3,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "sha256": "c8a8f22ad376053852f6f57ee7c18a77ce9de5a5ae978c1d607bab51729cdfc5",
    }


def test_a_fingerprint_survives_json():
    fingerprint = tokenizer_fingerprint(tiny_tokenizer())
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    check_same_tokenizer(json.loads(json.dumps(fingerprint)), tiny_tokenizer())


def test_the_fingerprint_counts_added_tokens_and_ignores_the_chat_template():
    plain, chatting, extended = tiny_tokenizer(), tiny_tokenizer(chat=True), tiny_tokenizer()
    extended.add_tokens(["one_more"])
    assert tokenizer_fingerprint(plain) == tokenizer_fingerprint(chatting)
    assert tokenizer_fingerprint(extended)["vocab_size"] == 65
    assert tokenizer_fingerprint(extended)["sha256"] != tokenizer_fingerprint(plain)["sha256"]


def test_a_token_outside_unicode_text_has_a_fingerprint():
    class Odd:
        eos_token_id, pad_token_id = 1, 0

        def get_vocab(self):
            return {"\ud800": 0, "é": 1}

    assert len(tokenizer_fingerprint(Odd())["sha256"]) == 64


@pytest.mark.parametrize("as_ours", [lambda t: t, tokenizer_fingerprint])
@pytest.mark.parametrize("as_theirs", [lambda t: t, tokenizer_fingerprint])
def test_the_same_tokenizer_passes_as_tokenizer_or_fingerprint(as_ours, as_theirs):
    check_same_tokenizer(as_ours(tiny_tokenizer()), as_theirs(tiny_tokenizer()))


def test_another_pad_token_is_the_same_tokenizer():
    words = ["<pad>", "<eos>", "x"]
    check_same_tokenizer(tokenizer_of(words), tokenizer_of(words, pad="x"))


def test_a_difference_in_size_is_named_by_both_numbers():
    with pytest.raises(ValueError, match="64 tokens, the policy .* 70"):
        check_same_tokenizer(tokenizer_fingerprint(tiny_tokenizer()), tiny_tokenizer(vocab_size=70))


def test_two_swapped_tokens_are_named_with_their_ids():
    ours, theirs = tokenizer_of(["<pad>", "<eos>", "a", "b", "c"]), tokenizer_of(["<pad>", "<eos>", "b", "a", "c"])
    expected = "2 ids differ (id 2 is 'a' for the critic and 'b' for the actor, id 3 is 'b' for the critic and 'a'"
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_same_tokenizer(ours, theirs, ours_name="the critic", theirs_name="the actor")


def test_only_the_first_differences_are_listed():
    ours, theirs = tiny_tokenizer(), tokenizer_of(["<pad>", "<eos>"] + [f"other{i}" for i in range(2, 64)])
    with pytest.raises(ValueError, match="62 ids differ") as error:
        check_same_tokenizer(ours, theirs)
    assert "id 6 is" in str(error.value) and "id 7 is" not in str(error.value) and "…" in str(error.value)


def test_a_fingerprint_can_tell_only_that_pairs_differ():
    ours, theirs = tokenizer_of(["<pad>", "<eos>", "a", "b"]), tokenizer_of(["<pad>", "<eos>", "b", "a"])
    with pytest.raises(ValueError, match="pairs differ"):
        check_same_tokenizer(tokenizer_fingerprint(ours), theirs)


def test_another_end_of_sequence_is_a_difference_though_the_vocabulary_is_the_same():
    words = ["<pad>", "<eos>", "<end>"]
    with pytest.raises(ValueError, match="id 1 for the length value model, id 2 for the policy"):
        check_same_tokenizer(tokenizer_of(words), tokenizer_of(words, eos="<end>"))


@pytest.mark.parametrize("unknown", [None, {}, {"vocab_size": 64}])
def test_an_unknown_tokenizer_is_refused_by_name(unknown):
    with pytest.raises(ValueError, match="the length value model is"):
        check_same_tokenizer(unknown, tiny_tokenizer())
    with pytest.raises(ValueError, match="the policy is"):
        check_same_tokenizer(tiny_tokenizer(), unknown)


def test_pad_has_to_be_there_and_not_the_end():
    words = ["<pad>", "<eos>", "x"]
    check_pad_is_not_eos(tokenizer_of(words))
    with pytest.raises(ValueError, match=r"are the same \('<eos>', id 1\)"):
        check_pad_is_not_eos(tokenizer_of(words, pad="<eos>"))
    with pytest.raises(ValueError, match="no pad token"):
        check_pad_is_not_eos(tokenizer_of(words, pad=None))
    with pytest.raises(ValueError, match="eos_token"):
        check_pad_is_not_eos(tokenizer_of(words, eos=None))
