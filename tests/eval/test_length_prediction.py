"""The evaluation of predicted lengths: pairs by hand, intervals around the library's metrics, the files written."""

import csv
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from ragged import make_rollout, random_rollouts
from tiny import EOS, tiny_length_value_model, tiny_llama, tiny_tokenizer

from eval.length_prediction.__main__ import PredictionArguments, main, print_tables, split_domains
from eval.length_prediction.measures import (
    ALONG,
    CompletionStatistics,
    half_intervals,
    length_metrics,
    median_intervals,
    moment_intervals,
    pair_counts,
    rank_intervals,
    read_statistics,
)
from eval.report import as_entry
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.metrics import POINTS, kendall_tau, length_value_metrics, sequence_statistics
from lenvm_rl.pretraining.references import reference_metrics
from lenvm_rl.returns import logits_from_remaining, remaining_from_value
from lenvm_rl.rollouts.record import RolloutMetadata, write_rollouts
from lenvm_rl.sandbox import PolicySettings, sandbox_tokenizer
from lenvm_rl.sandbox.policy import new_policy
from lenvm_rl.tokenization import tokenizer_fingerprint

GAMMA = 0.9


def pairwise_accuracy(predicted, realised, group):
    return rank_intervals(predicted, realised, group, num_resamples=2)["pairwise_accuracy"].estimate


def test_pairwise_accuracy_by_hand():
    # Prompt 0 is predicted 3 and has 2, 5; prompt 1 is predicted 3 and has 2; prompt 2 is predicted 7 and has 4, 9.
    predicted = torch.tensor([3.0, 3, 3, 7, 7])
    realised, group = torch.tensor([2.0, 5, 2, 4, 9]), torch.tensor([0, 0, 1, 2, 2])
    # 0-1: (2, 2) is no pair; (5, 2) is tied in the prediction: half. 0-2: (2, 4), (2, 9), (5, 9) right, (5, 4) wrong.
    # 1-2: (2, 4), (2, 9) right. Pairs of one prompt are none.
    assert pairwise_accuracy(predicted, realised, group) == pytest.approx((0.5 + 3 + 2) / 7)
    assert pairwise_accuracy(-predicted, realised, group) == pytest.approx((0.5 + 1) / 7)
    assert math.isnan(pairwise_accuracy(predicted[:2], realised[:2], group[:2]))
    signed, unequal, apart = pair_counts(predicted, realised, group)
    assert signed.tolist() == [[0, 0, 2], [0, 0, 2], [2, 2, 0]]
    assert unequal.tolist() == [[2, 1, 4], [1, 0, 2], [4, 2, 2]]
    assert apart.tolist() == [[0, 0, 4], [0, 0, 2], [4, 2, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_ranks_of_a_resample_are_those_of_the_resampled_data(seed, monkeypatch):
    monkeypatch.setattr("eval.length_prediction.measures.CHUNK_PAIRS", 100)
    draw = torch.Generator().manual_seed(seed)
    group = torch.randint(0, 9, (40,), generator=draw).unique(return_inverse=True)[1]
    realised = torch.randint(1, 9, (40,), generator=draw).double()
    predicted = realised + torch.randint(-4, 5, (40,), generator=draw)
    prompts = int(group.max()) + 1
    counts = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=5)
    rows = [torch.cat([torch.nonzero(group == p).flatten().repeat(n) for p, n in enumerate(row)]) for row in counts]
    taus = [kendall_tau(predicted[each], realised[each]) for each in rows]
    shares = []
    for each in rows:
        pairs = [(i, j) for i, j in itertools.combinations(each.tolist(), 2) if group[i] != group[j]]
        signs = [float(torch.sign((predicted[i] - predicted[j]) * (realised[i] - realised[j]))) for i, j in pairs
                 if realised[i] != realised[j]]  # fmt: skip
        shares.append(sum((1 + sign) / 2 for sign in signs) / len(signs))
    found = rank_intervals(predicted, realised, group, num_resamples=5, seed=seed)
    for interval, draws in ((found["kendall_tau"], taus), (found["pairwise_accuracy"], shares)):
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=1e-6)
    assert found["kendall_tau"].estimate == kendall_tau(predicted, realised)
    assert found["pairwise_accuracy"].estimate == pairwise_accuracy(predicted, realised, group)


