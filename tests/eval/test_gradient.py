"""The policy gradient under every way to price length: estimators by hand, and a bandit whose law is exact."""

import csv
import itertools
import json
import math

import pytest
import torch
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer

from eval.gradient.__main__ import GradientArguments, complete, main
from eval.gradient.estimators import (
    LENGTH_GRADIENT,
    LENVM_GRADIENT,
    NEEDED,
    OF_CORRECT,
    SEQUENCE,
    TASK_GRADIENT,
    GradedBatch,
    LengthValues,
    borrowed_values,
    constant_values,
    estimators,
    pass_rate_of_others,
    rescaled_values,
)
from eval.gradient.gradients import (
    GradientStatistics,
    TokenBatch,
    batch_gradients,
    explained_variance,
    inner_products,
    length_values,
    select_parameters,
)
from lenvm_rl.advantages import gae
from lenvm_rl.sandbox import distinct_problems
from lenvm_rl.sandbox.scripted import EOS, START, ScriptedLengthValue, ScriptedPolicy, TokenChain

GAMMA, GO = 0.5, 3


def named(**options):
    """The table of estimators: what each name computes."""
    return {each.name: each.advantages for each in estimators(options.get("group_size", 2), options.get("others", ()))}


def statistics_of(gradients):
    return GradientStatistics(inner_products(gradients))


def graded(lengths, correct, group_size, values=None, finished=None):
    """Completions of these lengths, V = -1/2 everywhere unless `values` `(N, T + 1)` says otherwise."""
    rows = [[GO] * (length - 1) + [EOS] for length in lengths]
    batch = TokenBatch.from_rows([[START]] * len(rows), rows, finished or [True] * len(rows), [EOS])
    if values is None:
        values = torch.full((len(rows), max(lengths) + 1), -0.5)
    return GradedBatch(
        completions=batch.completions,
        correct=torch.tensor(correct, dtype=torch.float64),
        group_size=group_size,
        max_length=10,
        length=LengthValues(values.double(), GAMMA),
    )


