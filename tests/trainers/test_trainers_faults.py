"""Every fault of the table in faults.py ends in a clear error or in full recovery, and nothing is lost."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults import BOTH, FAULTS, TRAINERS, Cut, FullDisk, GoesOn, Refused, Stops, make
from safetensors.torch import load_file
from test_bad_input import largest_file
from tiny import tiny_tokenizer
from trainer_parts import (
    VOCAB,
    batch_of,
    counts_of_w8,
    grpo,
    logged,
    ppo,
    prompts,
    same_weights,
    scripted,
    scripted_lenvm,
    weights,
)
from transformers.trainer_callback import TrainerState

from lenvm_rl.files import MetricsFile, is_complete, last_complete_checkpoint, read_metrics
from lenvm_rl.trainers import LenVMPPOTrainer
from lenvm_rl.trainers.resuming import StopBetweenGenerations


def cases(kind):
    """The faults of a kind, with each trainer that they can befall."""
    found = [(name, fault) for name, fault in FAULTS.items() if isinstance(fault, kind)]
    return pytest.mark.parametrize(
        ("fault", "maker"),
        [
            pytest.param(fault, maker, id=f"{name}-{maker.__name__}")
            for name, fault in found
            for maker in (BOTH if kind in (GoesOn, Refused) else fault.makers)
        ],
    )


def contents(folder):
    """All files under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def all_weights(trainer):
    critic = trainer.critic if isinstance(trainer, LenVMPPOTrainer) else torch.nn.Module()
    return {**weights(trainer.model), **{f"critic.{name}": value for name, value in weights(critic).items()}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of each trainer, the folder of an unbroken run and the weights it ended with."""
    found = {}
    for maker in BOTH:
        folder = tmp_path_factory.mktemp(maker.__name__)
        trainer = make(maker, folder)
        trainer.train()
        found[maker] = folder, all_weights(trainer)
    return found


@pytest.fixture
def begun(whole, tmp_path):
    """Copies the checkpoints of the first steps of the unbroken run: where a run was when the fault befell it."""

    def copy(maker, *steps):
        for step in steps:
            shutil.copytree(whole[maker][0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        return tmp_path

    return copy


def ends_as_unbroken(maker, folder, whole):
    """Whether a run that goes on from what is in the folder ends with the weights of the unbroken one."""
    trainer = make(maker, folder)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
    return same_weights(all_weights(trainer), whole[maker][1])


@cases(Stops)
def test_a_step_that_stops_names_the_culprit_and_loses_nothing(fault, maker, begun):
    folder = begun(maker, 1)
    before = contents(folder / "checkpoint-1")
    trainer = make(maker, folder, fault.rewards)
    fault.provoke(trainer)
    with pytest.raises(Exception, match=f"(?s){fault.says}") as error:
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1
    # From it a run goes on as if there had been no fault: see the tests of a full disk.
    assert contents(folder / "checkpoint-1") == before and last_complete_checkpoint(folder).endswith("-1")
    kept = [path.name for path in folder.iterdir() if path.name not in ("checkpoint-1", "metrics.jsonl")]
    assert kept == ([] if fault.keeps is None else [fault.keeps])
    if fault.keeps is not None:
        told = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
        assert str(folder / fault.keeps) in told
        assert_batch(folder / fault.keeps)


def assert_batch(path):
    """The file holds eight completions: of a value model with what it gave, of a reward function as it got them."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        assert len(tensors["completion_ids"]) == 8
        assert (~torch.isfinite(tensors["values"])).any(dim=1).nonzero().flatten().tolist()[0] == 0
        return
    rows, tokenizer = json.loads(path.read_text()), tiny_tokenizer(VOCAB)
    assert len(rows) == 8 and all(row["prompt"].startswith("w6 w") for row in rows)
    for row in rows:
        assert tokenizer.decode(row["completion_ids"], skip_special_tokens=True) == row["completion"]


@cases(GoesOn)
def test_a_batch_that_is_all_of_a_kind_is_learned_from(fault, maker, tmp_path):
    completions, rows = fault.completions, len(fault.completions)
    trainer = maker(
        tmp_path, lambda completions, **kwargs: [1.0, 0.0, 1.0, 0.0],
        scripted_lenvm({6: -0.6, 9: -0.9}), trainer=scripted(TRAINERS[maker], completions), data=prompts(1),
        length_coef=1.0, length_gate="all", per_device_train_batch_size=rows, max_completion_length=2, max_steps=1,
        scale_rewards="none", optim="sgd", **({"whiten": "none"} if maker is ppo else {}), **fault.changes,
    )  # fmt: skip
    if maker is ppo:
        with torch.no_grad():
            trainer.critic.head.output.bias.fill_(0.25)
    batch = batch_of(trainer)
    expected = torch.tensor(fault.advantages) + (0.25 if maker is ppo else 0.0) * batch["completion_mask"]
    torch.testing.assert_close(batch["advantages"] * batch["completion_mask"], expected)
    for name, value in fault.measured.items():
        assert trainer._metrics["train"][name] == [pytest.approx(value)]
    before = all_weights(trainer)
    trainer.train()
    assert all(bool(torch.isfinite(weight).all()) for weight in all_weights(trainer).values())
    assert math.isfinite(logged(trainer, "loss")[0]) and math.isfinite(logged(trainer, "grad_norm")[0])
    # Nothing to learn from moves nothing.
    assert same_weights(all_weights(trainer), before) == (not bool(batch["completion_mask"].any()))


@cases(Refused)
def test_what_does_not_fit_is_refused_at_construction(fault, maker, tmp_path):
    with pytest.raises(ValueError, match=fault.says):
        fault.construct(maker, tmp_path)
    assert contents(tmp_path) == {}


@pytest.fixture(scope="module")
def resumers(tmp_path_factory):
    """A trainer of each kind, to resume from checkpoints that it refuses before it begins."""
    return {maker: make(maker, tmp_path_factory.mktemp("resumer")) for maker in BOTH}


@cases(Cut)
def test_a_checkpoint_cut_in_half_is_named_with_the_one_before(fault, maker, begun, resumers):
    folder = begun(maker, 1, 2)
    path = folder / "checkpoint-2" / fault.file
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="(?s)checkpoint-2'.*[Rr]esume from '.*checkpoint-1'") as error:
        resumers[maker].train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert fault.file in str(error.value)
    before = {"trainer_state.json": "checkpoint-1"}.get(fault.file, "checkpoint-2")
    assert last_complete_checkpoint(folder) == str(folder / before)
    # And where there is none before.
    shutil.rmtree(folder / "checkpoint-1")
    with pytest.raises(ValueError, match="start anew"):
        resumers[maker].train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def on_a_full_disk(write, room):
    """`write`, where no file can grow beyond `room` bytes. (Other files, such as the captured output, can.)"""

    def limited(*arguments):
        with largest_file(room):
            write(*arguments)

    return limited


