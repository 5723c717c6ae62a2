"""Files that grow line by line: only whole lines count, and what is not a number is null."""

import json
from types import SimpleNamespace

import pytest
import torch

from lenvm_rl.files import Journal, MetricsFile, read_json


def test_a_journal_gives_back_what_was_finished(tmp_path):
    path = tmp_path / "deep" / "job.journal"
    journal = Journal(path, "job 1")
    assert journal.open() == {}
    journal.append(0, [{"text": "a\u2028\n"}])
    journal.append(2, [])
    assert Journal(path, "job 1").open() == {0: [{"text": "a\u2028\n"}], 2: []}
    with pytest.raises(ValueError, match="job.journal"):
        Journal(path, "job 2").open()
    journal.remove()
    assert not path.exists()


@pytest.mark.parametrize("lost", range(1, 30))
def test_a_half_written_line_is_cut_off_wherever_it_breaks(tmp_path, lost):
    path = tmp_path / "job.journal"
    journal = Journal(path, "job")
    journal.open()
    journal.append(0, [{"n": 0}])
    whole = path.read_bytes()
    journal.append(1, [{"n": 1}])
    path.write_bytes(path.read_bytes()[:-lost])
    journal = Journal(path, "job")
    assert journal.open() == {0: [{"n": 0}]}
    assert path.read_bytes() == whole
    journal.append(1, [{"n": 1}])
    assert journal.open() == {0: [{"n": 0}], 1: [{"n": 1}]}


def test_a_journal_that_broke_in_its_first_line_starts_over(tmp_path):
    path = tmp_path / "job.journal"
    path.write_bytes(b'{"jo')
    assert Journal(path, "job").open() == {}
    assert json.loads(path.read_text()) == {"job": "job"}


def test_a_job_that_finished_nothing_binds_nobody(tmp_path):
    path = tmp_path / "job.journal"
    first = Journal(path, "job 1")
    assert not first.has_batches()
    first.open()
    first.append(-1, [{"note": 1}])
    assert not first.has_batches() and Journal(path, "job 1").open() == {-1: [{"note": 1}]}
    second = Journal(path, "job 2")
    assert second.open() == {}
    second.append(0, [{"n": 0}])
    assert first.has_batches()
    with pytest.raises(ValueError, match="job.journal"):
        first.open()


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "job.journal"
    journal = Journal(path, "job")
    journal.open()
    journal.append(0, [])
    journal.append(1, [])
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1][:5]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match="job.journal.*line 2"):
        Journal(path, "job").open()


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "r.metadata.json"
    path.write_text('{"seed": 1}')
    assert read_json(path) == {"seed": 1}
    for content in (b'{"seed"', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="r.metadata.json is damaged"):
            read_json(path)


def test_metrics_go_to_a_file_from_the_first_process_only(tmp_path):
    callback, args = MetricsFile(), SimpleNamespace(output_dir=str(tmp_path / "out"))
    entry = {"loss": 0.5, "bad": float("nan"), "worse": float("-inf"), "norm": torch.tensor(0.25), "step": 3}
    for first in (False, True):
        state = SimpleNamespace(is_world_process_zero=first, global_step=2, log_history=[entry])
        callback.on_train_begin(args, state, None)
        callback.on_log(args, state, None, logs={})
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"event": "train_begin", "step": 2},
        {"loss": 0.5, "bad": None, "worse": None, "norm": 0.25, "step": 3},
    ]
