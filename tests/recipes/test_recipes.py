"""The training recipes: stages are reused and never changed under each other, and a smoke run leaves every artefact."""

import dataclasses
import datetime
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from places import ROOT
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer
from trl import GRPOConfig, ModelConfig

from lenvm_rl.files import Journal, read_metrics
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMPPOConfig
from recipes import grpo_shaped, ppo_shaped, stage_records, stages
from recipes.arguments import StageArguments, check_setup
from recipes.stage_records import make_apart, run_stage, write_record
from recipes.stages import StagedRun, show_progress
from reward.length_reward import LengthReward

CONFIGS = Path(ppo_shaped.__file__).parent / "configs"


def make_run(tmp_path, model=None, settings=None, **arguments):
    config = LenVMGRPOConfig(
        output_dir=str(tmp_path), max_completion_length=16, use_cpu=True, bf16=False, **(settings or {})
    )
    rewards = ["reward.sandbox.sandbox_reward"]
    return StagedRun(
        StageArguments(**{"reward_funcs": rewards, **arguments}), config, ModelConfig(model_name_or_path=model)
    )


def test_a_stage_is_made_once_and_refused_with_other_settings(tmp_path):
    made = []
    artefact = tmp_path / "thing"

    def make():
        made.append(1)
        artefact.write_text("made")

    for _ in range(2):
        run_stage("making", artefact, {"size": 1, "path": tmp_path}, make)
    assert made == [1]
    with pytest.raises(ValueError, match=r"thing was made with other settings \(size differ\)"):
        run_stage("making", artefact, {"size": 2, "path": tmp_path}, make)
    assert made == [1]
    # Who removes it has it made again, and otherwise if that is wanted.
    artefact.unlink()
    run_stage("making", artefact, {"size": 2, "path": tmp_path}, make)
    assert made == [1, 1] and json.loads((tmp_path / "thing.stage.json").read_text())["finished"]


def test_training_depends_on_its_prompts_with_a_given_length_value_model_too(tmp_path, monkeypatch):
    depends = []

    def caught(name, target, settings, make):
        depends.append(settings)
        raise SystemExit

    monkeypatch.setattr(stages, "run_stage", caught)
    for data in ("a.jsonl", "b.jsonl"):
        run = make_run(tmp_path, "policy", length_value_model="v", dataset_name=data, chat=True)
        with pytest.raises(SystemExit):
            stages.train_stage("grpo", run, None)
    assert [each.pop("dataset_name") for each in depends] == ["a.jsonl", "b.jsonl"]
    assert depends[0] == depends[1] and depends[0]["chat"] is True


