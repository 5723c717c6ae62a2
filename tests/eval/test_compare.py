"""Training curves compared: criteria by hand, how settings are chosen, variants, records, and what is reported."""

import json
import math
import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState, set_seed

from eval.compare import __main__ as program
from eval.compare import plan, samples, training
from eval.compare.arms import ARMS, BY_NAME, LENVM, LENVM_95, TASK_ONLY
from eval.compare.measures import Judged, answers_to_break_even, area_between, judge_curve, rollouts_until, tokens_until
from eval.compare.plan import CELLS, CHOICE_SEEDS, Run, TrainingCell, chosen_settings, few_arms, open_runs
from eval.compare.records import Records
from eval.compare.report import (
    break_even,
    make_report,
    median_and_range,
    paired_ratio,
    print_cells,
    reached_text,
    write_comparison,
)
from eval.compare.samples import decoding_arms, sample_answers
from eval.compare.training import World, train_run
from eval.compare.variants import wasted_tokens
from lenvm_rl.files import write_json
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.sandbox import PolicySettings, fit_policy, sandbox_tokenizer

START = {"accuracy": 0.9, "tokens": 30.0, "excess": 10.0}


def curve(*points):
    """Evaluations every 100 rollouts: (accuracy, excess), the tokens 20 more than that."""
    return [
        {"rollouts": 100 * number, "accuracy": accuracy, "tokens": 20 + excess, "excess": excess}
        for number, (accuracy, excess) in enumerate(points, start=1)
    ]


class TestMeasures:
    def test_rollouts_until_waste_is_gone_by_hand(self):
        falling = curve((0.9, 6), (0.95, 2), (0.95, 0.5))
        # 10, 6, 2, 0.5: five is passed a quarter of the way from 6 to 2; one two thirds of the way from 2 to 0.5.
        assert rollouts_until(falling, START, 0.5) == pytest.approx(125)
        assert rollouts_until(falling, START, 0.9) == pytest.approx(200 + 100 * 2 / 3)
        assert rollouts_until(falling, START, 0.99) is None

    def test_waste_that_goes_with_accuracy_does_not_count(self):
        # 0.889 is more than 0.01 below 0.9; it counts when it is back, and not from before.
        lost = curve((0.889, 2), (0.89, 2), (0.7, 0))
        assert rollouts_until(lost, START, 0.5) == 200
        assert rollouts_until(curve((0.889, 2)), START, 0.5) is None

    def test_nothing_is_gone_while_accuracy_is_lost_so_half_goes_no_later_than_most(self):
        # At 100 less than half is left and accuracy is lost: neither target is reached before it is back, at 200.
        back = curve((0.8, 3), (0.95, 0.5))
        assert rollouts_until(back, START, 0.5) == rollouts_until(back, START, 0.9) == 200
        # Nor where waste was above the target while accuracy was lost.
        assert rollouts_until(curve((0.8, 6), (0.95, 2)), START, 0.5) == 200
        levels = [(accuracy, excess) for accuracy in (0.8, 0.95) for excess in (6, 3, 0.5)]
        for first in levels:
            for second in levels:
                half, most = (rollouts_until(curve(first, second), START, gone) for gone in (0.5, 0.9))
                assert most is None or half <= most

    def test_judging_a_curve(self):
        judged = judge_curve(curve((0.8, 8), (0.9, 5), (0.96, 2), (0.99, 0.5)), START)
        assert judged.until_half == 200 and judged.until_most == pytest.approx(300 + 100 / 1.5)
        assert judged.end_accuracy == pytest.approx(0.95) and judged.end_excess == pytest.approx(2.5)
        assert judged.end_tokens == pytest.approx(22.5) and judged.kept
        # 0.8 is below nine tenths of 0.9.
        assert judged.unsafe and not judge_curve(curve((0.81, 8)), START).unsafe

    def test_tokens_and_break_even(self):
        falling = curve((0.9, 0))
        # From 30 to 20 tokens in 100 rollouts: 25 on average, and 27.5 in the first half.
        assert tokens_until(falling, START, 100) == pytest.approx(2500)
        assert tokens_until(falling, START, 50) == pytest.approx(1375)
        assert tokens_until(falling, START, 1000) == pytest.approx(2500)
        assert answers_to_break_even(1000, 30, 20) == 100 and answers_to_break_even(1000, 30, 30) is None

    def test_area_between_by_hand(self):
        rising, flat = [(20, 1.0), (10, 0.8)], [(15, 0.6), (30, 0.6)]
        # From 15 to 20 tokens: 0.9 to 1.0 beside 0.6.
        assert area_between(rising, flat) == pytest.approx(0.35)
        assert area_between(flat, rising) == pytest.approx(-0.35)
        # A corner between: 0.5 above it at 10, 0 at 14 and 0 at 20, a triangle of 1 over a range of 10.
        assert area_between([(10, 1.0), (20, 1.0)], [(0, 0.5), (10, 0.5), (14, 1.0), (20, 1.0)]) == pytest.approx(0.1)
        # Two evaluations of the same length count as their mean: 0.9 to 1.0 beside 0.6 on all of 10 to 20.
        assert area_between([(20, 1.0), (10, 0.8), (10, 1.0)], [(0, 0.6), (40, 0.6)]) == pytest.approx(0.35)
        assert area_between(rising, [(20, 0.5), (30, 0.5)]) is None


