"""The scaling study: which cells there are, what each trains on, and that nothing is trained twice."""

from dataclasses import fields, replace

import pytest
from datasets import Dataset

from lenvm_rl.sandbox import PolicySettings, sandbox_tokenizer
from lenvm_rl.sandbox.policy import new_policy
from recipes import scaling_study
from recipes.scaling_study import Cell, ScalingArguments, ScalingStudy, make_axes, make_table


def test_axes_share_their_base_and_differ_in_one_thing():
    sizes = {"prompts": [8, 16], "samples": [1, 2, 4], "hidden_sizes": [4, 8, 16, 32], "horizons": [0.5, 1.0, 2.0]}
    axes = make_axes(ScalingArguments(**sizes))
    base = Cell(16, 4, 0)
    assert axes["prompts"]["16"] == axes["samples per prompt"]["4"] == base
    assert axes["gamma"]["horizon x 1"] == base
    cells = {cell for axis in axes.values() for cell in axis.values()}
    assert len(cells) == 4 + 1 + 1 + 2 + 2
    assert len({replace(cell, seed=seed).name for cell in cells for seed in range(3)}) == 3 * len(cells)
    for cell in cells:
        changed = [entry.name for entry in fields(Cell) if getattr(cell, entry.name) != getattr(base, entry.name)]
        assert len(changed) <= 1


def rollouts_of(prompts, samples):
    rows = [
        {
            "prompt": "p",
            "prompt_ids": [2] * 3,
            "completion_ids": [3] * (1 + sample),
            "finish_reason": "stop",
            "group": g,
        }
        for g in range(prompts)
        for sample in range(samples)
    ]
    return Dataset.from_list(rows)


def test_a_cell_trains_on_its_part_of_the_data_for_the_same_tokens():
    args = ScalingArguments(prompts=[8, 16], samples=[1, 4], batch_size=4, train_tokens=220)
    study = ScalingStudy(args, "policy", rollouts_of(16, 4), None, None, gamma=0.9)
    part = study.rollouts_of(Cell(8, 2, seed=0))
    groups = part["group"][:]
    assert len(part) == 16 and all(groups.count(group) == 2 for group in groups)
    # Blocks of four prompts, which hold every difficulty once, stay whole.
    assert all(4 * (group // 4) + place in groups for group in groups for place in range(4))
    assert len({len(ids) for ids in part["completion_ids"][:]}) == 2
    draws = {(tuple(study.rollouts_of(Cell(8, 1, seed=seed))["group"][:])) for seed in range(8)}
    assert len(draws) > 1
    # 64 completions of 3 + 2.5 tokens: 4 of them are 22 tokens.
    assert study.steps_of(study.train) == 10
    assert study.gamma_of(Cell(8, 1, 0, horizon=4.0)) == pytest.approx(1 - 0.1 / 4)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    tokenizer = sandbox_tokenizer()
    new_policy(PolicySettings(hidden_size=16, num_heads=1), tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def run(tmp_path, policy, *options):
    line = ["--smoke", "--policy", policy, "--output_dir", str(tmp_path / "study"), *options]
    scaling_study.main(*scaling_study.make_parser().parse_args_and_config(line))


def test_a_smoke_study_is_reported_and_resumed(tmp_path, policy, monkeypatch, capsys):
    trained = []
    original = ScalingStudy.run

    def counted(self, cell):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(cell)
        return original(self, cell)

    monkeypatch.setattr(ScalingStudy, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, policy)
    first = {path: path.read_bytes() for path in (tmp_path / "study" / "cells").iterdir()}
    assert len(first) == 3
    monkeypatch.setattr(ScalingStudy, "run", lambda self, cell: trained.append(cell) or original(self, cell))
    run(tmp_path, policy)
    # 2 sizes, 2 numbers of prompts, 2 of samples, 2 gammas, of which one is in three: 6 distinct ones.
    assert len(trained) == len(set(trained)) == 2 * 6
    assert all(path.read_bytes() == content for path, content in first.items())
    shown = capsys.readouterr().out
    table = (tmp_path / "study" / "results.md").read_text()
    assert table in shown and table.count("\n") == 2 + 2 + 2 + 2 + 2
    assert (tmp_path / "study" / "scaling.png").exists()
    run(tmp_path, policy)
    assert len(trained) == 12
    with pytest.raises(ValueError, match="other settings"):
        run(tmp_path, policy, "--batch_size", "16")


def test_sizes_have_to_ascend():
    with pytest.raises(ValueError, match="samples"):
        ScalingArguments(samples=[4, 2])


def test_the_table_gives_mean_and_range_over_seeds():
    def result(loss):
        names = scaling_study.METRICS
        return {"metrics": {**dict.fromkeys(names, 0.5), "loss": loss}, "parameters": 1234, "epochs": 2.0}

    table = make_table({"prompts": {"8": [result(0.001), result(0.004)]}})
    assert "| prompts | 8 | 1,234 | 2.0 | 2 | 2.50 [1.00, 4.00] | 0.500 [0.500, 0.500] |" in table
