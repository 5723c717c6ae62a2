"""The training recipes: stages are reused and never changed under each other, and a smoke run leaves every artefact."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import yaml
from trl import GRPOConfig, ModelConfig

from lenvm_rl.modeling import LengthValueModel
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMPPOConfig
from recipes import grpo_shaped, ppo_shaped
from recipes.arguments import StageArguments, check_setup
from recipes.stages import Run, run_stage
from recipes.training import read_log, show_progress

CONFIGS = Path(ppo_shaped.__file__).parent / "configs"


def make_run(tmp_path, model=None, settings=None, **arguments):
    config = LenVMGRPOConfig(
        output_dir=str(tmp_path), max_completion_length=16, use_cpu=True, bf16=False, **(settings or {})
    )
    return Run(StageArguments(**arguments), config, ModelConfig(model_name_or_path=model))


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


def test_an_interrupted_stage_does_not_go_on_with_other_settings(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage("training", tmp_path / "ppo", {"length_coef": 6}, interrupted)
    with pytest.raises(ValueError, match="length_coef differ"):
        run_stage("training", tmp_path / "ppo", {"length_coef": 0}, lambda: None)


def test_a_stage_depends_on_the_settings_of_those_before_it(tmp_path):
    plain, cooler = make_run(tmp_path), make_run(tmp_path, settings={"temperature": 0.5})
    fewer = make_run(tmp_path, policy_tokens=1000)
    assert plain.value_settings() != cooler.value_settings()
    assert plain.rollout_settings() != fewer.rollout_settings() and plain.value_settings() != fewer.value_settings()
    assert plain.value_settings() == make_run(tmp_path).value_settings()


def test_half_a_setup_is_refused():
    with pytest.raises(ValueError, match="needs prompts"):
        check_setup(StageArguments(), ModelConfig(model_name_or_path="mine"))
    with pytest.raises(ValueError, match="needs a policy"):
        check_setup(StageArguments(dataset_name="mine.jsonl"), ModelConfig())


def test_rollouts_are_sampled_as_the_trainer_samples(tmp_path):
    sampling = make_run(tmp_path, settings={"top_k": 3, "top_p": 0.5, "temperature": 0.7}).sampling()
    assert (sampling.top_k, sampling.top_p, sampling.temperature) == (3, 0.5, 0.7)
    with pytest.raises(ValueError, match="another distribution"):
        make_run(tmp_path, settings={"repetition_penalty": 1.1}).sampling()


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (("--reward_funcs", "reward.sandbox.nothing"), "There is no reward function"),
        (("--gate_reward", "nothing"), "gate_reward"),
        (("--loss_type", "vespo"), "loss_type='vespo'"),
        (("--length_value_model", "./nowhere"), "no folder './nowhere' for the length value model"),
        (("--model_name_or_path", "./nowhere", "--dataset_name", "x.jsonl"), "no folder './nowhere' for the policy"),
        (("--eval_strategy", "steps"), "eval_strategy"),
        (("--length_lam", "2"), "length_lam"),
    ],
)
def test_what_training_would_refuse_is_refused_before_any_stage(arguments, problem, tmp_path, monkeypatch):
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        run_recipe(ppo_shaped, monkeypatch, "--output_dir", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


def test_an_empty_dataset_and_null_prompts_are_refused(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        make_run(tmp_path, model="mine", dataset_name=str(data)).prompts(None, 0)
    data.write_text('{"prompt": "q"}\n{"prompt": null}\n')
    with pytest.raises(ValueError, match="1 prompts of .* are neither text nor messages"):
        make_run(tmp_path, model="mine", dataset_name=str(data)).prompts(None, 0)


def test_the_log_of_an_interrupted_run_leaves_out_lost_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [{"event": "train_begin", "step": 0}, *({"reward": 0, "step": n} for n in (1, 2, 3))]
    again = [{"event": "train_begin", "step": 1}, *({"reward": 1, "step": n} for n in (2, 3, 4))]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in steps + again))
    assert [(entry["step"], entry["reward"]) for entry in read_log(path)] == [(1, 0), (2, 1), (3, 1), (4, 1)]


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


def test_a_run_that_logged_no_step_is_no_error(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train_begin", "step": 0}\n{"train_runtime": 1.0, "step": 2}\n')
    show_progress(path)
    assert "no step was logged" in capsys.readouterr().out


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
    assert record["trained"] == {"ppo": "ppo"} and record["policy"] == "policy"
    assert (run / "ppo" / "critic" / "model.safetensors").exists()
    assert (run / "ppo" / "model.safetensors").exists() and (run / "ppo" / "metrics.jsonl").exists()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    before = (run / "rollouts.jsonl").read_bytes()
    capsys.readouterr()
    run_recipe(grpo_shaped, monkeypatch, *arguments)
    shown = capsys.readouterr().out
    assert shown.count("done before") == 3
    assert (run / "rollouts.jsonl").read_bytes() == before
    assert set(json.loads((run / "run.json").read_text())["trained"]) == {"ppo", "grpo"}

    # A run that is stopped is not finished, and one with refresh leaves the model as it was re-fitted last.
    class Stopped(ppo_shaped.LenVMPPOTrainer):
        def training_step(self, *arguments, **options):
            self.control.should_training_stop = True
            return super().training_step(*arguments, **options)

    refreshed = (*arguments, "--trained_name", "refreshed", "--refresh_steps", "1")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped after 1 of 2 steps"):
        patch.setattr(ppo_shaped, "LenVMPPOTrainer", Stopped)
        run_recipe(ppo_shaped, patch, *refreshed)
    assert not json.loads((run / "refreshed.stage.json").read_text())["finished"]
    run_recipe(ppo_shaped, monkeypatch, *refreshed)
    assert json.loads((run / "refreshed.stage.json").read_text())["finished"]
    models = [LengthValueModel.from_pretrained(run / name / "length_value_model") for name in (".", "refreshed")]
    assert any(not a.equal(b) for a, b in zip(*(model.parameters() for model in models), strict=True))


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