@pytest.mark.parametrize("name, value", [("sample_prompts", 30), ("train_prompts", 30), ("policy_passes", 1.2)])
def test_a_sandbox_that_cannot_be_is_refused_at_once(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        make_run(tmp_path, **{name: value}).check()


def test_settings_that_differ_are_named_and_new_ones_without_a_value_do_not(tmp_path):
    write_record(tmp_path / "thing", {"size": 1, "rollouts": {"seed": 0, "policy": {"path": "p"}}}, finished=True)
    (tmp_path / "thing").touch()
    # A setting that an earlier version did not know.
    same = {"size": 1, "layers": None, "rollouts": {"seed": 0, "top_k": None, "policy": {"path": "p"}}}
    run_stage("making", tmp_path / "thing", same, interrupted)
    other = {"layers": [2], "size": 1, "rollouts": {"seed": 3, "policy": {"path": "q"}}}
    with pytest.raises(ValueError, match=r"\(layers, rollouts\.policy\.path, rollouts\.seed differ\)"):
        run_stage("making", tmp_path / "thing", other, interrupted)


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize("again", [{"length_coef": 6}, {"length_coef": 0}])
def test_a_stage_that_left_nothing_is_made_with_any_settings(again, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_stage("making", tmp_path / "thing", {"length_coef": 6}, interrupted)
    # What a trainer writes before its first checkpoint, and what a run dumps that fails, is nothing to go on from.
    (tmp_path / "thing").mkdir()
    for name in ("metrics.jsonl", "nonfinite_critic_step0_rank0.safetensors", "checkpoint-3/model.safetensors"):
        (tmp_path / "thing" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "thing" / name).touch()
    Journal(tmp_path / "thing.journal", "job").open()
    made = []
    run_stage("making", tmp_path / "thing", again, lambda: made.append(1))
    assert made == [1]


@pytest.mark.parametrize(
    "left",
    ["thing", "thing/model.safetensors", "thing/adapter_model.safetensors", "thing/checkpoint-3/trainer_state.json"],
)
def test_a_stage_that_left_something_does_not_go_on_with_other_settings(left, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_stage("training", tmp_path / "thing", {"length_coef": 6}, interrupted)
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text("{}")
    with pytest.raises(ValueError, match="thing was begun with other settings .length_coef"):
        run_stage("training", tmp_path / "thing", {"length_coef": 0}, lambda: None)
    run_stage("training", tmp_path / "thing", {"length_coef": 6}, lambda: None)


def test_batches_of_rollouts_bind_the_settings(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_stage("sampling", tmp_path / "r.jsonl", {"seed": 1}, interrupted)
    journal = Journal(tmp_path / "r.journal", "job")
    journal.open()
    journal.append(0, [])
    with pytest.raises(ValueError, match="seed"):
        run_stage("sampling", tmp_path / "r.jsonl", {"seed": 2}, lambda: None)


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "thing.stage.json").write_text("{")
    with pytest.raises(ValueError, match="thing.stage.json is damaged"):
        run_stage("making", tmp_path / "thing", {}, lambda: None)


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
    # The sandbox's reward would read a column of the same name, and call every answer wrong.
    with pytest.raises(ValueError, match="reward_funcs"):
        check_setup(StageArguments(dataset_name="mine.jsonl"), ModelConfig(model_name_or_path="mine"))
    assert StageArguments().reward_funcs == ["reward.sandbox.sandbox_reward"]


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
        (
            (
                "--model_name_or_path",
                "./nowhere",
                "--dataset_name",
                "x.jsonl",
                "--reward_funcs",
                "reward.gsm8k.gsm8k_reward",
            ),
            "no folder './nowhere' for the policy",
        ),
        (("--eval_strategy", "steps"), "eval_strategy"),
        (("--length_lam", "2"), "length_lam"),
        (("--train_prompts", "4"), "per_device_train_batch_size"),
        (("--report_to", "mlflow"), "report_to"),
        (("--report_to", "nothing"), "nothing is not supported"),
        (("--use_vllm", "true"), "use_vllm"),
        (("--critic", "./nowhere"), "no folder './nowhere' for the critic"),
        (("--critic", str(CONFIGS)), "configs' holds no model"),
        (("--critic_form", "head"), "use_peft.*beta.*critic_form='full'"),
        (("--length_value_model", str(CONFIGS)), "configs' holds no model"),
        (("--reward_funcs", "test_recipes.sandboxed"), "needs riddle, and the sandbox"),
    ],
)
def test_what_training_would_refuse_is_refused_before_any_stage(arguments, problem, tmp_path, monkeypatch):
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        run_recipe(ppo_shaped, monkeypatch, "--output_dir", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


def own_run(tmp_path, rows, *, model=None, settings=None, tokenizer=None, **arguments):
    """A run of a person's own model and rows."""
    data, policy = tmp_path / "data.jsonl", tmp_path / "mine"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (model or tiny_llama(max_position_embeddings=64)).save_pretrained(policy)
    (tokenizer or tiny_tokenizer(chat=True)).save_pretrained(policy)
    return make_run(tmp_path, model=str(policy), settings=settings, dataset_name=str(data), **arguments)


def always(completions, **kwargs):
    return [1.0] * len(completions)


def by_name(completions, answer, **kwargs):
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def by_key(completions, **kwargs):
    return [float(a in c) for c, a in zip(completions, kwargs["answer"], strict=True)]


def closed(prompts, completions):
    return [1.0] * len(completions)


def sandboxed(completions, riddle, **kwargs):
    return [1.0] * len(completions)


async def slow(completions, answer, **kwargs):
    raise AssertionError("asynchronous functions may ask a service")


def of_progress(completions, trainer_state, log_metric, completion_ids, **kwargs):
    log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
    return [float(len(ids)) for ids in completion_ids]


class Remembering:
    """A reward function with a memory."""

    def __init__(self):
        self.calls = 0

    def __call__(self, completions, **kwargs):
        self.calls += 1
        return [1.0] * len(completions)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]

    def reset(self):
        self.calls = 0


remembering = Remembering()
PENALTY = LengthReward("linear", by_name, alpha=0.1, max_length=10)


def check_rewards(tmp_path, rows, *names, **arguments):
    own_run(tmp_path, rows, reward_funcs=[f"test_recipes.{name}" for name in names], **arguments).check()


@pytest.mark.parametrize("name", ["by_name", "by_key", "slow", "PENALTY"])
def test_a_reward_that_needs_a_column_is_refused_without_it(name, tmp_path):
    with pytest.raises(ValueError, match="'answer'|needs answer") as caught:
        check_rewards(tmp_path, [{"prompt": "w7", "solution": "w8"}], "always", name)
    assert "solution" in str(caught.value)
    check_rewards(tmp_path, [{"prompt": "w7", "answer": "w8"}], "always", name)


def test_a_reward_that_trainers_cannot_call_is_refused(tmp_path):
    with pytest.raises(ValueError, match="completion_ids.*kwargs"):
        check_rewards(tmp_path, [{"prompt": "w7"}], "closed")


@pytest.mark.parametrize("rows", [[3], ["w8", None]])
def test_a_column_of_another_kind_than_a_reward_takes_is_found_by_its_row(rows, tmp_path):
    rows = [{"prompt": "w7", "answer": answer} for answer in rows]
    with pytest.raises(TypeError) as caught:
        check_rewards(tmp_path, rows, "by_name")
    assert f"row {len(rows) - 1} " in caught.value.__notes__[0] and "'by_name'" in caught.value.__notes__[0]


def test_a_trial_leaves_no_trace_and_hands_over_what_trainers_do(tmp_path):
    check_rewards(tmp_path, [{"prompt": "w7"}], "remembering", "of_progress")
    assert remembering.calls == 0


@pytest.mark.parametrize(
    "rows, arguments, problem",
    [
        ([{"prompt": "w7"}, {"prompt": None}], {}, "row 1 .*missing"),
        ([{"prompt": "w7"}, {"prompt": None}], {"chat": True}, "row 1 .*missing"),
        ([{"prompt": "w7"}, {"prompt": 3}], {}, "row 1 .*int"),
        ([{"prompt": "w7"}, {"prompt": " "}], {}, "row 1 .*empty"),
        ([{"prompt": "w7"}, {"prompt": "w8 " * 49}], {}, "row 1 .*49 tokens"),
        ([{"question": "w7"}], {}, "no column 'prompt'.*question"),
        ([{"prompt": [{"role": "user", "content": "w7"}]}], {"chat": True}, "row 0 .*--chat"),
        ([{"prompt": [{"role": "user", "content": "w7"}]}], {"tokenizer": tiny_tokenizer()}, "chat template"),
    ],
)
def test_what_is_wrong_with_prompts_is_found_before_the_first_stage(rows, arguments, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        check_rewards(tmp_path, rows, "always", **arguments)


def test_models_are_looked_at_before_the_first_stage(tmp_path):
    rows, rewards = [{"prompt": "w7"}], ["test_recipes.always"]
    for name, tokenizer in (("lenvm", tiny_tokenizer(chat=True)), ("other", tiny_tokenizer(60))):
        tiny_length_value_model(tokenizer=tokenizer).save_pretrained(tmp_path / name)
    run = own_run(tmp_path, rows, reward_funcs=rewards, length_value_model=str(tmp_path / "lenvm"))
    run.check()
    (tmp_path / "empty").mkdir()
    for path, kind, problem in (
        (tmp_path / "other", ValueError, "60 tokens"),
        (tmp_path / "mine", ValueError, "'llama', not a length value model"),
        (tmp_path / "empty", FileNotFoundError, "empty"),
        (tmp_path / "nowhere", FileNotFoundError, "nowhere"),
    ):
        with pytest.raises(kind, match=problem):
            make_run(
                tmp_path, model=run.policy, dataset_name=run.args.dataset_name, reward_funcs=rewards,
                length_value_model=str(path),
            ).check()  # fmt: skip
    for policy, kind, problem in (
        ("lenvm", ValueError, "writes no text"),
        ("empty", FileNotFoundError, "empty"),
        ("nowhere", FileNotFoundError, "nowhere"),
    ):
        with pytest.raises(kind, match=problem):
            make_run(tmp_path, model=str(tmp_path / policy), dataset_name=run.args.dataset_name).check()


def test_a_policy_without_a_tokenizer_or_a_pad_token_of_its_own_is_named(tmp_path):
    run = own_run(tmp_path, [{"prompt": "w7"}], reward_funcs=["test_recipes.always"], pad_token="<none>")
    with pytest.raises(ValueError, match="pad_token '<none>'"):
        run.check()
    tiny_llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match="bare' has no tokenizer"):
        make_run(tmp_path, model=str(tmp_path / "bare"), dataset_name=run.args.dataset_name).check()


def test_golds_that_cannot_be_graded_by_are_found_by_their_row(tmp_path):
    rows = [{"prompt": "w7", "answer": answer} for answer in ("#### 5", "five or six")]
    run = own_run(tmp_path, rows, reward_funcs=["reward.gsm8k.gsm8k_reward"])
    with pytest.raises(ValueError, match="'answer' .row 1"):
        run.check()


def test_an_empty_dataset_is_refused(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        make_run(tmp_path, model="mine", dataset_name=str(data)).prompts(None, 0)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("column", ["prompt", "question"])
def test_a_dataset_with_a_prompt_column_alone_will_do(chat, column, tmp_path):
    run = own_run(
        tmp_path, [{column: f"w{n}"} for n in range(7, 12)], chat=chat, prompt_column=column,
        reward_funcs=["test_recipes.always"],
    )  # fmt: skip
    run.check()
    rows = run.prompts(None, 0)
    assert rows.column_names == ["prompt"]
    texts = [row["prompt"][0]["content"] if chat else row["prompt"] for row in rows]
    assert sorted(texts) == sorted(f"w{n}" for n in range(7, 12))


def test_what_rollouts_cannot_hold_is_left_out_of_them(tmp_path):
    rows = [{"prompt": "w7", "group": "a", "answer": "1"}]
    run = own_run(tmp_path, rows)
    dataset = run.prompts(None, 0).add_column("when", [datetime.datetime(2020, 1, 1)])
    assert run._kept_columns(dataset) == {"answer": ["1"]}
    correct = own_run(tmp_path, rows, pretrain_only_correct=True)
    assert set(correct._kept_columns(dataset)) == {"answer", "group", "when"}


def test_a_folder_of_another_policy_is_refused_before_the_first_stage(tmp_path):
    run = own_run(tmp_path, [{"prompt": "w7"}], reward_funcs=["test_recipes.always"])
    run.record("ppo", tmp_path / "ppo")
    run.check()
    with pytest.raises(ValueError, match="run.json.*mine"):
        make_run(tmp_path).check()


def test_the_log_of_an_interrupted_run_leaves_out_lost_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [{"event": "train_begin", "step": 0}, *({"reward": 0, "step": n} for n in (1, 2, 3))]
    again = [{"event": "train_begin", "step": 1}, *({"reward": 1, "step": n} for n in (2, 3, 4))]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in steps + again))
    assert [(entry["step"], entry["reward"]) for entry in read_metrics(path)] == [(1, 0), (2, 1), (3, 1), (4, 1)]


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


