"""The demo: what settings make of a prompt, what is shown of it, and the page in a browser that presses the button."""

import json
import re
import socket
from dataclasses import asdict, replace

import gradio as gr
import pytest
import torch
from browser import LivePage
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from eval.demo import (
    DemoArguments,
    DemoSettings,
    ShownCompletion,
    build_page,
    colour_limit,
    complete_both,
    heat_map,
    load_models,
    respond,
    serve_page,
)
from eval.viewer.tokens import Piece, TokenValues
from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.sandbox import sandbox_tokenizer


def tricky_tokenizer():
    """The tiny tokenizer, its words spelt so that they break out of what takes them for HTML or for a template."""
    tokenizer = tiny_tokenizer()

    def spell(match):
        return json.dumps(f"<b>{match[1]}</b>${{1+{match[1]}}}{{{{value}}}}@children&amp;\"'")

    core = Tokenizer.from_str(re.sub(r'"w(\d+)"', spell, tokenizer.backend_tokenizer.to_str()))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def saved(folder, tokenizer, **config):
    """Arguments that name a tiny policy and a tiny length value model, written to a folder."""
    backbone = tiny_llama(vocab_size=len(tokenizer), **config)
    for name, model in (
        ("policy", backbone),
        ("length_value_model", tiny_length_value_model(tiny_llama(vocab_size=len(tokenizer)), tokenizer=tokenizer)),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return DemoArguments(policy=str(folder / "policy"), length_value_model=str(folder / "length_value_model"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models without a candidate rule, so that the end is a candidate at every state."""
    found, _ = load_models(saved(tmp_path_factory.mktemp("models"), tiny_tokenizer()))
    return replace(found, candidates=LengthGuidance())


def texts(shown):
    return [piece.text for piece in shown.pieces]


def test_settings_that_mean_nothing_to_the_mode_are_left_out():
    candidates = LengthGuidance(top_k=3)
    settings = DemoSettings(strength=1.5, target_length=7, rule="paper")
    assert settings.guidance(candidates) == LengthGuidance(strength=1.5, top_k=3)
    settings = replace(settings, mode="at_most")
    assert settings.guidance(candidates) == LengthGuidance("at_most", target_length=7, rule="paper", top_k=3)


def test_strength_0_writes_the_same_twice_and_leaves_the_random_state(models):
    before = torch.get_rng_state()
    base, guided = complete_both(models, "w6 w7", DemoSettings(strength=0.0, max_new_tokens=20))
    assert texts(base) == texts(guided) and base.length == guided.length
    assert torch.equal(torch.get_rng_state(), before)
    other, _ = complete_both(models, "w6 w7", DemoSettings(strength=0.0, max_new_tokens=20, seed=1))
    assert texts(other) != texts(base)


def test_hard_rules_end_where_they_must(models):
    """The end is 0 tokens from the end: the least of all candidates, which `at_least` takes once 5 tokens stand."""
    settings = DemoSettings("at_most", target_length=5, rule="paper", max_new_tokens=20)
    base, guided = complete_both(models, "w6 w7", settings)
    assert (guided.length, guided.finished, texts(guided)) == (0, True, ["<eos>"])
    _, longer = complete_both(models, "w6 w7", replace(settings, mode="at_least"))
    assert (longer.length, longer.finished, len(longer.pieces)) == (5, True, 6)
    assert base.predicted == guided.predicted == longer.predicted >= 0


def test_a_cut_completion_is_known_as_cut(models):
    _, guided = complete_both(models, "w6", DemoSettings("at_least", target_length=5, max_new_tokens=6, rule="paper"))
    assert guided.finished
    base, _ = complete_both(models, "w6", DemoSettings("at_most", target_length=0, max_new_tokens=1, rule="paper"))
    assert base.length == 1 and not base.finished and "cut" in heat_map("Base", base, 1.0)


def shown(shifts, pieces):
    shift = torch.tensor(shifts).double()
    values = TokenValues(torch.arange(len(shifts), 0, -1).double(), -shift.abs(), shift, 10 * shift)
    return ShownCompletion(pieces, values, 1.0, len(pieces), True)


def test_colours_and_titles_by_hand():
    pieces = [Piece("a<b>"), Piece("\n"), Piece("", 1, 2), Piece("<end>", special=True)]
    html = heat_map("Base", shown([0.1, -0.05, -0.4, 0.0], pieces), 0.1)
    assert re.findall(r'class="t (\w+) ?(\w*)" style="--share:([\d.]+)%"', html) == [
        ("longer", "", "100.0"), ("shorter", "", "50.0"), ("shorter", "part", "100.0"), ("shorter", "special", "0.0"),
    ]  # fmt: skip
    # Of four tokens still to come one is written, and there is one more to come than expected.
    assert 'title="token 1: 1.00 tokens longer than expected; still to come 4.0 → 4.0"' in html
    assert "a&lt;b&gt;" in html and '<i class="end">\n</i>' in html and "&lt;end&gt;" in html


def test_the_full_colour_is_for_nearly_all():
    quiet, loud = shown([0.01] * 150, []), shown([0.01] * 49 + [5.0], [])
    assert colour_limit([quiet, loud]) == pytest.approx(0.01)
    assert colour_limit([shown([0.0, 0.0], [])]) == 1.0


@pytest.mark.parametrize(
    "prompt, changed, said",
    [
        ("", {}, "Prompt"),
        ("w6", {"seed": None}, "seed"),
        ("w6", {"max_new_tokens": 0}, "max_new_tokens"),
        ("w6", {"max_new_tokens": 600}, "context"),
        ("w6", {"strength": None}, "strength"),
        ("w6", {"mode": "at_most", "rule": "patient"}, "rule"),
        ("w6", {"mode": "equal_to", "target_length": 20}, "target_length"),
        ("w6", {"mode": "equal_to", "target_length": None}, "target_length"),
    ],
)
def test_what_makes_no_sense_is_told_in_the_page(models, prompt, changed, said):
    with pytest.raises(gr.Error) as refused:
        respond(models, prompt, asdict(DemoSettings(max_new_tokens=20)) | changed)
    assert said in refused.value.message and not refused.value.print_exception


def test_a_defect_is_no_sentence(models):
    with pytest.raises(AttributeError):
        respond(replace(models, policy=None), "w6", asdict(DemoSettings()))


def test_a_model_of_ones_own_has_no_examples_and_chats_on_demand(tmp_path):
    args = saved(tmp_path, tiny_tokenizer(chat=True))
    plain, filled = load_models(args)
    assert not plain.examples and not plain.chat and plain.candidates.top_k == 15
    assert (filled.temperature, filled.max_new_tokens) == (1.0, 256)
    chat, _ = load_models(replace(args, chat=True))
    settings = DemoSettings("at_most", target_length=5, rule="paper", max_new_tokens=20)
    # The template writes a token before and one after.
    [before, after] = [complete_both(each, "w6", settings)[0].values.values[0] for each in (plain, chat)]
    assert chat.chat and before != after


def test_a_recipes_run_is_found_with_prompts_of_the_sandbox(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="make quickstart"):
        load_models(DemoArguments())
    run = tmp_path / "outputs" / "sandbox"
    saved(run, sandbox_tokenizer())
    record = {"policy": "policy", "length_value_model": "length_value_model", "temperature": 0.5, "max_new_tokens": 30}
    (run / "run.json").write_text(json.dumps(record))
    found, filled = load_models(DemoArguments())
    assert len(found.examples) == 8 and found.examples[0].endswith("?") and filled.max_new_tokens == 30
    assert found.candidates == LengthGuidance(temperature=0.5, min_p=0.01)
    assert len(complete_both(found, found.examples[0], DemoSettings())) == 2
    with pytest.raises(gr.Error, match="&lt;i&gt;"):
        respond(found, "3 c +5 <i> ?", asdict(DemoSettings()))


def test_arguments():
    with pytest.raises(ValueError, match="max_strength"):
        DemoArguments(max_strength=0.0)


CLICK = "document.querySelector('#complete').click()"


def test_the_button_in_a_browser(tmp_path):
    """It shows what `complete_both` says, as text, and what is refused; its browser asks nobody but its server."""
    models, args = load_models(saved(tmp_path, tricky_tokenizer()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        args = replace(args, port=free.getsockname()[1], max_new_tokens=20)
    words = [word for word in models.tokenizer.get_vocab() if word.startswith("<b>")][:2]
    page = build_page(replace(models, examples=words), args)
    serve_page(page, args, block=False)
    try:
        with LivePage(f"http://{args.host}:{args.port}", tmp_path) as live:
            live.wait_for("!!document.querySelector('#complete')")
            live.evaluate(CLICK)
            live.wait_for("document.querySelectorAll('#guided .t').length")
            settings = DemoSettings(strength=3.0, max_new_tokens=20)
            expected = complete_both(models, words[0], settings)
            for name, one in zip(("base", "guided"), expected, strict=True):
                text = live.evaluate(f"document.querySelector('#{name} .text').textContent")
                assert text == "".join(texts(one)) and "${1+" in text
                facts = live.evaluate(f"document.querySelector('#{name} .facts').textContent")
                assert f"{one.length} tokens" in facts and f"{one.predicted:.1f}" in facts
            # A target of 20 needs room for the end.
            live.evaluate("document.querySelectorAll('#mode input')[1].click()")
            live.wait_for("!!document.querySelector('#target input')")
            live.evaluate("document.querySelectorAll('#rule input')[0].click()")
            live.evaluate(
                "{ const field = document.querySelector('#target input[type=number]'); field.value = 20;"
                " field.dispatchEvent(new Event('input')); field.dispatchEvent(new Event('blur')); }"
            )
            live.evaluate(CLICK)
            live.wait_for("document.body.innerText.includes('target_length=20 needs max_new_tokens')")
            assert live.evaluate("!document.querySelector('#strength')")
            # The browser would refuse to ask anybody else.
            refused = "document.addEventListener('securitypolicyviolation', (event) => done(event.blockedURI))"
            elsewhere = "http://example.invalid/"
            script = f"new Promise((done) => {{ {refused}; fetch('{elsewhere}').catch(() => null); }})"
            assert live.evaluate(script) == elsewhere
    finally:
        page.close()
