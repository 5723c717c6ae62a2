"""Whose models a program evaluates, which prompts and settings are theirs, and which folder results go to."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from ragged import EOS, random_rollouts
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer

from eval.graded import read_run
from eval.gradient import __main__ as gradient
from eval.gradient.__main__ import GradientArguments
from eval.length_control import __main__ as length_control
from eval.length_control.__main__ import LengthControlArguments
from eval.length_prediction import __main__ as length_prediction
from eval.length_prediction.__main__ import PredictionArguments
from eval.runs import RecipeRun, check_sandbox, find_run, is_sandbox, output_folder
from eval.tradeoff import __main__ as tradeoff
from eval.tradeoff.arms import TradeoffArguments
from eval.tradeoff.sampler import Sampler
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.programs import TRACEBACK_VARIABLE
from lenvm_rl.rollouts.record import RolloutMetadata, write_rollouts
from lenvm_rl.sandbox import PolicySettings, sandbox_tokenizer
from lenvm_rl.sandbox.policy import new_policy
from lenvm_rl.tokenization import tokenizer_fingerprint

SANDBOX = Path("outputs/sandbox")


def always_right(completion_ids, **columns):
    return [1.0] * len(completion_ids)


def needs_gold(completions, gold, **columns):
    return [1.0] * len(completions)


def judges_half(completion_ids, **columns):
    return [None if index % 2 else 1.0 for index in range(len(completion_ids))]


def judges_nothing(completion_ids, **columns):
    return [None] * len(completion_ids)


def save(folder, policy, tokenizer, sampling=None):
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    model = tiny_length_value_model(policy, tokenizer=tokenizer)
    model.config.sampling = sampling
    model.save_pretrained(folder / "lenvm")
    tokenizer.save_pretrained(folder / "lenvm")
    return {"policy": str(folder / "policy"), "length_value_model": str(folder / "lenvm")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the sandbox's run in its place, and models of one's own with prompts in another."""
    root = tmp_path_factory.mktemp("place")
    policy = new_policy(PolicySettings(hidden_size=16, num_layers=1), sandbox_tokenizer()).eval()
    save(root / SANDBOX, policy, sandbox_tokenizer())
    run = {"policy": "policy", "length_value_model": "lenvm", "trained": {"ppo": "policy"}, "data": {}}
    run |= {"temperature": 0.25, "max_new_tokens": 5, "reward": "reward.sandbox.sandbox_reward"}
    (root / SANDBOX / "run.json").write_text(json.dumps(run))
    save(root / "mine", tiny_llama(), tiny_tokenizer(chat=True), {"max_new_tokens": 9, "temperature": 0.5})
    rows = [{"prompt": f"w{6 + n} w{20 + n}", "answer": str(n)} for n in range(8)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metadata = RolloutMetadata("p", tokenizer_fingerprint(tiny_tokenizer()), {}, 0, [EOS])
    write_rollouts(root / "rollouts.jsonl", random_rollouts(24, cut_share=0.2), metadata)
    return root


@pytest.fixture
def there(place, monkeypatch):
    """The current folder is that place, and afterwards the sandbox's folder is as it was."""
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in SANDBOX.rglob("*")}
    yield place
    assert {path: path.stat().st_mtime_ns for path in SANDBOX.rglob("*")} == before


MINE = {"policy": "mine/policy", "length_value_model": "mine/lenvm"}
DATA = {"dataset_name": "data.jsonl", "reward": "test_runs.always_right"}


# Runs


def test_the_sandboxs_run_is_for_who_names_no_policy(there):
    assert find_run(None, None, None).folder == str(SANDBOX)
    assert find_run(None, None, "mine/lenvm").folder == str(SANDBOX)
    assert find_run(None, "mine/policy", "mine/lenvm") == RecipeRun(None, {})
    assert find_run("elsewhere", "mine/policy", "mine/lenvm") == RecipeRun("elsewhere", {})
    with pytest.raises(ValueError, match="--length_value_model"):
        find_run(None, "mine/policy", None)
    with pytest.raises(ValueError, match="--run_dir"):
        find_run("elsewhere", None, None)


def test_a_name_of_a_trained_policy_means_the_sandboxs_run_unless_a_folder_is_called_so(there, tmp_path, monkeypatch):
    assert find_run(None, "ppo", None, among_trained=True).folder == str(SANDBOX)
    with pytest.raises(ValueError, match="--length_value_model"):
        find_run(None, "ppo", None)
    (tmp_path / "ppo").mkdir()
    (tmp_path / "outputs").symlink_to(there / "outputs")
    monkeypatch.chdir(tmp_path)
    assert find_run(None, "ppo", "mine/lenvm", among_trained=True).folder is None