@cases(FullDisk)
def test_a_full_disk_leaves_the_checkpoint_before(fault, maker, begun, whole, monkeypatch):
    folder = begun(maker, 1)
    before = contents(folder / "checkpoint-1")
    # The checkpoint before is removed only when the next one is whole.
    trainer = make(maker, folder, save_total_limit=1)
    with monkeypatch.context() as patch, pytest.raises(Exception, match=f"(?s){fault.says}") as error:
        if fault.only_trainer_state:
            patch.setattr(TrainerState, "save_to_json", on_a_full_disk(TrainerState.save_to_json, fault.room))
        else:
            patch.setattr(trainer, "_save_checkpoint", on_a_full_disk(trainer._save_checkpoint, fault.room))
        trainer.train(resume_from_checkpoint=True)
    (note,) = error.value.__notes__
    assert f"'{folder / 'checkpoint-2'}' could not be written" in note
    assert f"make room (save_total_limit keeps fewer checkpoints); then resume from '{folder / 'checkpoint-1'}'" in note
    assert (folder / "checkpoint-2").is_dir() and not is_complete(folder / "checkpoint-2")
    assert contents(folder / "checkpoint-1") == before
    assert ends_as_unbroken(maker, folder, whole)


def test_a_full_disk_loses_half_a_line_of_the_metrics(begun, whole, monkeypatch):
    folder = begun(grpo, 1)
    path, append = folder / "metrics.jsonl", MetricsFile._append
    said = f"(?s)too large\n{path} could not be written: make room"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=said):
        patch.setattr(MetricsFile, "_append", on_a_full_disk(append, 100))
        make(grpo, folder).train(resume_from_checkpoint=True)
    assert path.stat().st_size == 100 and read_metrics(path) == []
    assert ends_as_unbroken(grpo, folder, whole)
    assert [entry["step"] for entry in read_metrics(path)] == [2, 2]


def test_sigterm_with_enable_jit_checkpoint_stops_where_a_run_can_go_on(tmp_path):
    """Two steps learn from each generation: the signal comes in the first, the run stops after the second."""

    def score(completion_ids, trainer_state, **kwargs):
        if trainer_state.global_step == 0 and told:
            os.kill(os.getpid(), told.pop())
            time.sleep(0.2)
        return counts_of_w8(completion_ids)

    told, settings = [], {"num_iterations": 2, "max_steps": 4, "save_steps": 4, "save_strategy": "steps"}
    unbroken = make(ppo, tmp_path / "whole", score, **settings)
    unbroken.train()
    told.append(signal.SIGTERM)
    trainer = make(ppo, tmp_path / "part", score, enable_jit_checkpoint=True, **settings)
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, StopBetweenGenerations))
    callback.jit_manager.kill_wait = 0
    trainer.train()
    assert trainer.state.global_step == 2 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = make(ppo, tmp_path / "part", score, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "loss") == logged(unbroken, "loss")
    assert same_weights(all_weights(resumed), all_weights(unbroken))


def terminated(maker, folder):
    """A run whose process gets SIGTERM while it scores the completions of the second step."""

    def score(completion_ids, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return counts_of_w8(completion_ids)

    make(maker, folder, score).train()


@pytest.mark.slow
@pytest.mark.parametrize("maker", BOTH)
def test_sigterm_in_the_middle_of_a_step_leaves_the_checkpoint_before(maker, tmp_path, whole):
    code = f"import test_trainers_faults as t; t.terminated(t.{maker.__name__}, {str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGTERM, done.stderr[-3000:]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    assert ends_as_unbroken(maker, tmp_path, whole)
