"""The viewer: text of every token, one page that needs no network, and what pointing and clicking does in a browser."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browser import TRICKY, check_asks_for_nothing, check_closed, data_of, drive
from tiny import EOS, tiny_length_value_model, tiny_tokenizer, tokens
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eval.pages import fill_page
from eval.viewer import __main__ as program
from eval.viewer.__main__ import ViewerArguments, completion_entry, main
from eval.viewer.tokens import Piece, TokenValues, token_name, token_pieces, visible
from lenvm_rl.rollouts.record import RolloutMetadata, write_rollouts
from lenvm_rl.tokenization import tokenizer_fingerprint


def byte_tokenizer():
    """A byte-level vocabulary: one token per byte, plus a few merges and an end; ids of bytes follow their signs."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "w"), ("Ġw", "a")]
    vocabulary = {letter: i for i, letter in enumerate([*letters, "Ġw", "Ġwa"])}
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"eos_token": AddedToken("<|end|>", special=True), "pad_token": "<|pad|>"})
    return tokenizer


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["a wave", "naïve 日本 😀!", "a\n\nb\r\n\tc", "  ", TRICKY])
def test_the_texts_of_the_tokens_are_the_text(text):
    tokenizer = byte_tokenizer()
    ids = ids_of(tokenizer, text)
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(piece.text for piece in pieces) == text


def test_a_character_of_several_tokens_stands_at_the_last_of_them():
    tokenizer = byte_tokenizer()
    pieces = token_pieces(tokenizer, [*ids_of(tokenizer, "x😀é"), tokenizer.eos_token_id])
    assert pieces == [
        Piece("x"), Piece("", 1, 4), Piece("", 2, 4), Piece("", 3, 4), Piece("😀", 4, 4), Piece("", 1, 2),
        Piece("é", 2, 2), Piece("<|end|>", special=True),
    ]  # fmt: skip


def test_bytes_that_never_become_a_character_are_shown_and_do_not_swallow_what_follows():
    tokenizer = byte_tokenizer()
    half = ids_of(tokenizer, "😀")[:2]
    pieces = token_pieces(tokenizer, [*half, *ids_of(tokenizer, "ok"), *half, tokenizer.eos_token_id, *half])
    assert len(pieces) == 9
    assert "".join(piece.text for piece in pieces).replace("\ufffd", "") == "ok<|end|>"
    # A long run of them: each gets its own place after four, so that what comes then is read as it is.
    first = ids_of(tokenizer, "😀")[:1]
    pieces = token_pieces(tokenizer, [*(first * 40), *ids_of(tokenizer, "日ab")])
    assert [piece.text for piece in pieces[-2:]] == ["a", "b"] and len(pieces) == 45
    assert sum(piece.parts > 1 for piece in pieces) <= 8 and "日" in "".join(piece.text for piece in pieces)


def test_words_of_a_word_level_vocabulary_keep_the_blank_between_them():
    tokenizer = tiny_tokenizer()
    pieces = token_pieces(tokenizer, [7, 8, EOS], before=[6])
    assert [piece.text for piece in pieces] == [" w7", " w8", "<eos>"] and pieces[-1].special
    assert [piece.text for piece in token_pieces(tokenizer, [7, 8])] == ["w7", " w8"]


def test_names_of_tokens_alone():
    tokenizer = byte_tokenizer()
    names = [token_name(tokenizer, token) for token in ids_of(tokenizer, " wa\n\té")]
    assert names[:3] == ["␣wa", "↵", "⇥"]
    # A part of a character is no text: the vocabulary's own sign for the byte stands for it.
    assert names[3:] == tokenizer.convert_ids_to_tokens(ids_of(tokenizer, "é"))
    assert token_name(tokenizer, tokenizer.eos_token_id) == "<|end|>"
    assert visible("  a b ") == "␣␣a b␣" and visible("  ") == "␣␣"


def entry(text, row, finished=True, tokenizer=None, **columns):
    """A completion whose predictions count down from 10 % too much, but for one token that adds five."""
    tokenizer = tokenizer or byte_tokenizer()
    ids = ids_of(tokenizer, text) + ([tokenizer.eos_token_id] if finished else [])
    count = len(ids)
    remaining = torch.tensor([1.1 * (count - t) for t in range(count)]).double()
    shift_in_tokens = torch.full((count,), -0.1).double()
    shift_in_tokens[min(3, count - 1)] = 5.0
    values = TokenValues(remaining, -remaining / (count * 2), shift_in_tokens / 100, shift_in_tokens)
    record = {"prompt": "p", "prompt_ids": ids_of(tokenizer, "p <i>"), "completion_ids": ids, "group": 4}
    return completion_entry(
        record | {"finish_reason": "stop" if finished else "length"} | columns, row, values, tokenizer
    )


def page(*entries):
    return fill_page(
        Path(program.__file__).parent, {"title": "title " + TRICKY, "about": "about " + TRICKY, "completions": entries}
    )