def judged(until=None, accuracy=0.95, excess=1.0, unsafe=False, kept=True):
    return Judged(until, until, accuracy, 20.0, excess, kept, unsafe)


CELL = TrainingCell(16, 2, 10, (1.0, 2.0, 3.0), choices=2, every_arm=True)


def play(cells, found, outcome, seeds=(0, 1), arms=None):
    """Runs as the plan asks for them, judged by `outcome`, until there are none."""
    order = []
    while waiting := list(open_runs(cells, found, seeds, arms)):
        assert len(set(waiting)) == len(waiting) and not set(waiting) & set(found)
        order.append(waiting[0])
        found[waiting[0]] = outcome(waiting[0])
    return order


class TestPlan:
    def test_rates_first_then_strengths_then_reported_seeds(self):
        # The best rate is 2, the best strength the last one.
        def outcome(run):
            return judged(until=100 * abs(run.learning_rate - 2) + (50 - run.strength))

        order = play([CELL], {}, outcome, arms=["linear"])
        rates, strengths, reported = order[:6], order[6:10], order[10:]
        low, middle, high = BY_NAME["linear"].strengths
        assert [(r.learning_rate, r.strength) for r in rates] == [(r, middle) for r in (1, 2, 3) for _ in range(2)]
        assert {(r.learning_rate, r.strength) for r in strengths} == {(2, low), (2, high)}
        assert {r.seed for r in rates + strengths} == set(CHOICE_SEEDS)
        assert [(r.learning_rate, r.strength, r.seed) for r in reported] == [(2, high, 0), (2, high, 1)]

    def test_the_order_of_settings(self):
        def best(first, second):
            """Which of two rates is chosen, from what each of its two seeds came to; the third is hopeless."""
            cell, arm = replace(CELL, learning_rates=(1.0, 2.0, 3.0)), BY_NAME[TASK_ONLY]
            hopeless = (judged(unsafe=True), judged(unsafe=True))
            found = {
                Run(cell, arm.name, rate, None, seed): one
                for rate, each in ((1.0, first), (2.0, second), (3.0, hopeless))
                for seed, one in zip(CHOICE_SEEDS, each, strict=True)
            }
            return chosen_settings(cell, arm, found)[0]

        slow, fast, never = judged(900.0), judged(100.0), judged(None, excess=5.0)
        assert best((slow, slow), (fast, replace(fast, unsafe=True))) == 1.0
        assert best((slow, slow), (fast, replace(fast, kept=False))) == 1.0
        assert best((slow, slow), (slow, fast)) == 2.0
        assert best((never, never), (never, replace(never, end_excess=2.0))) == 2.0
        # One that is never there counts as infinitely late; among equals the first.
        assert best((slow, slow), (fast, never)) == 1.0
        assert best((slow, fast), (fast, slow)) == 1.0

    def test_nothing_is_chosen_before_all_trials_are_judged(self):
        found = {}
        for run in open_runs([CELL], {}, (0,), [LENVM]):
            assert chosen_settings(CELL, BY_NAME[LENVM], found) is None
            found[run] = judged(100.0)
        assert chosen_settings(CELL, BY_NAME[LENVM], found) is None

    def test_controls_take_the_settings_of_their_original_and_are_not_tried(self):
        order = play([CELL], {}, lambda run: judged(run.learning_rate), arms=[LENVM, "constant V"])
        controls = [run for run in order if run.arm == "constant V"]
        reported = [run for run in order if run.arm == LENVM and run.seed not in CHOICE_SEEDS]
        assert [(r.learning_rate, r.strength, r.seed) for r in controls] == [
            (r.learning_rate, r.strength, r.seed) for r in reported
        ]
        # Named without their original, they have its trials run, and no more of it.
        order = play([CELL], {}, lambda run: judged(run.learning_rate), arms=["constant V"])
        assert {run.arm for run in order if run.seed in CHOICE_SEEDS} == {LENVM}
        assert {(run.arm, run.seed) for run in order if run.seed not in CHOICE_SEEDS} == {
            ("constant V", 0),
            ("constant V", 1),
        }

    def test_other_cells_run_the_best_penalties_of_the_first(self):
        other = replace(CELL, completions=64, every_arm=False)
        speed = {"GR3": 10.0, "Arora": 20.0}

        found = {}
        order = play([CELL, other], found, lambda run: judged(speed.get(run.arm, 500.0)))
        assert few_arms([CELL, other], found, (0, 1)) == [TASK_ONLY, LENVM, LENVM_95, "GR3", "Arora"]
        assert {run.arm for run in order if run.cell == other} == {TASK_ONLY, LENVM, LENVM_95, "GR3", "Arora"}
        # A cell by itself does without the first one's penalties, and runs the arms that are named.
        alone = play([other], {}, lambda run: judged(100.0))
        assert {run.arm for run in alone} == {TASK_ONLY, LENVM, LENVM_95}
        assert {run.arm for run in play([other], {}, lambda run: judged(100.0), arms=["linear"])} == {"linear"}
        # Of single completions the best are among those that serve them.
        single = [replace(CELL, group_size=1), replace(other, group_size=1)]
        order = play(single, {}, lambda run: judged(speed.get(run.arm, {"cosine": 30.0}.get(run.arm, 500.0))))
        penalties = {run.arm for run in order if run.cell == single[1] and BY_NAME[run.arm].kind == "penalty"}
        assert "cosine" in penalties and len(penalties) == 2
        # Single completions have no arm that compares those of a prompt, and alone have the model as the only critic.
        assert not BY_NAME["GR3"].serves(1) and BY_NAME["LenVM as only critic"].serves(1)
        assert not BY_NAME["LenVM as only critic"].serves(2)
        # Other critics run where they are named, at the settings of the usual one.
        assert "SAO" not in {run.arm for run in order}
        named = play(single[:1], {}, lambda run: judged(100.0), arms=["SAO"])
        assert {run.arm for run in named} == {"SAO", LENVM}
        assert {run.seed for run in named if run.arm == LENVM} == set(CHOICE_SEEDS[: single[0].choices])

    def test_names_of_runs_and_cells_are_unique(self):
        assert len({cell.name for cell in CELLS}) == len(CELLS)
        runs = [
            Run(cell, arm.name, rate, strength, seed)
            for cell in CELLS
            for arm in ARMS
            for rate in cell.learning_rates
            for strength in arm.tried(cell.group_size) or (None,)
            for seed in (0, 1)
        ]
        # A budget of other steps has other runs: were a record taken for theirs, they would be waited for for ever.
        runs += [replace(run, cell=replace(run.cell, steps=run.cell.steps + 1)) for run in runs]
        assert len({run.name for run in runs}) == len(runs)
        assert len({arm.name for arm in ARMS}) == len(ARMS) >= 20