class TestEstimators:
    # Groups (1, 3) and (2, 2) tokens; returns at gamma 1/2: one token -1/2, two -3/4, three -7/8.
    LENGTHS, CORRECT = [1, 3, 2, 2], [1, 0, 1, 1]

    def batch(self, **options):
        return graded(self.LENGTHS, self.CORRECT, 2, **options)

    def check(self, name, expected, batch=None, **options):
        found = named(**options)[name](self.batch() if batch is None else batch)
        mask = (batch or self.batch()).completions.mask
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found, torch.where(mask, expected, 0.0), atol=2e-7, rtol=0)

    @pytest.mark.parametrize(
        ("name", "per_completion"),
        [
            (TASK_GRADIENT, [0.5, -0.5, 0, 0]),
            ("length penalty", [1, -1, 0, 0]),
            ("length penalty / std", [1 / (math.sqrt(2) + 1e-4), -1 / (math.sqrt(2) + 1e-4), 0, 0]),
            ("length return of the whole", [3 / 16, -3 / 16, 0, 0]),
            # A pass rate of 1/2: half of the length penalty.
            ("ALP penalty", [0.5, -0.5, 0, 0]),
            # The best length is 1, that of the correct one.
            ("ShorterBetter penalty", [1, -1, 0, 0]),
            # +0.5 for the shortest, which is correct; -0.5 for the longest, which is wrong; equal lengths get 0.
            ("Kimi k1.5 penalty", [0.5, -0.5, 0, 0]),
            ("Kimi k1.5 penalty, if correct", [0.25, -0.25, 0, 0]),
            # -C L / 10: -0.1 and 0 in the first group, -0.2 twice in the second.
            ("linear penalty, if correct", [-0.05, 0.05, 0, 0]),
            # sigmoid(0) = 1/2, as the only correct one and as those of equal lengths.
            ("Arora penalty, if correct", [-0.25, 0.25, 0, 0]),
            # 1 / (1 + 0.33 * 1/2) - 1 = -0.1416 and 0; the same twice.
            ("GR3 penalty, if correct", [-0.165 / 2.33, 0.165 / 2.33, 0, 0]),
            # -1/2 * 1/3 for the only correct one of the first group; -1 twice in the second.
            ("pass-rate penalty, if correct", [-1 / 12, 1 / 12, 0, 0]),
        ],
    )
    def test_what_a_whole_completion_gets(self, name, per_completion):
        self.check(name, [[number] * 3 for number in per_completion])

    def test_returns_with_and_without_baselines(self):
        returns = [[-0.5, 0, 0], [-0.875, -0.75, -0.5], [-0.75, -0.5, 0], [-0.75, -0.5, 0]]
        self.check(LENGTH_GRADIENT, returns)
        self.check("group baseline per sequence", [
            [0.1875, 0, 0], [-0.1875, -0.0625, 0.1875], [0, 0.25, 0], [0, 0.25, 0],
        ])  # fmt: skip
        # At t = 0 the mean of the first group is -11/16; after that one completion runs, and is its own mean.
        self.check("group baseline per position", [[0.1875, 0, 0], [-0.1875, 0, 0], [0, 0, 0], [0, 0, 0]])

    def test_the_model_as_a_baseline_and_its_gates(self):
        plain = [[0, 0, 0], [-0.375, -0.25, 0], [-0.25, 0, 0], [-0.25, 0, 0]]
        self.check(LENVM_GRADIENT, plain)
        self.check("LenVM, if correct", [[0] * 3, [0] * 3, *plain[2:]])
        self.check("LenVM x pass rate", [[0] * 3, [-0.1875, -0.125, 0], *plain[2:]])
        self.check("LenVM x pass rate of the others", [[0] * 3, *plain[1:]])
        # delta_t = -1/2 + V(s_{t+1}) / 2 - V(s_t): -1/4 before a token, 0 at the last one.
        self.check("LenVM, lambda 0", [[0, 0, 0], [-0.25, -0.25, 0], [-0.25, 0, 0], [-0.25, 0, 0]])
        for lam in (0.95, 0.9, 0.0):
            batch = self.batch()
            values = batch.length.states[:, :-1]
            expected = gae(torch.full_like(values, -0.5), values, batch.completions.mask, GAMMA, lam)
            torch.testing.assert_close(named()[f"LenVM, lambda {lam:g}"](batch), expected)
        # Of the first group's correct completion nothing is left, as it has no other; the rest is -p D_t, p = 1.
        self.check("LenVM, if correct, centred", [
            [0, 0, 0], [0, 0.25, 0.375], [0, 0.25, 0], [0, 0.25, 0],
        ])  # fmt: skip

    def test_a_model_of_correct_completions_has_its_own_values_and_discount(self):
        batch = self.batch()
        of_correct = LengthValues(torch.full((4, 4), -0.25).double(), 0.75)
        batch = GradedBatch(**{**vars(batch), "others": {OF_CORRECT: of_correct, "small": of_correct}})
        # -(1 - 3/4) for one token and -(1 - 9/16) for two, less V.
        expected = [[0, 0, 0], [0, 0, 0], [-0.1875, 0, 0], [-0.1875, 0, 0]]
        self.check("LenVM of correct ones, if correct", expected, batch, others=(OF_CORRECT,))
        # Ungated for any other model: -(1 - 27/64) + 1/4 for the wrong one's three tokens.
        expected[1] = [-21 / 64, -0.1875, 0]
        self.check("LenVM small, lambda 1", expected, batch, others=("small",))

    def test_values_of_controls(self):
        values = torch.tensor([[-0.1, 0, 0, 0], [-0.3, -0.5, -0.7, 0], [-0.2, -0.4, 0, 0], [-0.6, -0.8, 0, 0]])
        batch = self.batch(values=values)
        # The mean over the eight tokens: -3.6 / 8; the state after a token is no token of the batch.
        mean = constant_values(batch).states
        torch.testing.assert_close(mean, torch.full_like(mean, -0.45), atol=1e-7, rtol=0)
        # Each takes those of the group's other one, held at its last token: one token has one value for all places.
        borrowed = borrowed_values(batch).states
        torch.testing.assert_close(borrowed.float(), torch.tensor(
            [[-0.3, -0.5, -0.7, -0.7], [-0.1] * 4, [-0.6, -0.8, -0.8, -0.8], [-0.2, -0.4, -0.4, -0.4]]
        ))  # fmt: skip

    def test_a_model_is_rescaled_by_its_regression_on_the_batch(self):
        # Returns are 2 V + 0.3 in every finished completion: nothing is left of them. The cut one does not count.
        returns = graded([1, 3, 2, 2], [1] * 4, 2).returns
        values = torch.cat([(returns - 0.3) / 2, torch.zeros(4, 1)], dim=1)
        values[3] = 0.7
        batch = graded([1, 3, 2, 2], [1] * 4, 2, values=values, finished=[True, True, True, False])
        torch.testing.assert_close(rescaled_values(batch).states, 2 * values.double() + 0.3, atol=1e-6, rtol=0)
        assert named()["LenVM rescaled, lambda 1"](batch)[:3].abs().max() < 1e-6
        # A V that says nothing becomes the mean return: -5.125 over eight tokens.
        flat = rescaled_values(self.batch()).states
        torch.testing.assert_close(flat, torch.full_like(flat, -0.640625), atol=1e-6, rtol=0)
        cut = graded([2, 2], [1, 1], 2, finished=[False, False])
        assert rescaled_values(cut) is cut.length

    def test_completions_of_one_prompt_each_have_the_batch_for_a_baseline(self):
        alone = graded(self.LENGTHS, self.CORRECT, 1)
        whole = graded(self.LENGTHS, self.CORRECT, 4)
        one, four = named(group_size=1), named(group_size=4)
        for name in ("length penalty", "length penalty / std", "linear penalty, if correct", TASK_GRADIENT,
                     "length return of the whole", "group baseline per position", LENVM_GRADIENT):  # fmt: skip
            torch.testing.assert_close(one[name](alone), four[name](whole))
        # Mean 2 of 1, 3, 2 and 2 tokens.
        torch.testing.assert_close(one["length penalty"](alone)[:, 0], torch.tensor([1.0, -1, 0, 0]).double())
        # What compares the completions of a prompt is left out, as it says nothing of length.
        for name in ("Kimi k1.5 penalty", "GR3 penalty, if correct", "LenVM x pass rate", "V of another rollout"):
            assert name in four and name not in one

    def test_a_cut_completion_goes_on_with_the_model_only(self):
        values = torch.full((2, 3), -0.5)
        values[1, 2] = -0.9
        batch = graded([2, 2], [0, 0], 2, values=values, finished=[True, False])
        assert float(named()[LENVM_GRADIENT](batch)[1, 0]) == pytest.approx(-0.75 - 0.25 * 0.9 + 0.5)
        assert float(named()[LENGTH_GRADIENT](batch)[1, 0]) == -0.75

    def test_the_pass_rate_of_the_others_does_not_know_the_completion_itself(self):
        torch.testing.assert_close(pass_rate_of_others(self.batch()), torch.tensor([0.0, 1.0, 1.0, 1.0]).double())

    def test_names_are_unique_and_padding_gets_nothing(self):
        found = estimators(2)
        assert len({each.name for each in found}) == len(found)
        kept = {each.name for each in estimators(2, pattern="Kimi")}
        assert kept == {"Kimi k1.5 penalty", "Kimi k1.5 penalty, if correct", *NEEDED}
        batch = self.batch()
        for each in found:
            advantages = each.advantages(batch)
            assert advantages.dtype == torch.float64, each.name
            assert not advantages[~batch.completions.mask].any(), each.name

    def test_explained_variance(self):
        exact = []
        for lengths in ([1, 3], [2, 4]):
            batch = graded(lengths, [1, 1], 2)
            values = torch.cat([batch.returns, torch.zeros(2, 1)], dim=1)
            exact.append(graded(lengths, [1, 1], 2, values=values))
        assert explained_variance(exact) == pytest.approx(1.0)
        assert explained_variance([graded([1, 3], [1, 1], 2)]) == pytest.approx(0.0)
        assert explained_variance([graded([1, 3], [1, 1], 2, finished=[False, False])]) is None