def ragged(count=60, seed=0, **settings):
    rollouts = random_rollouts(count, seed, **settings)
    prompts = {rollout["group"]: rollout["prompt_ids"] for rollout in rollouts}
    return Dataset.from_list([{**rollout, "prompt_ids": prompts[rollout["group"]]} for rollout in rollouts])


def read(rollouts, model=None, **settings):
    return read_statistics(model or tiny_length_value_model().freeze(), rollouts, **settings)


def test_completions_are_read_state_by_state_whatever_the_batch():
    rollouts, model = ragged(), tiny_length_value_model().freeze()
    data = read(rollouts, model)
    for row, rollout in enumerate(rollouts.select(range(6))):
        ids, length = rollout["prompt_ids"] + rollout["completion_ids"], len(rollout["completion_ids"])
        logits = model(torch.tensor([ids])).logits[:, len(rollout["prompt_ids"]) - 1 : -1]
        ended = torch.tensor([rollout["finish_reason"] == "stop"])
        expected = sequence_statistics(logits, torch.tensor([length]), ended, GAMMA)
        torch.testing.assert_close(data.statistics[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    for forward_tokens in (1, 40):
        torch.testing.assert_close(read(rollouts, model, forward_tokens=forward_tokens).statistics, data.statistics)


def test_the_metrics_are_the_librarys_and_lie_in_their_intervals():
    data = read(ragged(160))
    found = length_metrics(data, num_resamples=300)
    common = (data.lengths, data.finished, data.groups)
    logits = torch.zeros(160, int(data.lengths.max()))
    model = tiny_length_value_model().freeze()
    for row, rollout in enumerate(ragged(160)):
        first = len(rollout["prompt_ids"]) - 1
        whole = model(torch.tensor([rollout["prompt_ids"] + rollout["completion_ids"]])).logits[0]
        logits[row, : len(whole) - first - 1] = whole[first:-1]
    expected = length_value_metrics(logits, *common, GAMMA)
    expected.update(reference_metrics(data.lengths, data.prompt_tokens, data.finished, data.groups, GAMMA))
    assert expected.pop("loss") and expected.keys() < found.keys()
    for name, value in expected.items():
        assert found[name].estimate == pytest.approx(value, rel=1e-3, abs=1e-4), name
    bootstrapped = {"explained_variance", "calibration_slope", "consistent_mae", "consistent_mre", "kendall_tau"}
    bootstrapped |= {f"{name}_at_{percent}" for name in ALONG for percent in POINTS}
    bootstrapped |= {f"reference_median_{name}" for name in ("length_mae", "length_mre", "kendall_tau")}
    assert {name for name, each in found.items() if math.isfinite(each.low)} >= bootstrapped
    assert all(found[name].low < found[name].estimate < found[name].high for name in bootstrapped)


def test_a_perfect_model_scores_perfectly_and_a_slope_is_found():
    groups = torch.arange(30).repeat_interleave(2)
    lengths = 4 + torch.arange(30)[groups]
    remaining = (lengths.unsqueeze(1) - torch.arange(40)).clamp(min=1).double()
    ended = torch.ones(60).bool()
    statistics = sequence_statistics(logits_from_remaining(remaining, GAMMA), lengths, ended, GAMMA)
    found = length_metrics(
        CompletionStatistics(statistics, lengths, ended, groups, torch.ones(60), GAMMA), num_resamples=50
    )
    for name, entry in found.items():
        if "mae" in name or "bias" in name or "length_mre" in name:
            if "mean" not in name and "regression" not in name:
                assert entry.estimate == pytest.approx(0, abs=1e-3), name
        elif name.startswith(("kendall", "pairwise", "explained", "calibration", "reference_median")):
            assert entry.estimate == pytest.approx(1, abs=1e-3), name
            assert (entry.low, entry.high) == pytest.approx((1, 1), abs=1e-3) or "value" in name, name
    # G = 0.5 V - 0.1 exactly: the slope is 0.5, and 1 - Var(G - V) / Var(G) = 1 - 0.25 / 0.25.
    values = -torch.rand(60).double()
    returns = 0.5 * values - 0.1
    squares = torch.stack([values**2, returns**2, values * returns], dim=1)
    moments = moment_intervals(values, returns, squares, groups, num_resamples=50)
    assert moments["calibration_slope"].estimate == pytest.approx(0.5)
    assert moments["explained_variance"].estimate == pytest.approx(0.0, abs=1e-9)


def at_the_prompt(predicted, lengths, gamma=GAMMA):
    """Completions `(P, N)` of prompts for which `predicted` `(P,)` was said."""
    rows, count = lengths.shape
    statistics = torch.zeros(rows * count, 11, dtype=torch.double)
    statistics[:, 0] = logits_from_remaining(predicted, gamma).repeat_interleave(count)
    groups, ended = torch.arange(rows).repeat_interleave(count), torch.ones(rows * count).bool()
    return CompletionStatistics(statistics, lengths.flatten(), ended, groups, torch.ones(rows * count), gamma)


def test_errors_against_halves_by_hand():
    """Halves that agree leave no noise; a model that is 10 % off everywhere has a relative error of 0.1."""
    lengths = torch.tensor([[10.0] * 8, [20.0] * 8, [40.0] * 8])
    found = half_intervals(at_the_prompt(1.1 * lengths[:, 0], lengths), num_resamples=20)
    assert found["half_mre"].estimate == pytest.approx(0.1)
    assert found["reference_half_mre"].estimate == pytest.approx(0.0, abs=1e-9)
    assert half_intervals(at_the_prompt(lengths[:, 0], lengths[:, :1])) == {}


def test_a_model_that_knows_the_expected_return_has_about_seven_tenths_of_the_noise():
    torch.manual_seed(0)
    gamma, ends = 0.95, torch.linspace(0.02, 0.2, 400)
    lengths = 1 + torch.distributions.Geometric(ends).sample((64,)).T
    value = -(1 - gamma) / (1 - gamma * (1 - ends))
    data = at_the_prompt(remaining_from_value(value.double(), gamma), lengths.long(), gamma)
    found = half_intervals(data, num_resamples=200)["half_ratio"]
    assert found.estimate == pytest.approx(0.5**0.5, abs=0.04) and found.low < found.estimate < found.high


def test_the_floor_by_hand():
    # Lower medians 2 and 6: errors 0, 3 and 4, 0, 1.
    lengths, groups = torch.tensor([2, 6, 5, 2, 7]), torch.tensor([8, 3, 8, 3, 3])
    data = CompletionStatistics(torch.zeros(5, 11), lengths, torch.ones(5).bool(), groups, torch.ones(5), GAMMA)
    found = median_intervals(data, num_resamples=20)
    assert found["reference_median_length_mae"].estimate == pytest.approx(8 / 5)
    assert found["reference_median_length_mre"].estimate == pytest.approx((3 / 5 + 4 / 2 + 1 / 7) / 5)
    # 2 < 6, 2 = 2, 2 < 7; 5 < 6, 5 > 2, 5 < 7: of five pairs that differ, four are as the medians say.
    assert found["reference_median_pairwise_accuracy"].estimate == pytest.approx(4 / 5)
    assert reference_metrics(lengths, torch.ones(5), torch.ones(5), groups, GAMMA)[
        "reference_median_length_mae"
    ] == pytest.approx(8 / 5)


def test_domains_keep_prompts_whole():
    rows = [make_rollout([6], [7, EOS], group=index // 2, domain="ab"[index // 4]) for index in range(8)]
    found = split_domains(Dataset.from_list(rows), "domain")
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "all": list(range(8)), "a": [0, 1, 2, 3], "b": [4, 5, 6, 7]
    }  # fmt: skip
    with pytest.raises(ValueError, match="domain_column"):
        split_domains(Dataset.from_list(rows), "subject")
    with pytest.raises(ValueError, match="Prompt 3"):
        split_domains(Dataset.from_list([*rows, {**rows[-1], "domain": "c"}]), "domain")
    with pytest.raises(ValueError, match="'all'"):
        split_domains(Dataset.from_list([{**row, "domain": "all"} for row in rows]), "domain")


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "lenvm"
    tiny_length_value_model(tokenizer=tiny_tokenizer()).save_pretrained(path)
    return path


def write(path, rollouts, tokenizer=None):
    fingerprint = tokenizer_fingerprint(tokenizer or tiny_tokenizer())
    write_rollouts(path, rollouts, RolloutMetadata("p", fingerprint, {}, 0, [EOS]))
    return str(path)


def test_the_program_writes_what_it_measured(tmp_path, model, capsys, caplog):
    rollouts = [{**row, "domain": "code" if row["group"] % 2 else "text"} for row in random_rollouts(80, longest=20)]
    rollouts += [make_rollout([6], [7] * 9, "length", group, domain="cut") for group in (100, 101)]
    path = write(tmp_path / "r.jsonl", rollouts)
    folder = tmp_path / "out"
    args = PredictionArguments(str(model), path, domain_column="domain", num_resamples=50, output_dir=str(folder))
    report = main(args)
    assert {each.name for each in folder.iterdir()} == {f"length_prediction.{kind}" for kind in ("json", "csv", "png")}
    assert json.loads((folder / "length_prediction.json").read_text()) == report
    assert list(report["domains"]) == ["all", "code", "cut", "text"]
    assert report["prompts"] == {"all": 42, "code": 20, "cut": 2, "text": 20}
    whole = report["domains"]["all"]
    assert whole["completions"]["estimate"] == 82
    assert report["domains"]["cut"] == {
        "completions": {"estimate": 2.0, "low": None, "high": None},
        "truncated_share": {"estimate": 1.0, "low": None, "high": None},
    }
    assert "cut: none of its 2 completions ended" in caplog.text
    alone = length_metrics(
        read(Dataset.from_list(rollouts[:80]), LengthValueModel.from_pretrained(model)), num_resamples=50
    )
    assert whole["length_mre_at_50"]["high"] == pytest.approx(alone["length_mre_at_50"].high)
    with open(folder / "length_prediction.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(found) for found in report["domains"].values())
    (line,) = [line for line in lines if (line["domain"], line["metric"]) == ("text", "length_mae_at_25")]
    assert [float(line[end]) for end in ("estimate", "low", "high")] == list(
        report["domains"]["text"]["length_mae_at_25"].values()
    )
    assert (folder / "length_prediction.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "42 prompts, gamma 0.90000" in shown and "prompt's own median (floor)" in shown
    assert f"{whole['length_mae_at_0']['estimate']:.1f} [{whole['length_mae_at_0']['low']:.1f}, " in shown
    with pytest.raises(ValueError, match="tokenizers"):
        main(replace(args, rollouts=write(tmp_path / "other.jsonl", rollouts, tiny_tokenizer(66))))


def test_tables_print_what_is_not_defined_as_a_dash():
    from rich.console import Console

    groups = torch.arange(3)
    data = CompletionStatistics(
        torch.zeros(3, 11), torch.full((3,), 4), torch.ones(3).bool(), groups, torch.ones(3), GAMMA
    )
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    found = length_metrics(data, num_resamples=20)
    print_tables({"all": {name: as_entry(interval) for name, interval in found.items()}}, console)
    shown = console.export_text()
    assert "nan" not in shown and "–" in shown


def test_without_rollouts_the_sandbox_is_sampled_once(tmp_path):
    policy, lenvm = tmp_path / "policy", tmp_path / "lenvm"
    tokenizer = sandbox_tokenizer()
    tokenizer.save_pretrained(policy)
    new_policy(PolicySettings(hidden_size=16, num_layers=1, num_heads=2), tokenizer).save_pretrained(policy)
    backbone = tiny_llama(vocab_size=len(tokenizer))
    tiny_length_value_model(backbone, tokenizer=tokenizer).save_pretrained(lenvm)
    args = PredictionArguments(
        str(lenvm), policy=str(policy), domain_column="difficulty", num_prompts=8, num_samples=6, max_new_tokens=90,
        num_resamples=20, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    report = main(args)
    assert report["prompts"]["all"] == 8 and len(report["domains"]) == 5
    content = (tmp_path / "out" / "rollouts.jsonl").read_bytes()
    assert main(args)["domains"] == report["domains"]
    assert (tmp_path / "out" / "rollouts.jsonl").read_bytes() == content
    with pytest.raises(ValueError, match="--policy"):
        main(replace(args, policy=None))