def hold(folder, run, claimed, release):
    with Records(folder).claim(run) as mine:
        claimed.put(mine)
        release.get()


RUN = Run(CELLS[0], LENVM, 2e-4, 1.5, 0)


class TestRecords:
    def test_a_run_is_claimed_by_one_process_until_it_ends(self, tmp_path):
        context = multiprocessing.get_context("fork")
        claimed, release = context.Queue(), context.Queue()
        other = context.Process(target=hold, args=(tmp_path, RUN, claimed, release))
        other.start()
        assert claimed.get(timeout=30)
        records = Records(tmp_path)
        with records.claim(RUN) as mine, records.claim(replace(RUN, seed=1)) as another:
            assert not mine and another
        other.kill()
        other.join()
        with records.claim(RUN) as mine:
            assert mine

    def test_what_has_a_record_is_not_claimed_and_is_read_back_as_the_same_run(self, tmp_path):
        records = Records(tmp_path)
        world = FakeWorld()
        records.keep(RUN, curve((0.95, 2), (0.95, 0.5)), world, 3.0)
        with records.claim(RUN) as mine:
            assert not mine
        again = Records(tmp_path)
        assert list(again.judged()) == [RUN]
        assert again.judged()[RUN].until_most == pytest.approx(100 + 100 / 1.5)
        assert again.collected()["worlds"] == {"f": world.described()}

    def test_records_of_another_policy_are_refused(self, tmp_path):
        records = Records(tmp_path)
        records.keep(RUN, curve((0.95, 2), (0.95, 0.5)), FakeWorld(), 3.0)
        given = program.CompareArguments(run_dirs=[str(tmp_path)], cells=[CELLS[0].name], output_dir=str(tmp_path))
        with pytest.raises(ValueError, match="output_dir"):
            program.run_open(given, records, SimpleNamespace(of=lambda seed: SimpleNamespace(fingerprint="g")))