def bandit(chance):
    """From `START`, the end with this chance, else one more token: the first arm is one token, the second two."""
    transition = torch.zeros(4, 4, dtype=torch.float64)
    transition[START, EOS], transition[START, GO] = chance, 1 - chance
    transition[GO, EOS] = 1.0
    return TokenChain(transition)


def bandit_batch(short, count):
    """The first `short` of `count` completions take the short arm; correct are the long ones."""
    rows = [[EOS]] * short + [[GO, EOS]] * (count - short)
    return TokenBatch.from_rows([[START]] * count, rows, [True] * count, [EOS]), [0.0] * short + [1.0] * (count - short)


def bandit_gradients(chance, batches, count, names, seed=0):
    """Gradients `(E, B, D)` with respect to the policy's table, of batches that are sampled from the bandit."""
    chain = bandit(chance)
    policy, value = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, GAMMA)
    parameters = select_parameters(policy, None)
    drawn = torch.rand(batches, count, generator=torch.Generator().manual_seed(seed)) < chance
    # All that differs between batches is how many take the short arm.
    of_short = []
    for short in range(count + 1):
        batch, correct = bandit_batch(short, count)
        advantages = torch.stack([named()[name](grade(batch, correct, count, value)) for name in names])
        of_short.append(batch_gradients(policy, parameters, batch, advantages, 1.0, count, count))
    return torch.stack(of_short, dim=1)[:, drawn.sum(dim=1)].numpy()


