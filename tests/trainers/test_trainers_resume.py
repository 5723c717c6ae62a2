"""Resuming: twenty steps are ten, a SIGKILL, and ten more, to the last bit; what cannot be so is refused."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import two_processes
from resume_runs import CASES, differences, run
from trainer_parts import grpo, logged, ppo, prompts, random_lenvm, same_weights, weights

from lenvm_rl.files import is_complete, last_complete_checkpoint
from lenvm_rl.trainers import LenVMGRPOTrainer
from lenvm_rl.trainers.resuming import Generations

FAST, TWO_PROCESSES = "ppo_length_target", "ppo_refresh_two_processes"


def program(case, folder, resume=None, dies=None):
    """The run in a process of its own, or in two: its exit status and, if it lived, its outcome."""
    result = Path(folder).with_suffix(".pt")
    arguments = {"case": case, "folder": str(folder), "resume": resume, "dies": dies}
    arguments.update(result=str(result), threads=torch.get_num_threads())
    script = Path(__file__).with_name("resume_runs.py"), json.dumps(arguments)
    command = two_processes(*script) if case == TWO_PROCESSES else [sys.executable, *map(str, script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    status = done.returncode
    if case == TWO_PROCESSES and "Signal 9 (SIGKILL)" in done.stderr:
        # The launcher ends with a status of its own.
        status = -signal.SIGKILL
    assert status in (0, -signal.SIGKILL), done.stderr[-3000:]
    if status != 0:
        return status, None
    outcomes = [torch.load(path, weights_only=True) for path in (result, Path(f"{result}.1")) if path.exists()]
    assert len(outcomes) == (2 if case == TWO_PROCESSES else 1)
    # A second process may have other logs, but not other weights.
    for part in ("policy", "critic", "length_value_model", "coefficient"):
        assert differences(outcomes[0].get(part), outcomes[-1].get(part)) == []
    return status, {**outcomes[0], "second process": outcomes[1:]}


def check_killed_run(case, tmp_path, dies, start):
    """`start` runs a case; its second run of a folder goes on."""
    _, whole = start(case, tmp_path / "whole")
    status, _ = program(case, tmp_path / "part", dies=dies)
    assert status == -signal.SIGKILL
    newest = max((tmp_path / "part").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert is_complete(newest) == (dies == "loss")
    _, part = start(case, tmp_path / "part", resume=True)
    assert differences(part, whole) == []
    assert whole["steps"] == 20 and len(set(whole["losses"])) > 3


def in_this_process(case, folder, resume=None):
    return 0, run(case, folder, resume)


def test_a_run_killed_in_the_middle_of_a_step_is_the_unbroken_one(tmp_path):
    check_killed_run(FAST, tmp_path, "loss", in_this_process)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_resumes_exactly(tmp_path, case):
    check_killed_run(case, tmp_path, "loss", program)


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["checkpoint", "trainer_state"])
@pytest.mark.parametrize("case", [FAST, "grpo_stateful_rewards"])
def test_a_run_killed_while_it_wrote_a_checkpoint_goes_on_from_the_one_before(tmp_path, case, dies):
    check_killed_run(case, tmp_path, dies, program)


@pytest.mark.parametrize(("batches", "accumulation", "rounds"), [
    (1, 1, 3), (4, 1, 2), (4, 2, 3), (8, 2, 1), (2, 4, 5), (4, 4, 3), (4, 3, 4), (6, 4, 5), (3, 2, 3), (2, 3, 5),
])  # fmt: skip
def test_generations_end_where_a_count_says(batches, accumulation, rounds):
    """Two epochs of so many rounds of generation, counted batch by batch as `Trainer` takes them."""
    total = batches * rounds
    generations = Generations(batches, accumulation, -(-total // accumulation))
    step = served = 0
    ends = {0: True}
    for _ in range(2):
        for batch in range(1, total + 1):
            served += 1
            if batch % accumulation == 0 or batch == total:
                step += 1
                ends[step] = served % batches == 0
    assert ends == {step: generations.are_used_up(step) for step in ends}
    for every in range(1, step + 1):
        assert generations.fits(every, step) == all(ends[at] for at in range(every, step, every))


def saving(folder, make=grpo, lenvm=None, **changes):
    return make(folder, lenvm=lenvm, **{"save_strategy": "steps", "max_steps": 12, **changes})


def test_checkpoints_between_generations_are_refused_at_construction(tmp_path):
    # A generation serves 2 * 3 batches, which are three steps of two.
    common = {"gradient_accumulation_steps": 2, "num_iterations": 3, "per_device_train_batch_size": 4}
    refused = r"save_steps={} leaves.*every 3 optimizer steps .*steps_per_generation=2 \* num_iterations=3.*Set {}={}\."
    for make in (grpo, ppo):
        with pytest.raises(ValueError, match=refused.format(4, "save_steps", 6)):
            saving(tmp_path, make, save_steps=4, **common)
    with pytest.raises(ValueError, match=refused.format(r"0.6, every 8 of 12 steps,", "save_steps", 9)):
        saving(tmp_path, save_steps=0.6, **common)
    # A run that ends before its first checkpoint has none in the middle.
    assert saving(tmp_path, save_steps=500, **common).args.save_steps == 500
    # Nobody chose the default, so it moves; 499 is somebody's.
    assert saving(tmp_path, **{**common, "max_steps": 600}).args.save_steps == 501
    with pytest.raises(ValueError, match="save_steps=501"):
        saving(tmp_path, save_steps=499, **{**common, "max_steps": 600})
    with pytest.raises(ValueError, match="eval_steps=6"):
        best = {"eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": "reward"}
        saving(tmp_path, ppo, save_strategy="best", eval_data=prompts(4), **best, **common)
    # Six steps of an epoch of sixteen batches: only at its end is a generation of four batches used up.
    uneven = {"gradient_accumulation_steps": 3, "steps_per_generation": 4, "per_device_train_batch_size": 4}
    with pytest.raises(ValueError, match="save_steps=6"):
        saving(tmp_path, save_steps=4, data=prompts(16), **uneven)
    for fitting in ({"save_steps": 6}, {"save_steps": 0.5}, {"save_strategy": "no"}, {"save_strategy": "epoch"}):
        saving(tmp_path, **{**common, **fitting})
    saving(tmp_path, save_steps=1, gradient_accumulation_steps=4, steps_per_generation=2)


def test_an_evaluation_after_the_checkpoint_of_an_epoch_is_refused(tmp_path):
    # Four steps an epoch, so the fourth is saved, and evaluated later.
    common = {"eval_strategy": "epoch", "eval_data": prompts(4), "make": ppo}
    with pytest.raises(ValueError, match="save_steps=2.*eval_strategy"):
        saving(tmp_path, save_steps=2, **common)
    saving(tmp_path, save_strategy="epoch", **common)


def test_what_construction_cannot_know_is_refused_on_resuming(tmp_path):
    common = {"num_iterations": 2, "save_steps": 2}
    # The last step is always saved, here in the middle of a generation.
    first = saving(tmp_path, max_steps=3, **common)
    first.train()
    longer = saving(tmp_path, max_steps=6, **common)
    start = weights(longer.model)
    with pytest.raises(ValueError, match=r"checkpoint-3' is of step 3, between two generations.*every 2 steps"):
        longer.train(resume_from_checkpoint=True)
    assert same_weights(weights(longer.model), start)
    # The run itself is over, and stays so: `Trainer` would go one step further.
    same = saving(tmp_path, max_steps=3, **common)
    same.train(resume_from_checkpoint=True)
    assert same.state.global_step == 3 and same_weights(weights(same.model), weights(first.model))
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert longer.state.global_step == 6 and len(logged(longer, "loss")) == 6


def test_a_checkpoint_that_lacks_something_is_refused(tmp_path):
    saving(tmp_path / "model", max_steps=1, save_only_model=True).train()
    trainer = saving(tmp_path / "whole", max_steps=1)
    trainer.train()
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    with pytest.raises(ValueError, match="holds the model alone"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "model" / "checkpoint-1"))
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    with pytest.raises(ValueError, match="was not written by 1 processes"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_stream_that_has_begun_again_is_refused(tmp_path):
    """Two prompts a step: after four steps the stream of eight starts over."""
    stream = prompts(8).to_iterable_dataset()
    saving(tmp_path, max_steps=6, save_steps=1, data=stream).train()
    again = saving(tmp_path, max_steps=6, save_steps=1, data=stream)
    with pytest.raises(ValueError, match="checkpoint-5' is of a later pass through a stream"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_moving_reference_that_was_not_saved_is_refused(tmp_path):
    common = {"beta": 0.5, "save_steps": 2, "policy": CASES["grpo_moving_reference"]["policy"](tmp_path)}
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1}
    saving(tmp_path / "run", max_steps=2, **common).train()
    with pytest.raises(ValueError, match="sync_ref_model.*checkpoint-2"):
        saving(tmp_path / "run", max_steps=4, **common, **moving).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_an_earlier_layout_is_refused(tmp_path):
    saving(tmp_path, max_steps=2, save_steps=1).train()
    (tmp_path / "checkpoint-1" / "lenvm_state_rank0.json").rename(tmp_path / "checkpoint-1" / "length_coef.json")
    with pytest.raises(ValueError, match="checkpoint-1.*length_coef.json"):
        saving(tmp_path, max_steps=2, save_steps=1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_half_a_checkpoint_is_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None and last_complete_checkpoint(tmp_path) is None
    for step, text in ((2, "{}"), (10, '{"global_step": 10}'), (12, '{"global_st'), (20, "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    trainer = grpo(tmp_path)
    with pytest.raises(ValueError, match="checkpoint-12' has no whole .*Resume from '.*checkpoint-10'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    shutil.rmtree(tmp_path / "checkpoint-2")
    shutil.rmtree(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_written_over_is_incomplete_until_it_is_whole(tmp_path):
    seen = []

    class Watched(LenVMGRPOTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            seen.append(is_complete(output_dir))
            super()._save_optimizer_and_scheduler(output_dir)

    for _ in range(2):
        grpo(tmp_path, trainer=Watched, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert seen == [False, False] and is_complete(tmp_path / "checkpoint-1")


def test_a_log_between_two_checkpoints_is_that_of_all_its_steps(tmp_path):
    """Logged after steps 3 and 6, saved after 2 and 4: what the first two steps measured is in the first log."""
    common = {"save_steps": 2, "max_steps": 6, "logging_steps": 3, "lenvm": random_lenvm()}
    whole = saving(tmp_path / "whole", **common)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    part = saving(tmp_path / "part", **common)
    part.train(resume_from_checkpoint=True)
    for key in ("loss", "reward", "entropy", "lenvm/value_mean"):
        assert logged(part, key) == logged(whole, key) and len(logged(part, key)) == 2
    state = json.loads((tmp_path / "whole" / "checkpoint-6" / "lenvm_state_rank0.json").read_text())
    assert state["log"] is None