def test_damaged_records_are_named(tmp_path):
    for content in ("{", "[1]"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match="run.json"):
            find_run(str(tmp_path), None, None)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="policy"):
        read_run(TradeoffArguments(run_dir=str(tmp_path)))


def test_the_sandboxs_words_are_for_its_vocabulary():
    own, other = sandbox_tokenizer(), tiny_tokenizer()
    assert is_sandbox(own) and is_sandbox(tokenizer_fingerprint(own)) and not is_sandbox(other)
    check_sandbox(own, "p", "The prompts are", "Name others.")
    with pytest.raises(ValueError, match="mine/policy.*Name others"):
        check_sandbox(other, "mine/policy", "The prompts are", "Name others.")


# Folders


def test_results_about_other_models_are_not_written_over_unless_asked_to(tmp_path):
    default, about = tmp_path / "out", ("policy",)
    assert output_folder(None, default, "r.json", {"policy": "a"}, about) == default and default.is_dir()
    (default / "r.json").write_text(json.dumps({"arguments": {"policy": "a", "seed": 0}}))
    assert output_folder(None, default, "r.json", {"policy": "a", "seed": 1}, about) == default
    with pytest.raises(ValueError, match="policy a.*--output_dir"):
        output_folder(None, default, "r.json", {"policy": "b"}, about)
    assert output_folder(str(default), default, "r.json", {"policy": "b"}, about) == default


def test_a_run_that_was_moved_keeps_its_results(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"arguments": {"run_dir": "old", "policy": "old/policy"}}))
    now = {"run_dir": str(tmp_path), "policy": str(tmp_path / "policy")}
    assert output_folder(None, tmp_path, "r.json", now, ("policy",)) == tmp_path
    with pytest.raises(ValueError, match="--output_dir"):
        output_folder(None, tmp_path, "r.json", {**now, "policy": "old/policy"}, ("policy",))