def grade(batch, correct, group_size, value):
    values = length_values(value, batch, 64)
    return GradedBatch(batch.completions, torch.tensor(correct).double(), group_size, 4, values)


class TestBandit:
    def test_the_gradient_is_the_derivative_of_the_expected_return(self):
        # One completion of four takes the short arm, as often as its chance says: the batch is the expectation.
        chain = bandit(0.25)
        policy = ScriptedPolicy.from_chain(chain)
        parameters = select_parameters(policy, None)
        batch, correct = bandit_batch(1, 4)
        view = grade(batch, correct, 4, ScriptedLengthValue.from_chain(chain, GAMMA))
        names = [LENGTH_GRADIENT, LENVM_GRADIENT, TASK_GRADIENT]
        advantages = torch.stack([named()[name](view) for name in names])
        found = batch_gradients(policy, parameters, batch, advantages, 1.0, 4, forward_size=3)
        probabilities = policy.table.weight[START].double().softmax(dim=0)
        length = probabilities[EOS] * -0.5 + probabilities[GO] * -0.75
        expected = torch.autograd.grad(length, policy.table.weight)[0].flatten()
        # pi (1 - pi) (G_short - G_long) = 3/16 * 1/4 for the short arm, and its negative for the long one.
        assert float(expected[START * 4 + EOS]) == pytest.approx(3 / 64)
        torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(found[1], expected, atol=1e-6, rtol=0)
        # Being right takes the long arm: the same direction backwards, 3/16 long.
        torch.testing.assert_close(found[2], -4 * expected, atol=1e-6, rtol=0)

    def test_signal_to_noise_is_what_the_law_of_the_bandit_says(self):
        # With the exact V a completion's gradient is 9/16 (chance 1/4) or 1/16 of a fixed vector: mean 3/16, mean
        # square 21/256, so one completion has the ratio 9 / 12, and eight have 8 times that.
        found = statistics_of(bandit_gradients(0.25, 600, 8, [LENVM_GRADIENT, LENGTH_GRADIENT]))
        # Without baseline, -1/2 * 3/4 = -6/16 or -3/4 * -1/4 = 3/16: mean 3/64, mean square 63/1024.
        for index, exact in enumerate((8 * 9 / 12, 8 * (3 / 64) ** 2 / (63 / 1024 - (3 / 64) ** 2))):
            interval = found.snr(index)
            assert interval.low < exact < interval.high and interval.high - interval.low < 0.8 * exact, index
        assert found.cosine(0, 1).estimate == pytest.approx(1.0, abs=0.01)

    def test_the_values_of_another_rollout_are_a_mere_baseline(self):
        # Both completions of a group enumerated, with values of another policy: the expectation is that of the returns.
        chain = bandit(0.25)
        policy, wrong = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(bandit(0.9), GAMMA)
        parameters, total = select_parameters(policy, None), torch.zeros(2, 16)
        for arms in itertools.product((0.25, 0.75), repeat=2):
            rows = [[EOS] if arm == 0.25 else [GO, EOS] for arm in arms]
            batch = TokenBatch.from_rows([[START]] * 2, rows, [True, True], [EOS])
            view = grade(batch, [1.0, 1.0], 2, wrong)
            advantages = torch.stack([named()[name](view) for name in ("V of another rollout", LENGTH_GRADIENT)])
            total += arms[0] * arms[1] * batch_gradients(policy, parameters, batch, advantages, 1.0, 2, 2)
        torch.testing.assert_close(total[0], total[1], atol=1e-6, rtol=0)
        assert total.abs().max() > 1e-2

    def test_which_gates_leave_the_model_a_mere_baseline(self):
        # Both completions of a group enumerated: the expected gradient under the exact values and under wrong ones.
        chain = bandit(0.25)
        policy, exact = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, GAMMA)
        wrong = ScriptedLengthValue.from_chain(bandit(0.9), GAMMA)
        parameters, expected = select_parameters(policy, None), {}
        gates = [
            "LenVM x pass rate of the others",
            "LenVM, if correct, centred",
            "LenVM, if correct",
            "LenVM x pass rate",
        ]
        for name, value in itertools.product(gates, (exact, wrong)):
            total = torch.zeros(16)
            for arms in itertools.product((0.25, 0.75), repeat=2):
                rows = [[EOS] if arm == 0.25 else [GO, EOS] for arm in arms]
                batch = TokenBatch.from_rows([[START]] * 2, rows, [True, True], [EOS])
                view = grade(batch, [float(arm == 0.75) for arm in arms], 2, value)
                advantages = named()[name](view).unsqueeze(0)
                total += arms[0] * arms[1] * batch_gradients(policy, parameters, batch, advantages, 1.0, 2, 2)[0]
            expected.setdefault(name, []).append(total)
        for name, (first, second) in expected.items():
            assert bool((first - second).abs().max() < 1e-6) == (name in gates[:2]), name

    def test_the_task_and_the_length_gradient_oppose_each_other(self):
        found = statistics_of(bandit_gradients(0.4, 60, 8, [TASK_GRADIENT, LENVM_GRADIENT]))
        assert found.cosine(0, 1).estimate == pytest.approx(-1.0, abs=1e-3)