def test_an_entry_says_what_the_page_needs():
    found = entry("abcd😀", 5, model="m", answer="x" * 61, correct=True, missing=None)
    assert found["row"] == 5 and found["group"] == 4 and found["finished"] and found["length"] == 8
    assert found["tokens"][3:7] == [["d", 1, 1, 0], ["", 1, 4, 0], ["", 2, 4, 0], ["", 3, 4, 0]]
    assert found["tokens"][-1] == ["<|end|>", 1, 1, 1] and found["prompt"] == "p <i>"
    # One state more than tokens, the one after the last token.
    assert len(found["remaining"]) == 10 and len(found["shift"]) == len(found["shift_in_tokens"]) == 9
    assert found["remaining"][0] == pytest.approx(9.9) and found["remaining"][-1] == pytest.approx(0, abs=1e-6)
    assert found["columns"] == {"model": "m", "correct": "True"}
    assert entry("abcd", 0, finished=False)["length"] == 4


def test_the_page_holds_the_data_and_nothing_can_break_out_of_it():
    text = page(entry(TRICKY, 0), entry("b", 1))
    _, data = data_of(text)
    assert "".join(token[0] for token in data["completions"][0]["tokens"][:-1]) == TRICKY
    assert data["title"] == "title " + TRICKY
    # The only text that comes from elsewhere is the data.
    check_closed(text)
    assert "title <" not in text


def test_the_page_asks_for_nothing():
    check_asks_for_nothing(page(entry("a", 0)))


