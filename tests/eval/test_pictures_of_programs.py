"""Figures of the evaluation programs: what a reader would stumble over, and data of which there is little."""

import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from ragged import EOS, make_rollout, random_rollouts
from test_report import overlapping
from tiny import tiny_length_value_model, tiny_tokenizer

from eval import length_tokens
from eval.gradient import report as gradient_report
from eval.gradient.estimators import estimators
from eval.length_control.report import plot_length_control, summarise_cell
from eval.length_control.sampler import Completion
from eval.length_prediction import __main__ as length_prediction
from eval.length_prediction.__main__ import PredictionArguments
from eval.length_tokens import TokenArguments, cloud_words
from eval.tradeoff import report as tradeoff_report
from eval.tradeoff.report import plot_tradeoff
from lenvm_rl.rollouts.record import RolloutMetadata, write_rollouts
from lenvm_rl.tokenization import tokenizer_fingerprint

NOTHING = {"estimate": None, "low": None, "high": None}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, drawn, with everything written in them."""
    found = []

    def keep(path, figure):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        found.append((figure, canvas.get_renderer()))

    for module in (tradeoff_report, gradient_report, length_prediction, length_tokens, plot_length_control.__globals__):
        namespace = module if isinstance(module, dict) else vars(module)
        monkeypatch.setitem(namespace, "save_figure", keep)
    return found


def texts_of(figure):
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    inside = [text for legend in legends for text in legend.get_texts()]
    inside += [text for axis in figure.axes for text in (axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts)]
    inside += [figure._suptitle] if figure._suptitle else []
    return " | ".join(text.get_text() for text in inside)


def ticks_of(axis):
    for side in (axis.xaxis, axis.yaxis):
        low, high = sorted(side.get_view_interval())
        yield [tick.label1 for tick in side.get_major_ticks() if low <= tick.get_loc() <= high]


def interval(estimate, width=0.0):
    return {"estimate": estimate, "low": estimate - width, "high": estimate + width}


def arm(name, kind, tokens, accuracy, kl=None, **changes):
    row = {"name": name, "kind": kind, "tokens": interval(tokens, 1.0), "accuracy": interval(accuracy, 0.05)}
    row |= {"tokens_correct": interval(tokens, 1.0), "kl": None if kl is None else interval(kl)}
    return row | changes


def test_nothing_of_the_tradeoff_lies_beyond_the_axes(drawn, tmp_path):
    rows = [
        arm("base", "base", 12, 0.75, 0.0),
        arm("tilt +1", "tilt", 5, 0.5, 0.5),
        arm("_mine", "trained", 13, 1.0, 2.8),
    ]
    plot_tradeoff(rows, None, tmp_path / "t.png")
    ((figure, renderer),) = drawn
    left = figure.axes[0]
    assert "trained: " in texts_of(figure) and "_mine" in texts_of(figure)
    assert left.get_ylim()[0] < 0 and left.get_ylim()[1] > 1
    assert not any(overlapping(labels, renderer) for axis in figure.axes for labels in ticks_of(axis))
    # The legend lies below the panels, where it hides no point.
    (legend,) = figure.legends
    assert legend.get_window_extent(renderer).y1 < left.get_window_extent(renderer).y0


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy": interval(0.0), "tokens_correct": None},
        {"accuracy": NOTHING, "tokens_correct": None},
        {
            "accuracy": {"estimate": 0.5, "low": None, "high": None},
            "tokens": {"estimate": 5, "low": None, "high": None},
        },
    ],
)
def test_a_tradeoff_without_correct_or_graded_completions_or_several_prompts_is_drawn(drawn, tmp_path, changes):
    rows = [arm("base", "base", 12, 0.75, 0.0) | changes, arm("tilt +1", "tilt", 5, 0.5, 0.1) | changes]
    plot_tradeoff(rows, None, tmp_path / "t.png")
    figure, _ = drawn[0]
    assert ("no completion was graded" in texts_of(figure)) == (rows[0]["accuracy"] is NOTHING)
    assert figure.axes[0].get_ylim()[1] > 0.5


def test_accuracy_within_budgets_has_a_panel_of_its_own(drawn, tmp_path):
    rows = [arm("base", "base", 12, 0.75, 0.0), arm("tilt +1", "tilt", 5, 0.5, 0.5), arm("mine", "trained", 9, 0.9)]
    budgets = [2, 3, 5, 8, 12, 20]
    accuracy = {row["name"]: [interval(0.1 * n, 0.05) for n in range(6)] for row in rows}
    accuracy["tilt +1"][0] = NOTHING
    plot_tradeoff(rows, None, tmp_path / "t.png", {"budgets": budgets, "accuracy": accuracy})
    ((figure, renderer),) = drawn
    _, panel = figure.axes
    assert panel.get_xscale() == "log" and "cut off after" in panel.get_xlabel()
    lines = [len(line.get_xdata()) for line in panel.get_lines() if len(line.get_xdata()) > 1]
    assert sorted(lines) == [5, 6, 6]
    assert not any(overlapping(labels, renderer) for axis in figure.axes for labels in ticks_of(axis))


def test_gradients_that_cannot_be_told_are_left_out_and_cosines_beyond_one_are_explained(drawn, tmp_path):
    kinds = [each.kind for each in estimators(2)][:3]
    known = {"snr": interval(0.5, 0.9), "cosine_to_task": interval(1.4, 0.1), "cosine_to_length": NOTHING}
    rows = [{"name": f"e{n}", "kind": kind, **known} for n, kind in enumerate(kinds)]
    rows.append(
        {"name": "none", "kind": kinds[0], "snr": NOTHING, "cosine_to_task": NOTHING, "cosine_to_length": NOTHING}
    )
    gradient_report.plot_gradients(rows, tmp_path / "g.png")
    figure, _ = drawn[0]
    assert "beyond 1" in texts_of(figure) and figure.axes[1].get_xlim()[1] > 1.5
    assert all(gradient_report.KIND_LOOKS[kind][0] in texts_of(figure) for kind in kinds)


def write(folder, rows):
    tokenizer = tiny_tokenizer()
    tiny_length_value_model(tokenizer=tokenizer).save_pretrained(folder / "lenvm")
    tokenizer.save_pretrained(folder / "lenvm")
    write_rollouts(folder / "r.jsonl", rows, RolloutMetadata("p", tokenizer_fingerprint(tokenizer), {}, 0, [EOS]))
    return str(folder / "lenvm"), str(folder / "r.jsonl")


def predict(folder, rows, **options):
    return length_prediction.main(
        PredictionArguments(*write(folder, rows), num_resamples=20, output_dir=str(folder / "out"), **options)
    )


def test_lengths_have_ticks_that_do_not_overlap_dots_that_are_seen_and_marks_for_what_was_cut(drawn, tmp_path):
    rows = [{**row, "domain": "$a$" if row["group"] % 2 else "b"} for row in random_rollouts(80, longest=20)]
    predict(tmp_path, rows, domain_column="domain")
    ((figure, renderer),) = drawn
    left, right = figure.axes
    for axis in (left, right):
        assert not any(overlapping(labels, renderer) for labels in ticks_of(axis))
    assert all(len(labels) >= 3 for labels in ticks_of(left))
    alphas = [collection.get_alpha() for collection in left.collections if collection.get_alpha() is not None]
    assert alphas and min(alphas) >= 0.3
    said = texts_of(figure)
    for words in ("completions", "return-consistent", "cut completions", "as predicted", r"\$a\$"):
        assert words in said
    cut = sum(row["finish_reason"] == "length" for row in rows)
    hollow = [each for each in left.collections if len(each.get_facecolor()) == 0]
    assert sum(len(each.get_offsets()) for each in hollow) == cut > 0


def test_completions_that_were_all_cut_are_said_to_be(drawn, tmp_path, capsys):
    report = predict(tmp_path, [make_rollout([6], [7] * 9, "length", group) for group in range(4)])
    assert set(report["domains"]["all"]) == {"completions", "truncated_share"}
    assert "no completion ended" in texts_of(drawn[0][0]) and "100.0% cut" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 3])
def test_one_prompt_has_numbers_without_intervals(drawn, tmp_path, capsys, count):
    rows = [make_rollout([6, 9], [*range(10, 14 + n), EOS], group=5) for n in range(count)]
    report = predict(tmp_path, rows)
    found = report["domains"]["all"]["length_mae_at_0"]
    assert found["estimate"] >= 0 and found["low"] is None is found["high"]
    assert all(entry["low"] is None for entry in report["domains"]["all"].values())
    assert "There is one prompt" in capsys.readouterr().out


def test_a_domain_that_looks_like_markup_is_written_as_it_is(drawn, tmp_path, capsys):
    rows = [{**row, "domain": "[red]x[/]"} for row in random_rollouts(8, cut_share=0.0)]
    predict(tmp_path, rows, domain_column="domain")
    assert "[red]x[/]" in capsys.readouterr().out


def named(token, count, shift):
    return {"token": token, "count": count, "shift": {"estimate": shift}}


def test_a_cloud_shows_words_and_says_how_many_tokens_are_none():
    rows = [
        named("↵↵", 9000, 0.5),
        named("␣", 5000, 0.4),
        named("⇥", 50, 0.4),
        named("␣wait", 30, 0.2),
        named("wait", 20, 0.1),
        named("等", 40, 0.3),  # the font has no such sign
        named(".↵", 25, 0.2),
        named("rare", 3, 9.0),
        named("so", 50, -0.1),
    ]
    words, unreadable = cloud_words(rows, min_count=10, sign=1)
    # 30 x 0.2 + 20 x 0.1, and 25 x 0.2.
    assert words == {"wait": pytest.approx(8.0), ".": pytest.approx(5.0)} and unreadable == 4
    assert cloud_words(rows, min_count=10, sign=-1) == ({"so": pytest.approx(5.0)}, 0)


def test_a_cloud_without_a_word_says_so(drawn, tmp_path):
    length_tokens.plot_clouds([named("↵", 30, 0.5)], 10, tmp_path / "c.png")
    assert "make it longer: no words\n1 of blanks" in texts_of(drawn[0][0])
    assert "make it shorter: no words" in texts_of(drawn[0][0])


def test_length_tokens_of_one_prompt_and_of_cut_completions(drawn, tmp_path, capsys):
    rows = [make_rollout([6], [7, 8, 9, 10] * 3, "length", 0), make_rollout([6], [7, 8, EOS], "stop", 0)]
    args = TokenArguments(*write(tmp_path, rows), min_count=2, contexts=1, output_dir=str(tmp_path / "o"))
    found = length_tokens.main(args)
    assert found["cut"] == 1 and found["prompts"] == 1
    shown = [row for side in ("longer", "shorter") for row in found[side]]
    assert shown and all(row["shift"]["low"] is None for row in shown)
    assert "of which there is one, so none" in " ".join(capsys.readouterr().out.split())
    json.loads((tmp_path / "o" / "length_tokens.json").read_text())


def test_completions_that_were_cut_at_the_cap_are_marked(drawn, tmp_path):
    def one(prompt, ids, finished):
        return Completion("base", prompt, 0, None, None, ids, finished, 0, [1.0] * len(ids))

    cell = [one(0, [5, 6, EOS], True), one(1, [5] * 6, False), one(2, [EOS], True)]
    row = {"arm": "base", "mode": "equal_to", "target": 4, "language": "all"}
    rows = [row | summarise_cell(cell, [4] * 3, "equal_to")]
    plot_length_control(rows, {("base", "equal_to", 4): cell}, tmp_path / "c.png")
    figure, _ = drawn[0]
    assert "cut at the cap" in texts_of(figure)
    hollow = [each for each in figure.axes[1].collections if len(each.get_facecolor()) == 0]
    assert [each.get_offsets()[:, 1].tolist() for each in hollow] == [[6.0]]
    drawn.clear()
    ended = [cell[0], cell[2]]
    plot_length_control(rows, {("base", "equal_to", 4): ended}, tmp_path / "c.png")
    assert "cut at the cap" not in texts_of(drawn[0][0])


def test_a_cell_of_one_prompt_and_of_nothing_but_empty_texts():
    cell = [Completion("guided", 0, 0, "at_most", 4, [EOS], True, 0, [2.0])]
    row = summarise_cell(cell, [4], "at_most")
    assert row["length_score"] == {"estimate": 100.0, "low": None, "high": None}
    assert row["perplexity"] is None and row["end_nll"]["estimate"] == 2.0