def test_a_folder_that_cannot_be_written_is_found_before_work_begins(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        output_folder(str(tmp_path / "file" / "out"), "unused", "r.json", {}, ())
    assert not list(tmp_path.glob("**/.writable"))


# Models of one's own


def test_ones_own_model_has_nothing_of_the_sandboxs(there):
    args, run = read_run(TradeoffArguments(**MINE, **DATA))
    args = args.as_fitted()
    # As its length value model was fitted, not as in the sandbox's run; candidates are not the sandbox's either.
    assert (args.temperature, args.max_new_tokens) == (0.5, 9)
    assert (args.top_k, args.top_p, args.min_p) == (15, 0.999, 0.0)
    assert run.trained == {} and run.folder is None and args.run_dir is None
    args, _ = read_run(TradeoffArguments(**MINE, **DATA, temperature=0.0, max_new_tokens=3, min_p=0.1))
    args = args.as_fitted()
    assert (args.temperature, args.max_new_tokens, args.min_p) == (0.0, 3, 0.1)
    # The sandbox's run says how its own is sampled.
    args, _ = read_run(TradeoffArguments(num_prompts=4))
    args = args.as_fitted()
    assert (args.temperature, args.max_new_tokens) == (0.25, 5)
    assert (args.top_k, args.top_p, args.min_p) == (0, 1.0, 0.01)
    assert args.policy == str(SANDBOX / "policy") and args.run_dir == str(SANDBOX)


def test_ones_own_model_is_never_asked_the_sandboxs_prompts(there):
    calls = {
        "tradeoff": lambda: tradeoff.main(TradeoffArguments(**MINE)),
        "gradient": lambda: gradient.main(GradientArguments(**MINE, num_batches=2, batch_size=4, group_size=2)),
        "length_control": lambda: length_control.main(LengthControlArguments(**MINE)),
        "length_prediction": lambda: length_prediction.main(
            PredictionArguments(MINE["length_value_model"], policy=MINE["policy"])
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="mine/policy") as caught:
            call()
        assert "--dataset_name" in str(caught.value) or "--rollouts" in str(caught.value), name


def test_ones_own_completions_are_not_graded_by_the_sandboxs_reward(there):
    with pytest.raises(ValueError, match="--reward"):
        tradeoff.main(TradeoffArguments(**MINE, dataset_name="data.jsonl"))


def test_results_of_ones_own_model_go_to_no_runs_folder(there):
    args = TradeoffArguments(**MINE, **DATA, num_prompts=2, num_samples=2, strengths=[1.0], budget_quantiles=[0.5])
    tradeoff.main(args)
    assert (there / "outputs/tradeoff/tradeoff.json").is_file()
    made, _, _ = gradient.complete(GradientArguments(**MINE, **DATA, num_batches=2, batch_size=4, group_size=2))
    assert made.output_dir == "outputs/gradient_policy" and (made.temperature, made.max_new_tokens) == (0.5, 9)
    with pytest.raises(ValueError, match="--output_dir"):
        tradeoff.main(TradeoffArguments(**{**MINE, "length_value_model": str(there / "mine/lenvm")}, **DATA))


def test_a_run_on_data_of_its_own_is_not_asked_the_sandboxs_prompts_by_length_control(there, tmp_path):
    run = {"policy": "policy", "length_value_model": "lenvm", "data": {"dataset_name": "questions.jsonl"}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="questions.jsonl.*--dataset_name"):
        length_control.main(LengthControlArguments(run_dir=str(tmp_path)))


def test_a_trained_policy_of_another_vocabulary_is_refused_before_anything_is_sampled(there, tmp_path):
    tiny_llama(vocab_size=63).save_pretrained(tmp_path / "other")
    tiny_tokenizer(63).save_pretrained(tmp_path / "other")
    args = TradeoffArguments(**MINE, **DATA, trained=[f"it={tmp_path / 'other'}"], output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="trained policy 'it'"):
        tradeoff.main(args)
    assert not (tmp_path / "out" / "samples").exists()


def test_a_trained_policy_is_asked_through_its_own_chat_template(there, tmp_path):
    """With a template that adds a word, the states, and so the divergence, are others."""
    tokenizer = tiny_tokenizer(chat=True)
    tiny_llama().save_pretrained(tmp_path / "same")
    tokenizer.save_pretrained(tmp_path / "same")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>", "<|assistant|> w50")
    tiny_llama().save_pretrained(tmp_path / "wordy")
    tokenizer.save_pretrained(tmp_path / "wordy")
    trained = [f"{name}={tmp_path / name}" for name in ("same", "wordy")]
    args = TradeoffArguments(
        **MINE, **DATA, chat=True, trained=trained, num_prompts=3, num_samples=2, strengths=[], budget_quantiles=[],
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    rows = {row["name"]: row for row in tradeoff.main(args)}
    assert rows["same"]["kl"]["estimate"] == pytest.approx(0.0, abs=1e-9)
    assert rows["wordy"]["kl"]["estimate"] > 1e-3


# Edges


def small(tmp_path, **options):
    settings = {"num_prompts": 3, "num_samples": 2, "strengths": [1.0], "budget_quantiles": [0.5]}
    settings |= {"output_dir": str(tmp_path / "out"), "max_new_tokens": 6}
    return TradeoffArguments(**{**MINE, **DATA, **settings, **options})


def test_one_prompt_is_compared_without_intervals(there, tmp_path, capsys):
    rows = tradeoff.main(small(tmp_path, num_prompts=1))
    assert all(row["tokens"]["low"] is None and row["tokens"]["estimate"] is not None for row in rows)
    assert "one prompt, so no number has an interval" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "tradeoff.json").read_text())
    assert report["arms"][0]["accuracy"] == {"estimate": 1.0, "low": None, "high": None}


@pytest.mark.parametrize("count", [1, 3])
def test_the_sandbox_has_any_number_of_prompts(there, tmp_path, count):
    options = {"num_prompts": count, "num_samples": 2, "strengths": [], "budget_quantiles": [0.5]}
    rows = tradeoff.main(TradeoffArguments(**options, output_dir=str(tmp_path)))
    assert rows[0]["completions"] == 2 * count


def test_completions_that_were_cut_are_remarked(there, tmp_path, capsys):
    tradeoff.main(small(tmp_path, max_new_tokens=1, temperature=1.0))
    assert "cut at 1 tokens" in capsys.readouterr().out


def test_what_was_not_graded_is_no_wrong_answer(there, tmp_path, capsys):
    rows = tradeoff.main(small(tmp_path, reward="test_runs.judges_half"))
    # Every other completion is graded, and right.
    assert rows[0]["ungraded"] == 3 and rows[0]["accuracy"]["estimate"] == 1.0
    assert "were not graded" in capsys.readouterr().out
    rows = tradeoff.main(small(tmp_path, reward="test_runs.judges_nothing"))
    assert rows[0]["accuracy"]["estimate"] is None and rows[0]["tokens_correct"] is None
    with pytest.raises(ValueError, match="judges_half.* 2 of 4"):
        gradient.main(
            GradientArguments(
                **MINE,
                dataset_name="data.jsonl",
                reward="test_runs.judges_half",
                num_batches=2,
                batch_size=2,
                group_size=2,
                max_new_tokens=4,
                output_dir=str(tmp_path / "gradient"),
            )  # fmt: skip
        )


def test_a_column_that_a_reward_needs_is_missed_before_anything_is_sampled(there, tmp_path):
    with pytest.raises(ValueError, match="needs_gold.*gold.*answer"):
        tradeoff.main(small(tmp_path, reward="test_runs.needs_gold"))
    assert not (tmp_path / "out" / "samples").exists()


@pytest.mark.parametrize("row", [{"prompt": None}, {"prompt": 7}, {"prompt": []}])
def test_a_row_without_a_prompt_is_named(there, tmp_path, row):
    path = tmp_path / "rows.jsonl"
    first = {"prompt": [{"role": "user", "content": "w6"}] if row["prompt"] == [] else (8 if row["prompt"] else "w6")}
    path.write_text("".join(json.dumps(each) + "\n" for each in (first, row)))
    with pytest.raises(ValueError, match="row [01] .*--prompt_column"):
        read_run(small(tmp_path, dataset_name=str(path)))[0].load_prompts(3)


def test_a_comparison_that_was_interrupted_goes_on_with_the_same_samples(there, tmp_path, monkeypatch):
    whole = tradeoff.main(small(tmp_path, output_dir=str(tmp_path / "whole")))
    sampled, original = [], Sampler._sample_rows

    def interrupted(self, name, *arguments):
        if name == "tilt +1" and "stop" not in sampled:
            sampled.append("stop")
            raise KeyboardInterrupt
        sampled.append(name)
        return original(self, name, *arguments)

    monkeypatch.setattr(Sampler, "_sample_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tradeoff.main(small(tmp_path))
    assert tradeoff.main(small(tmp_path)) == whole
    assert sampled == ["base", "stop", "tilt +1"]
    # Another seed is another comparison.
    tradeoff.main(small(tmp_path, seed=1))
    assert sampled[3:] == ["base", "tilt +1"]


# Programs


PROGRAMS = {
    "tradeoff": ["--run_dir", "nowhere"],
    "gradient": ["--run_dir", "nowhere"],
    "length_control": [
        *("--policy", "mine/policy", "--length_value_model", "mine/lenvm"),
        "--dataset_name",
        "no.jsonl",
    ],
    "length_prediction": ["--length_value_model", "nowhere/lenvm", "--rollouts", "rollouts.jsonl"],
    "length_tokens": ["--length_value_model", "mine/lenvm", "--rollouts", "rollouts.tsv"],
    "viewer": ["--length_value_model", "mine/lenvm", "--rollouts", "no.jsonl"],
    "seeds": ["--run_dirs", "nowhere"],
    "speed": ["batching", "--rollouts", "rollouts.jsonl", "--length_value_model", "nowhere/lenvm"],
}


def start(program, line, monkeypatch):
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "argv", [program, *line])
    runpy.run_module(f"eval.{program}", run_name="__main__", alter_sys=False)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("program", PROGRAMS)
def test_what_cannot_be_done_ends_in_a_sentence(there, program, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        start(program, PROGRAMS[program], monkeypatch)
    said = str(caught.value.code)
    assert said.startswith("\nerror: ") and said.count("\n") <= 3, said


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("program", [*(program for program in PROGRAMS if program != "speed"), "steering"])
def test_the_help_says_what_each_option_takes(there, program, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        start(program, ["--help"], monkeypatch)
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and f"python -m eval.{program}" in shown
    assert "default: None" not in shown and "default: []" not in shown


@pytest.mark.parametrize("name", ["pretraining", "batching", "decoding", "serving", "rollouts", "critic", "ppo"])
def test_the_help_of_every_option_of_speed_says_something(name):
    from eval.speed.__main__ import make_parser

    assert [action.dest for action in make_parser(name)._actions if not action.help] == []


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_an_interrupt_says_that_the_same_command_goes_on(there, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lenvm_rl.rollouts.read_rollouts", interrupt)
    monkeypatch.setattr("eval.datasets.find_rollouts", interrupt)
    with pytest.raises(SystemExit) as caught:
        start("length_prediction", ["--length_value_model", "mine/lenvm"], monkeypatch)
    assert caught.value.code == 130 and "run the same command again" in capsys.readouterr().err


def test_the_length_value_model_of_the_sandbox_is_loaded_from_its_run(there):
    args, _ = read_run(TradeoffArguments(num_prompts=4))
    assert LengthValueModel.from_pretrained(args.length_value_model).config.gamma == 0.9