@pytest.mark.slow
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
    ours = ("--length_coef", "--length_gate", "--sample_prompts", "--length_value_model", "--reward_funcs")
    places = [shown.index(f"  {name} ") for name in (*ours, "--learning_rate")]
    # TRL's own stand behind ours.
    assert max(places[:-1]) < places[-1]
    assert shown.count("\n") < 300


@pytest.mark.parametrize("form", ["adapter", "head"])
def test_a_form_that_shares_the_policys_decoder_needs_it_frozen(form, tmp_path):
    make_run(tmp_path / "full", pretrain_form="full").check()
    with pytest.raises(ValueError, match="use_peft.*beta"):
        make_run(tmp_path / "none", pretrain_form=form).check()
    make_run(tmp_path / "reference", settings={"beta": 0.01}, pretrain_form=form).check()
    adapted = make_run(tmp_path / "adapters", pretrain_form=form)
    adapted.model.use_peft = True
    adapted.check()


def test_one_process_of_a_launch_makes_the_stages_and_the_others_wait(tmp_path, monkeypatch):
    """The first starts the command again, without the launch; the others go on when its records say that it is done."""
    artefact, started, looked = tmp_path / "policy", [], []

    def start(command, env):
        started.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    def wait(seconds):
        looked.append(seconds)
        if len(looked) == 2:
            run_stage("making", artefact, {}, lambda: artefact.write_text("made"))

    monkeypatch.setattr(stage_records.subprocess, "run", start)
    monkeypatch.setattr(stage_records.time, "sleep", wait)
    monkeypatch.setattr(sys, "argv", ["recipes/ppo_shaped.py", "--seed", "3"])
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make_apart([artefact])
    [(command, environment)] = started
    assert command[1:] == ["recipes/ppo_shaped.py", "--seed", "3", "--prepare_only", "true"] and len(looked) == 2
    assert "HF_HUB_OFFLINE" in environment and not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & set(environment)
    assert not [name for name in environment if name.startswith(("LOCAL_RANK", "TORCHELASTIC"))]
    # What it refuses, it has said; the others are ended by the launcher.
    monkeypatch.setattr(stage_records.subprocess, "run", lambda command, env: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit) as stop:
        make_apart([tmp_path / "other"])
    assert stop.value.code == 1


@pytest.mark.slow
def test_two_processes_make_the_stages_once_and_train(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "recipes/grpo_shaped.py"]
    command += ["--smoke", "true", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("sampling rollouts of the policy ->") == 1 and done.stdout.count("next: ") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["trained"] == {"grpo": "grpo"}
    done = subprocess.run(
        [*command, "--reward_funcs", "no.such"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and done.stderr.count("error: There is no reward function") == 1


def test_the_whole_help_has_every_option(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_recipe(ppo_shaped, monkeypatch, "--help_all")
    shown = capsys.readouterr().out
    for kind in (StageArguments, ppo_shaped.CriticArguments, LenVMPPOConfig, ModelConfig):
        for field in dataclasses.fields(kind):
            assert not field.init or f"\n  --{field.name}" in shown