class FakeWorld:
    fingerprint, start = "f", START

    def described(self):
        return {
            "start": START,
            "floors": {"1": 2.0},
            "frontier": {"tokens": [0.0, 20.0, 40.0], "accuracy": [0.0, 0.9, 1.0]},
            "pretraining": {"rollouts": 10, "tokens": 300.0, "epochs": 3.0},
        }


def collected_from(tmp_path, curves, seeds=(0, 1)):
    """Records of all runs that the plan asks for in the first cell, each arm with its own curve."""
    records, cell, world = Records(tmp_path), CELLS[0], FakeWorld()
    while waiting := list(open_runs([cell], records.judged(), seeds, list(curves))):
        for run in waiting:
            records.keep(run, curves[run.arm], world, 1.0)
    return records.collected()


class TestReport:
    CURVES = {
        TASK_ONLY: curve((0.95, 9), (0.95, 8), (0.95, 8)),
        LENVM: curve((0.95, 2), (0.97, 0.5), (0.97, 0.5)),
        "linear": curve((0.95, 6), (0.95, 4), (0.7, 0.5)),
    }

    def test_a_report_of_made_up_curves(self, tmp_path, capsys):
        collected = collected_from(tmp_path, self.CURVES)
        report = make_report(collected)
        [cell] = report["cells"]
        assert report["world"]["base_tokens"]["estimate"] == 30 and report["world"]["policies"] == 1
        # 30 tokens, where 2 would do.
        assert report["world"]["times_floor"]["estimate"] == 15
        assert [arm["name"] for arm in cell["arms"]] == [TASK_ONLY, LENVM, "linear"]
        task, ours, linear = cell["arms"]
        assert ours["rollouts"] == [0.0, 100, 200, 300] and ours["excess"]["mean"] == [10, 2, 0.5, 0.5]
        assert ours["until_most"]["median"] == pytest.approx(100 + 100 / 1.5) and ours["seeds"] == 2
        assert ours["times_lenvm"]["median"] == 1 and linear["times_lenvm"]["median"] is None
        assert (task["unsafe"], ours["unsafe"], linear["unsafe"]) == (0, 0, 1)
        # 21 tokens at 0.9633 beside a frontier of 0.905 there.
        assert ours["frontier_gap"]["estimate"] == pytest.approx(0.905 - 2.89 / 3)
        from rich.console import Console

        print_cells(report, Console(width=200))
        printed = capsys.readouterr().out
        assert "never" in printed and "LenVM, lambda 1" in printed
        write_comparison(report, collected, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "compare.json").read_text()) == collected
        assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000 and (
            tmp_path / "out" / "compare.html"
        ).exists()
        # A comparison is drawn anew from its records.
        again = program.main(
            program.CompareArguments(report=str(tmp_path / "out" / "compare.json"), output_dir=str(tmp_path / "o"))
        )
        assert again == report

    def test_training_beside_tilted_decoding_of_its_own_policy(self, tmp_path):
        def point(kind, tokens, accuracy, policy="f"):
            entries = {"tokens": {"estimate": tokens}, "accuracy": {"estimate": accuracy}}
            return {"policy": policy, "name": kind, "kind": kind, **entries}

        # Ours is at .9, .95 and .97 (twice) with 30, 22 and 20.5 tokens, tilted answers at .7 from 20 to 30.
        decoding = [point("base", 30.0, 0.7), point("tilt", 20.0, 0.7), point("tilt", 20.0, 0.0, "another")]
        collected = collected_from(tmp_path, self.CURVES) | {"decoding": decoding}
        report = make_report(collected)
        found = {arm["name"]: arm for arm in report["cells"][0]["arms"]}[LENVM]
        area = 8 * 0.225 + 1.5 * 0.26
        assert found["over_tilt"]["estimate"] == pytest.approx(area / 9.5)
        assert found["over_task_tilt"]["estimate"] is None
        assert report["decoding"] == decoding[:2]

    def test_what_training_costs(self):
        arm, cell, world = BY_NAME[LENVM], CELLS[0], FakeWorld().described()
        found = judge_curve(self.CURVES[LENVM], START)
        # 30 to 22 tokens over 100 rollouts, then two thirds of the way to 20.5: 2600 + 66.7 * 21.5 tokens, each with a
        # sampling, three of learning and a reading; 300 tokens of pretraining with a sampling and three epochs.
        forwards = (2600 + 100 / 1.5 * 21.5) * 5 + 300 * 10
        assert break_even(arm, cell, found, self.CURVES[LENVM], world) == pytest.approx(forwards / (30 - 21))
        without = break_even(BY_NAME["linear"], cell, found, self.CURVES[LENVM], world)
        assert without == pytest.approx((2600 + 100 / 1.5 * 21.5) * 4 / 9)
        with_critic = break_even(BY_NAME["linear"], replace(cell, group_size=1), found, self.CURVES[LENVM], world)
        assert with_critic == pytest.approx(2 * without)
        assert break_even(arm, cell, replace(found, until_most=None), self.CURVES[LENVM], world) is None

    def test_medians_and_ratios_of_what_is_never_reached(self):
        assert median_and_range([1.0, None, 3.0])["median"] == 3.0
        assert median_and_range([1.0, 2.0, 4.0, None])["median"] == 3.0
        found = median_and_range([1.0, None])
        assert found["median"] is None and found["low"] == 1.0 and found["missed"] == 1

        def arm(seeds, *each):
            return {"seeds_run": seeds, "until_most": {"each": list(each)}}

        ours = arm([0, 1, 2], 10.0, None, 30.0)
        ratio = paired_ratio(ours, arm([0, 1, 2], 5.0, 5.0, None))
        # 10 / 5; never, where the reference is there; there, where the reference is not.
        assert ratio == dict(median=2.0, low=0.0, high=None, missed=1)
        neither = paired_ratio(arm([0, 1], 4.0, None), arm([0, 1], 2.0, None))
        assert neither == dict(median=2.0, low=2.0, high=2.0, missed=0)
        # Only seeds that both have are compared.
        assert paired_ratio(ours, arm([2, 7, 8], 15.0, 1.0, 1.0)) == dict(median=2.0, low=2.0, high=2.0, missed=0)
        assert paired_ratio(ours, arm([7], 1.0)) is None and paired_ratio(ours, None) is None
        assert reached_text(found) == "never [1, never]" and reached_text(None) == "–"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    settings = PolicySettings(hidden_size=16, num_heads=2, train_tokens=20_000)
    policy = fit_policy(str(folder / "policy"), settings, use_cpu=True, disable_tqdm=True)
    for name in ("length_value_model", "stale"):
        model = LengthValueModel.from_backbone(policy.model, gamma=0.9, tokenizer=sandbox_tokenizer())
        model.config.gamma_fit = {"completions": 4, "mean": 10.0}
        model.save_pretrained(folder / name)
    write_json(folder / "length_value_model.stage.json", {"finished": True, "settings": {"pretrain_epochs": 3.0}})
    return World(str(folder))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(training, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(training, "PROMPTS", 4)
    monkeypatch.setattr(training, "EVALUATIONS", 2)


TINY = {size: TrainingCell(8, size, 2, (1e-3,), choices=1) for size in (1, 2)}
VARIED = [arm.name for arm in ARMS if arm.variant is not None or arm.values == "stale"]


@pytest.mark.parametrize("name", [TASK_ONLY, LENVM, "Kimi k1.5", "soft overlong", *VARIED])
def test_every_kind_of_arm_trains(name, world, small, monkeypatch):
    monkeypatch.setattr(World, "frontier", FakeFrontier())
    run = Run(TINY[2], name, 1e-3, 0.5 if BY_NAME[name].coefficient or BY_NAME[name].strengths else None, 3)
    if name == "soft overlong":
        run = replace(run, strength=8)
    points = train_run(run, world)
    assert [point["rollouts"] for point in points] == [8, 16]
    assert all(math.isfinite(value) for point in points for value in point.values())


CRITICS = [arm.name for arm in ARMS if arm.kind == "critic"]


@pytest.mark.parametrize("name", [TASK_ONLY, LENVM, "LenVM as only critic", "linear", "oracle: waste alone", *CRITICS])
def test_single_completions_train_by_ppo(name, world, small, monkeypatch):
    monkeypatch.setattr(World, "frontier", FakeFrontier())
    run = Run(TINY[1], name, 1e-3, 0.5 if BY_NAME[name].strengths else None, 3)
    assert len(train_run(run, world)) == 2


def test_a_critics_explained_variance_is_part_of_the_curve(monkeypatch):
    """The mean over the steps since the point before, of logs that come after a step's end."""
    monkeypatch.setattr(World, "evaluate", lambda self, policy: dict(START))
    curve = training.CurveCallback(World("unused"), Run(TrainingCell(8, 1, 20, (1e-3,), 1), "SAO", 1e-3, 6.0, 0))
    for step, explained in enumerate([0.25, 0.75, None, 0.5, None, None], 1):
        state = TrainerState(global_step=step)
        curve.on_step_end(None, state, None, model=None)
        curve.on_log(None, state, None, logs={"loss": 0.0, "critic/explained_variance": explained})
    curve.on_log(None, state, None, logs={"train_runtime": 1.0})
    assert [(point["rollouts"], point.get("critic_explained")) for point in curve.points] == [
        (16, 0.5), (32, 0.5), (48, None),
    ]  # fmt: skip
    explained = [0.75, 0.0, 0.25, 0.5]
    found = judge_curve([START, *({"critic_explained": value, **START} for value in explained)], START)
    assert (found.critic_explained, found.end_critic_explained) == (0.375, 0.25)
    assert judge_curve([START, START], START).critic_explained is None


class FakeFrontier:
    floors = {1: 2, 3: 11, 5: 17, 7: 23}


def test_an_evaluation_disturbs_nothing(world, small, monkeypatch):
    monkeypatch.setattr(World, "frontier", FakeFrontier())
    run = Run(TINY[2], LENVM, 1e-3, 1.5, 3)

    def weights():
        kept = {}

        class Kept(training.CurveCallback):
            def on_train_end(self, args, state, control, model=None, **further):
                kept.update({name: weight.clone() for name, weight in model.state_dict().items()})

        monkeypatch.setattr(training, "CurveCallback", Kept)
        train_run(run, world)
        return kept

    with_evaluations = weights()
    monkeypatch.setattr(World, "evaluate", lambda self, policy: dict(START))
    without = weights()
    assert all(torch.equal(with_evaluations[name], without[name]) for name in without)


def test_answers_side_by_side(world, small, monkeypatch):
    """Of a run's policies to a prompt of each difficulty: what is said to be waste has a token each."""
    monkeypatch.setattr(samples, "value_scale", lambda *given: 1.0)
    write_json(f"{world.folder}/run.json", {"trained": {"ours": "policy"}})
    shown = sample_answers(world)
    assert len(shown) == 4 and {row["name"] for row in shown[0]["rows"]} == {"base", "tilt +0.5", "ours"}
    assert all(len(row["waste"]) == len(row["text"].split()) for one in shown for row in one["rows"])
    # The same policy under another name, from the same seed.
    assert all(one["rows"][0]["text"] == one["rows"][2]["text"] for one in shown)
    assert decoding_arms(world) == []


def test_decoding_of_what_was_not_trained_for_length(world):
    point = {"tokens": {"estimate": 20.0}, "accuracy": {"estimate": 0.9}, "excess_tokens": None}
    kinds = {"base": "base", "cut at 9": "truncation", "tilt +1": "tilt", "ppo": "trained", "task_only": "trained"}
    arms = [{"name": name, "kind": kind, **point} for name, kind in kinds.items()]
    arms.append({"name": "task_only tilt +1", "kind": "tilt of task_only", **point})
    write_json(f"{world.folder}/tradeoff/tradeoff.json", {"arms": arms})
    found = decoding_arms(world)
    assert [one["kind"] for one in found] == ["base", "truncation", "tilt", *["tilt of task_only"] * 2]
    assert all(one["policy"] == world.fingerprint and "excess_tokens" not in one for one in found)


@pytest.mark.parametrize("size", [1, 2])
def test_the_oracle_charges_waste_of_correct_completions_and_nothing_else(size, world, small, monkeypatch, tmp_path):
    monkeypatch.setattr(World, "frontier", FakeFrontier())
    run = Run(TINY[size], "oracle: waste alone", 1e-3, 0.25, 3)
    trainer = training.trainer_of(run, world, str(tmp_path / "o"))
    plain = training.trainer_of(replace(run, arm=TASK_ONLY, strength=None), world, str(tmp_path / "t"))
    batches = []
    for each in (trainer, plain):
        monkeypatch.setattr(each, "_calculate_rewards", lambda inputs, *given: torch.ones(8, 1))
        each._raw_rewards = torch.ones(8, 1)
        set_seed(5)
        each.model.train()
        batches.append(each._generate_and_score_completions([{"prompt": "3 c +2 ?", "answer": "5"}] * 8))
    charged, task = (batch["advantages"] for batch in batches)
    waste = wasted_tokens(batches[0]["completion_ids"], batches[0]["completion_mask"].bool())
    task = task if task.dim() == 2 else task.unsqueeze(1) * batches[1]["completion_mask"]
    assert waste.any()
    torch.testing.assert_close(charged, task - 0.25 * waste)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="cells"):
        program.CompareArguments(run_dirs=["a"], cells=["3 x 3"])
    with pytest.raises(ValueError, match="arms"):
        program.CompareArguments(run_dirs=["a"], arms=["Linear"])
    with pytest.raises(ValueError, match="run_dirs"):
        program.CompareArguments()


def test_cells_are_whole_groups_of_whole_difficulties():
    for cell in plan.CELLS:
        assert cell.completions % cell.group_size == 0 and cell.completions // cell.group_size % 2 == 0
