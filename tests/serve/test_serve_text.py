"""Text as it is streamed: whole characters, the same text in pieces as in one, and nothing of a stop string."""

import random

import pytest
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lenvm_rl.tokenization import IncrementalText

REPLACEMENT = "\ufffd"


def byte_tokenizer():
    """A token for every byte, so that most characters outside of ASCII take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({"<pad>": 0, "<eos>": 1} | {byte: i for i, byte in enumerate(alphabet, 2)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def fallback_tokenizer():
    """As SentencePiece: a blank is part of a word, the first is dropped, and unknown characters are spelt in bytes."""
    words = ["<pad>", "<eos>", "▁a", "b", "▁", "▁▁", "."] + [f"<0x{byte:02X}>" for byte in range(256)]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def pieces_of(tokenizer, ids, stop=()):
    text = IncrementalText(tokenizer, stop)
    return [*(text.push(token) for token in ids), text.finish()], text.stopped


def test_characters_are_never_split():
    tokenizer, text = byte_tokenizer(), "Grüße, 世界 😀\u200d👩 done"
    pieces, _ = pieces_of(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(pieces) == text and REPLACEMENT not in "".join(pieces)
    assert [piece for piece in pieces if piece] == list(text)
    # Not held back any longer than a character takes.
    assert pieces[:2] == ["G", "r"]


def test_half_a_character_at_the_end_is_shown_as_such():
    tokenizer = byte_tokenizer()
    pieces, _ = pieces_of(tokenizer, tokenizer("ab😀")["input_ids"][:-1])
    assert "".join(pieces[:-1]) == "ab" and set(pieces[-1]) == {REPLACEMENT}


@pytest.mark.parametrize("make", [byte_tokenizer, fallback_tokenizer, tiny_tokenizer])
def test_the_pieces_together_are_the_text(make):
    tokenizer, draw = make(), random.Random(0)
    # Bytes that are no characters are replaced in a way of its own by SentencePiece's decoder.
    ids = range(7) if make is fallback_tokenizer else range(len(tokenizer))
    for _ in range(200):
        chosen = draw.choices(ids, k=draw.randrange(30))
        pieces, _ = pieces_of(tokenizer, chosen)
        whole = tokenizer.decode(chosen, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(pieces) == whole


def test_characters_spelt_in_bytes():
    tokenizer = fallback_tokenizer()
    ids = [2, *tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<0xE2>", "<0x82>", "<0xAC>"]), 3]
    assert pieces_of(tokenizer, ids)[0] == ["a", "", "é", "", "", "€", "b", ""]


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one. two. three", ("two",), "one. "),
        ("one two", ("three", "wo"), "one t"),
        ("aaab", ("aab",), "a"),
        ("abcabd", ("abd",), "abc"),
        ("xyz", ("yz", "xyz"), ""),
        ("xy", ("xyz",), "xy"),
        ("ab😀cd", ("😀",), "ab"),
        ("abc", ("d",), "abc"),
    ],
)
def test_a_stop_string_ends_the_text_and_nothing_of_it_gets_out(text, stop, kept):
    tokenizer = byte_tokenizer()
    pieces, stopped = pieces_of(tokenizer, tokenizer(text)["input_ids"], stop)
    assert "".join(pieces) == kept and stopped == (kept != text)


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not():
    tokenizer = byte_tokenizer()
    pieces, _ = pieces_of(tokenizer, tokenizer("abXbc")["input_ids"], ("abc",))
    assert pieces == ["", "", "abX", "b", "c", ""]


@pytest.mark.parametrize("make", [byte_tokenizer, tiny_tokenizer])
def test_a_special_token_can_be_named_as_a_stop_string(make):
    tokenizer = make()
    ids = tokenizer("w7 w8" if make is tiny_tokenizer else "ab")["input_ids"]
    for stop, ends in (("<pad>", True), ("<eos>", False), ("pad", False)):
        pieces, stopped = pieces_of(tokenizer, [*ids, tokenizer.pad_token_id, *ids], (stop,))
        assert stopped == ends
        assert "".join(pieces) == tokenizer.decode(ids if ends else ids + ids)


def test_what_was_held_back_comes_out_before_a_special_token_that_ends():
    tokenizer = byte_tokenizer()
    pieces, stopped = pieces_of(tokenizer, [*tokenizer("ab")["input_ids"], 0], ("bc", "<pad>"))
    assert (pieces, stopped) == (["a", "", "b", ""], True)