def test_the_program_writes_the_page(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tiny_length_value_model(tokenizer=tokenizer).save_pretrained(tmp_path / "lenvm")
    tokenizer.save_pretrained(tmp_path / "lenvm")
    rows = []
    for n in range(3):
        ids = tokens(1, 5 + n, seed=n)[0].tolist()
        record = {"prompt": "w6", "prompt_ids": [6], "completion_ids": [*ids, EOS] if n else ids, "group": n}
        rows.append(record | {"finish_reason": "stop" if n else "length", "correct": float(n)})
    write_rollouts(tmp_path / "r.jsonl", rows, RolloutMetadata("gen", tokenizer_fingerprint(tokenizer), {}, 0, [EOS]))
    paths = str(tmp_path / "r.jsonl"), str(tmp_path / "lenvm")
    args = ViewerArguments(*paths[::-1], rows=[2, 0], output=str(tmp_path / "v" / "page.html"))
    found = main(args)
    _, data = data_of((tmp_path / "v" / "page.html").read_text(encoding="utf-8"))
    assert data["completions"] == found["completions"]
    assert [[one[name] for name in ("row", "length", "finished")] for one in data["completions"]] == [
        [2, 7, True], [0, 5, False],
    ]  # fmt: skip
    assert data["completions"][0]["remaining"][-1] == 0 and data["completions"][1]["remaining"][-1] > 0
    assert "sampled of gen" in data["about"] and "13 tokens" in capsys.readouterr().out
    for wrong in ([3], [-1]):
        with pytest.raises(ValueError, match="rows"):
            main(replace(args, rows=wrong))
    with pytest.raises(ValueError, match="rows"):
        ViewerArguments("m", "r", rows=[1, 1])
    with pytest.raises(ValueError, match="rollouts"):
        ViewerArguments("m")


# Points, clicks and types.
STEPS = """
const fire = (target, kind, options) => target.dispatchEvent(new MouseEvent(kind, { bubbles: true, ...options }));
const type = (panel, key, options) =>
  panel.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...options }));
const state = (panel) => ({
  on: [...panel.querySelectorAll(".t.on")].map((token) => Number(token.dataset.i)),
  pinned: [...panel.querySelectorAll(".t.pinned")].map((token) => Number(token.dataset.i)),
  band: [...panel.querySelectorAll("svg .band")].map((band) => Number(band.dataset.i)),
  dots: panel.querySelectorAll("svg .dot").length,
  said: panel.querySelector(".readout").textContent });
const [left, right] = document.querySelectorAll(".panel");
const token = (panel, i) => panel.querySelectorAll(".t")[i];
const at = (panel, share) => {
  const svg = panel.querySelector("svg"), box = svg.getBoundingClientRect();
  const strip = svg.querySelectorAll("rect.shift"), from = strip[0].getBoundingClientRect().left;
  const to = strip[strip.length - 1].getBoundingClientRect().right;
  return { clientX: from + share * (to - from), clientY: box.top + 50 };
};
say("idle", state(left));
fire(token(left, 3), "mouseover"); say("hover", state(left)); say("other", state(right));
fire(left.querySelector(".text"), "mouseleave", { bubbles: false }); say("leave", state(left));
fire(token(left, 2), "click"); say("click", state(left));
fire(token(left, 5), "mouseover"); fire(left.querySelector(".text"), "mouseleave", { bubbles: false });
say("back", state(left));
const extent = (panel) => Math.round(at(panel, 1).clientX - at(panel, 0).clientX);
say("extent", extent(left), extent(right));
document.getElementById("same").click();
say("extent", extent(left), extent(right));
fire(left.querySelector("svg"), "mousemove", at(left, 0.99)); say("curve", state(left));
const text = right.querySelector(".text");
fire(right.querySelector("svg"), "click", at(right, 0.9)); say("curveclick", state(right), text.scrollTop > 0);
type(right, "Home"); say("home", state(right), text.scrollTop);
type(right, "ArrowRight"); type(right, "ArrowRight", { shiftKey: true }); say("arrows", state(right));
type(right, "ArrowLeft"); say("left", state(right));
type(right, "End"); type(right, "ArrowRight"); say("end", state(right));
type(right, "Escape"); say("escape", state(right));
say("colours", [0, 3].map((i) => token(left, i).style.backgroundColor));
const unit = document.getElementById("unit");
say("legend", document.getElementById("high").textContent);
unit.value = "tokens"; unit.dispatchEvent(new Event("change"));
say("legend", document.getElementById("high").textContent);
const choice = right.querySelector("select");
choice.value = "2"; choice.dispatchEvent(new Event("change")); say("chosen", right.querySelectorAll(".t").length);
fire(right.querySelector("svg"), "mousemove", at(right, 0.5)); say("after", state(right));
say("signs", left.querySelectorAll(".end").length, left.querySelectorAll(".part").length,
  left.querySelectorAll(".special").length, left.querySelector(".text").textContent);
say("wide", document.documentElement.scrollWidth <= document.documentElement.clientWidth);
say("asked", performance.getEntriesByType("resource").length);
"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """What a browser says after pointing at, clicking and typing into a page of 9, 2500 and 120 tokens."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer = byte_tokenizer()
    entries = [entry("ab\n</b>é", 0), entry("a wave " * 500, 1, finished=False), entry("x" * 119, 2)]
    assert [len(one["tokens"]) for one in entries] == [10, 2500, 120] and len(tokenizer)
    return drive(page(*entries), STEPS, folder)


def marked(i):
    return {"on": [i], "band": [i], "dots": 2}


def shows(state, expected):
    return {name: state[name] for name in expected} == expected


def test_nothing_goes_wrong_or_out_in_the_browser(driven):
    assert driven["asked"] == [[0]] and driven["wide"] == [[True]]


def test_pointing_at_a_token_marks_the_curve_and_only_while_it_lasts(driven):
    nothing = {"on": [], "pinned": [], "band": [], "dots": 0}
    assert shows(driven["idle"][0][0], nothing) and shows(driven["other"][0][0], nothing)
    hover = driven["hover"][0][0]
    assert shows(hover, marked(3) | {"pinned": []})
    assert "token 4 of 10" in hover["said"] and "5.00 tokens longer" in hover["said"] and "true 7 → 6" in hover["said"]
    assert shows(driven["leave"][0][0], nothing)


def test_a_click_pins_a_token_and_leaving_comes_back_to_it(driven):
    assert shows(driven["click"][0][0], marked(2) | {"pinned": [2]})
    assert shows(driven["back"][0][0], marked(2) | {"pinned": [2]})


def test_the_curve_points_at_the_text(driven):
    curve = driven["curve"][0][0]
    assert shows(curve, marked(9) | {"pinned": [2]}) and "<|end|> (special)" in curve["said"]
    clicked, scrolled = driven["curveclick"][0]
    # A browser's events know whole pixels, and one of them holds four tokens here.
    (place,) = clicked["on"]
    assert abs(place - 2250) < 8 and shows(clicked, marked(place) | {"pinned": [place]}) and scrolled
    assert f"at least {2500 - place} → {2499 - place}" in clicked["said"]


def test_axes_are_shared_until_told_otherwise(driven):
    (short, long), (alone, same) = driven["extent"]
    assert short < long / 100 and alone == same == long


def test_keys_step_through_the_tokens(driven):
    home, top = driven["home"][0]
    assert shows(home, marked(0) | {"pinned": [0]}) and top < 5
    assert shows(driven["arrows"][0][0], marked(11))
    assert shows(driven["left"][0][0], marked(10))
    assert shows(driven["end"][0][0], marked(2499))
    assert shows(driven["escape"][0][0], {"on": [], "pinned": [], "band": []})


def test_colours_go_by_the_shift_and_the_unit(driven):
    (slightly_shorter, longer) = driven["colours"][0][0]
    red, green, blue = map(int, re.findall(r"\d+", longer))
    assert red > 200 > blue and green > blue  # orange
    red, green, blue = map(int, re.findall(r"\d+", slightly_shorter))
    assert blue > red  # blue
    assert [what[0] for what in driven["legend"]] == ["+0.001 longer", "+0.1 longer"]


def test_another_completion_can_be_chosen(driven):
    assert driven["chosen"] == [[120]]
    assert shows(driven["after"][0][0], marked(60))


def test_line_ends_and_parts_of_characters_are_visible_and_markup_is_text(driven):
    ends, parts, special, text = driven["signs"][0]
    assert (ends, parts, special) == (1, 1, 1) and text == "ab\n</b>é<|end|>"
