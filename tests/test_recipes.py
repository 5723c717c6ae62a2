"""The training recipes: stages are reused and never changed under each other, and a smoke run leaves every artefact."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import yaml
from trl import GRPOConfig

from lenvm_rl.modeling import LengthValueModel
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMPPOConfig
from recipes import grpo_shaped, ppo_shaped
from recipes.stages import Run, StageArguments, run_stage

CPU = {"use_cpu": True, "bf16": False, "fp16": False}
CONFIGS = Path(ppo_shaped.__file__).parent / "configs"


def make_run(tmp_path, model=None, **arguments):
    return Run(
        args=StageArguments(**arguments),
        output_dir=tmp_path,
        model_name_or_path=model,
        max_completion_length=16,
        temperature=1.0,
        seed=0,
        precision=CPU,
    )


def test_a_stage_is_made_once_and_refused_with_other_settings(tmp_path):
    made = []
    artefact = tmp_path / "thing"
    for _ in range(2):
        run_stage("making", artefact, {"size": 1, "path": tmp_path}, lambda: made.append(1))
    assert made == [1]
    with pytest.raises(ValueError, match=r"other settings \(size differ\)"):
        run_stage("making", artefact, {"size": 2, "path": tmp_path}, lambda: made.append(2))
    assert made == [1]


def test_an_interrupted_stage_is_made_again(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage("making", tmp_path / "thing", {}, interrupted)
    made = []
    run_stage("making", tmp_path / "thing", {}, lambda: made.append(1))
    assert made == [1]


def test_half_a_setup_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs prompts"):
        make_run(tmp_path, model="mine")
    with pytest.raises(ValueError, match="needs a policy"):
        make_run(tmp_path, dataset_name="mine.jsonl")


def test_a_dataset_of_ones_own_keeps_its_columns(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"q{n}", "answer": str(n)}) + "\n" for n in range(5)))
    rows = make_run(tmp_path, model="mine", dataset_name=str(data), prompt_column="question", chat=True).prompts(3, 0)
    assert len(rows) == 3
    assert {row["prompt"][0]["content"].replace("q", "") == row["answer"] for row in rows} == {True}
    with pytest.raises(ValueError, match="has no column 'text'"):
        make_run(tmp_path, model="mine", dataset_name=str(data), prompt_column="text").prompts(3, 0)


def test_sandbox_batches_are_stratified(tmp_path):
    rows = make_run(tmp_path).prompts(64, 2)
    assert all(sorted(rows["difficulty"][start : start + 4]) == [1, 3, 5, 7] for start in range(0, 64, 4))
    for name in ("sandbox_ppo.yaml", "sandbox_grpo.yaml"):
        config = yaml.safe_load((CONFIGS / name).read_text())
        prompts = config["per_device_train_batch_size"] // config["num_generations"]
        assert prompts % 4 == 0 and config["shuffle_dataset"] is False


def run_recipe(recipe, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
    recipe.main()


def test_smoke_run_leaves_every_artefact_and_is_reused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = ("--smoke", "true", "--output_dir", str(tmp_path / "run"))
    run_recipe(ppo_shaped, monkeypatch, *arguments, "--report_to", "wandb")
    run = tmp_path / "run"
    gamma = LengthValueModel.from_pretrained(run / "length_value_model").config.gamma
    assert 0 < gamma < 1
    record = json.loads((run / "run.json").read_text())
    assert record["trained"] == {"ppo": str(run / "ppo")}
    assert (run / "ppo" / "model.safetensors").exists() and (run / "ppo" / "metrics.jsonl").exists()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    before = (run / "rollouts.jsonl").read_bytes()
    capsys.readouterr()
    run_recipe(grpo_shaped, monkeypatch, *arguments)
    shown = capsys.readouterr().out
    assert shown.count("done before") == 3
    assert (run / "rollouts.jsonl").read_bytes() == before
    assert set(json.loads((run / "run.json").read_text())["trained"]) == {"ppo", "grpo"}


@pytest.mark.parametrize("config", [StageArguments, ppo_shaped.CriticArguments, LenVMPPOConfig, LenVMGRPOConfig])
def test_every_field_of_ours_has_a_help_text(config):
    theirs = {field.name for field in dataclasses.fields(GRPOConfig)}
    ours = [field for field in dataclasses.fields(config) if field.name not in theirs]
    assert ours and all(len(field.metadata.get("help", "")) > 10 for field in ours)


@pytest.mark.parametrize("recipe", [ppo_shaped, grpo_shaped])
def test_help_explains_our_fields(recipe, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_recipe(recipe, monkeypatch, "--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in ("--length_coef", "--length_gate", "--sample_prompts", "--length_value_model", "--reward_funcs"):
        assert field in shown