def short_enough(completion_ids, **columns):
    return [float(len(ids) % 2) for ids in completion_ids]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tokenizer = tiny_tokenizer()
    policy = tiny_llama()
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    tiny_llama(seed=5).save_pretrained(folder / "trained")
    tokenizer.save_pretrained(folder / "trained")
    tiny_length_value_model(policy, gamma=0.8, tokenizer=tokenizer).save_pretrained(folder / "length_value_model")
    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for index in range(12):
            file.write(json.dumps({"prompt": f"w{6 + index} w{20 + index}"}) + "\n")
    run = {
        "policy": "policy",
        "length_value_model": "length_value_model",
        "trained": {"ours": "trained"},
        "data": {"dataset_name": None},
        "reward": "test_gradient.short_enough",
        "max_new_tokens": 6,
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def small(run_dir, **options):
    settings = {"num_batches": 3, "batch_size": 8, "group_size": 4, "dataset_name": str(run_dir / "data.jsonl")}
    return GradientArguments(run_dir=str(run_dir), **{**settings, **options})


def test_a_run_is_measured_and_written(run_dir, capsys):
    report = main(small(run_dir, correct_lenvm=str(run_dir / "length_value_model")))
    assert report == json.loads((run_dir / "gradient" / "gradient.json").read_text())
    rows = {row["name"]: row for row in report["estimators"]}
    assert set(rows) == {each.name for each in estimators(4, (OF_CORRECT,))}
    ratios = [row["snr"]["estimate"] for row in report["estimators"]]
    known = [ratio for ratio in ratios if ratio is not None]
    assert ratios == sorted(known, reverse=True) + [None] * (len(ratios) - len(known))
    assert report["measured_on"]["parameters"] == sum(p.numel() for p in tiny_llama().parameters())
    # The model of correct completions is the same model here, so what it gates is the same.
    assert rows["LenVM of correct ones, if correct"]["snr"] == rows["LenVM, if correct"]["snr"]
    if rows[TASK_GRADIENT]["cosine_to_task"]["estimate"] is not None:
        assert rows[TASK_GRADIENT]["cosine_to_task"]["estimate"] == pytest.approx(1.0)
    if rows[LENVM_GRADIENT]["lenvm_over_it"]["estimate"] is not None:
        assert rows[LENVM_GRADIENT]["lenvm_over_it"]["estimate"] == pytest.approx(1.0)
    best = report["penalties"]["all"]["best"]
    assert rows[best]["snr"]["estimate"] == max(
        row["snr"]["estimate"] for row in rows.values() if row["kind"] == SEQUENCE
    )
    assert report["cosines"][best][TASK_GRADIENT] == rows[best]["cosine_to_task"]["estimate"]
    printed = capsys.readouterr().out
    assert "SNR of a batch" in printed and best in printed
    with open(run_dir / "gradient" / "gradient.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[0]["snr"]) == ratios[0] and lines[0]["name"] == report["estimators"][0]["name"]
    assert (run_dir / "gradient" / "gradient.png").stat().st_size > 10_000
    # The rollouts are there, the gradients are gone.
    left = {path.suffix for path in (run_dir / "gradient").iterdir()}
    assert left == {".json", ".jsonl", ".csv", ".png"}
    # A second call samples nothing and finds the same; one of other batches would mix two runs, and is refused.
    assert main(small(run_dir, correct_lenvm=str(run_dir / "length_value_model"))) == report
    with pytest.raises(ValueError, match="rollouts.jsonl"):
        main(small(run_dir, seed=1))


def test_single_completions_and_other_models(run_dir, tmp_path):
    other = {"other_lenvms": [f"twin={run_dir / 'length_value_model'}"], "group_size": 1, "batch_size": 4}
    report = main(small(run_dir, **other, output_dir=str(tmp_path), estimators="twin"))
    rows = {row["name"]: row for row in report["estimators"]}
    assert set(rows) == {*NEEDED, "LenVM twin, lambda 1", "LenVM twin, lambda 0.95"}
    assert rows["LenVM twin, lambda 1"]["snr"] == rows[LENVM_GRADIENT]["snr"]
    assert rows["LenVM twin, lambda 1"]["over_best_penalty"] == report["penalties"]["all"]["ratio"]


def test_a_stale_policy_has_a_name_and_a_folder_of_its_own(run_dir):
    args, data, _ = complete(small(run_dir, policy="ours"))
    assert args.policy == str(run_dir / "trained") and args.output_dir == str(run_dir / "gradient_ours")
    assert args.length_value_model == str(run_dir / "length_value_model")
    assert args.max_new_tokens == 6 and len(data.prompts) == 6
    assert args.batch_size == 8


def test_models_of_ones_own_need_no_run(run_dir, tmp_path):
    models = {name: str(run_dir / name) for name in ("policy", "length_value_model")}
    args, _, _ = complete(
        GradientArguments(
            run_dir=str(tmp_path),
            dataset_name=str(run_dir / "data.jsonl"),
            num_batches=2,
            batch_size=8,
            group_size=4,
            **models,
        )
    )
    assert args.policy == models["policy"] and args.length_value_model == models["length_value_model"]
    assert args.output_dir == str(tmp_path / "gradient_policy")


def test_prompts_are_drawn_from_all_of_a_dataset(run_dir):
    prompts = [complete(small(run_dir, seed=seed))[1].prompts for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2] and len(set(prompts[0])) == 6
    with pytest.raises(ValueError, match="20 prompts.* 12"):
        complete(small(run_dir, num_batches=10))


def test_the_sandbox_draws_prompts_that_nothing_was_fitted_to(run_dir):
    _, data, _ = complete(small(run_dir, dataset_name=None))
    assert len(data.prompts) == len(data.columns["answer"]) == 6
    assert not {problem.prompt for problem in distinct_problems(480, 1, "train")} & set(data.prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_batches": 1}, "num_batches"),
        ({"batch_size": 10}, "batch_size"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 1, "batch_size": 1}, "batch_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"other_lenvms": ["path"]}, "other_lenvms"),
        ({"other_lenvms": ["a=path", "a=other"]}, "other_lenvms"),
        ({"other_lenvms": ["correct=path"]}, "other_lenvms"),
    ],
)
def test_bad_arguments_are_refused(run_dir, options, message):
    with pytest.raises(ValueError, match=message):
        small(run_dir, **options)
