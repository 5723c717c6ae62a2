"""Metrics of value pretraining by domain: those of a data set that holds the domain alone."""

import json
import logging
import sqlite3

import pytest
from datasets import Dataset
from ragged import make_rollout, random_rollouts
from test_pretraining import GAMMA, make_args, make_metadata
from tiny import tiny_llama, tiny_tokenizer

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.trainer import LengthValueTrainer, pretrain


def rollouts_of_two_domains():
    rollouts = random_rollouts(16, seed=2)
    return [{**rollout, "domain": ("code", "math")[rollout["group"] % 2]} for rollout in rollouts]


@pytest.mark.parametrize("layout", [{}, {"packing": False}])
def test_each_domain_has_the_metrics_of_its_own_data_set(tmp_path, layout):
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    rollouts = rollouts_of_two_domains()
    args = make_args(tmp_path, domain_column="domain", per_device_eval_batch_size=3, **layout)
    together = LengthValueTrainer(model, args, eval_dataset=Dataset.from_list(rollouts)).evaluate()
    for domain in ("code", "math"):
        own = Dataset.from_list([rollout for rollout in rollouts if rollout["domain"] == domain])
        alone = LengthValueTrainer(model, make_args(tmp_path, **layout), eval_dataset=own).evaluate()
        clocks = ("runtime", "per_second", "time", "epoch")
        compared = {name for name in alone if not name.endswith(clocks)} - {"eval_loss"}
        assert len(compared) > 40
        for name in compared:
            value = together[f"eval_domain/{domain}/{name.removeprefix('eval_')}"]
            assert value == pytest.approx(alone[name], rel=1e-4, abs=1e-5, nan_ok=True), name
        assert together[f"eval_domain/{domain}/loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)


def test_the_card_shows_a_column_for_each_domain(tmp_path):
    tokenizer = tiny_tokenizer()
    args = make_args(tmp_path, domain_column="domain", max_steps=1)
    held_out = Dataset.from_list(rollouts_of_two_domains())
    rollouts = Dataset.from_list(random_rollouts(8))
    model, metrics = pretrain(tiny_llama(), rollouts, make_metadata(tokenizer), args, tokenizer, held_out)
    assert set(model.config.metrics) == {"held-out prompts", "code", "math"}
    assert model.config.metrics["math"]["length_mre_at_0"] == metrics["eval_domain/math/length_mre_at_0"]
    assert model.config.metrics["held-out prompts"]["length_mre_at_0"] == metrics["eval_length_mre_at_0"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| metric | held-out prompts | code | math |" in card and "| `length_mre_at_0` |" in card


def test_a_domain_of_which_nothing_ended_is_said_to_have_no_metrics(tmp_path, caplog):
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    cut = {**make_rollout([7], [8, 9], "length", 99), "domain": "endless"}
    args = make_args(tmp_path, domain_column="domain")
    trainer = LengthValueTrainer(model, args, eval_dataset=Dataset.from_list([*rollouts_of_two_domains(), cut]))
    with caplog.at_level(logging.WARNING):
        metrics = trainer.evaluate()
    assert "domain endless: none of its completions ended" in caplog.text
    assert not any(name.startswith("eval_domain/endless") for name in metrics)


def test_a_column_that_is_missing_or_contradicts_itself(tmp_path):
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    args = make_args(tmp_path, domain_column="topic")
    with pytest.raises(ValueError, match="domain_column"):
        LengthValueTrainer(model, args, eval_dataset=Dataset.from_list(rollouts_of_two_domains()))
    mixed = rollouts_of_two_domains()
    mixed[1]["domain"] = "math"
    with pytest.raises(ValueError, match="group 0"):
        args = make_args(tmp_path, domain_column="domain")
        LengthValueTrainer(model, args, eval_dataset=Dataset.from_list(mixed))


def test_trackio_gets_what_is_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio
    import trackio.utils

    # Where it writes is settled at its import, which another test may have caused.
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    tokenizer = tiny_tokenizer()
    changes = {"logging_strategy": "steps", "logging_steps": 1, "project": "lengths", "max_steps": 2}
    args = make_args(tmp_path, report_to="trackio", **changes)
    held_out = Dataset.from_list(random_rollouts(6, seed=1))
    rollouts = Dataset.from_list(random_rollouts(8))
    _, metrics = pretrain(tiny_llama(), rollouts, make_metadata(tokenizer), args, tokenizer, held_out)
    # Logging is in the background; the evaluation after training has a run of its own.
    trackio.finish()
    with sqlite3.connect(tmp_path / "trackio" / "lengths.db") as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by id")]
    assert sum("train/loss" in row for row in rows) == 2
    assert rows[-1]["eval/length_mae_at_0"] == pytest.approx(metrics["eval_length_mae_at_0"])
