"""Bad input of value pretraining: an error that says what is wrong, and every file as it was."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from ragged import EOS, make_rollout, random_rollouts
from test_pretraining import make_args, make_metadata
from tiny import tiny_llama, tiny_tokenizer

from lenvm_rl.files import Journal
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.arguments import check_precision
from lenvm_rl.pretraining.trainer import LengthValueTrainer, pretrain
from lenvm_rl.returns import fit_gamma
from lenvm_rl.rollouts.record import metadata_path, read_rollouts, rejected_path, write_rollouts
from recipes import pretrain_lenvm

TOKENIZER = tiny_tokenizer()
GOOD = random_rollouts(12, cut_share=0.0)
CUT = [make_rollout([6, 7], [8, 9, 10], "length", group) for group in range(4)]


def write(path, records):
    """A rollout file as a careless program would write it: unchecked, its metadata beside it."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    make_metadata(TOKENIZER).save(metadata_path(path))
    return path


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def pretrain_file(tmp_path, path, tokenizer=TOKENIZER, vocab_size=64, **changes):
    """The whole way from a file to a model."""
    rollouts, metadata = read_rollouts(path)
    args = make_args(tmp_path, max_steps=1, per_device_train_batch_size=4, **changes)
    return pretrain(tiny_llama(vocab_size), rollouts, metadata, args, tokenizer)


# The file, what is changed about the run, and what the error says.
REFUSED = {
    "an empty file": ([], {}, "holds no valid rollout .0 records read, 0 rejected"),
    "no finished completion": (CUT, {}, "None of the 4 completions is both finished and selected.*more new tokens"),
    "every completion truncated, and dropped": (CUT, {"truncated": "drop"}, "None of the 4 completions is both"),
    "lengths 0": ([make_rollout([6], [])] * 3, {}, "holds no valid rollout .3 records read, 3 rejected"),
    "a token that nobody knows": (
        [make_rollout([6], [64, EOS])],
        {},
        "holds no valid rollout .1 records read, 1 rejected",
    ),
    "a token outside the backbone's vocabulary": (
        [*GOOD, make_rollout([6], [63, EOS])],
        {"vocab_size": 63},
        "ids up to 63, but the model embeds 63 tokens",
    ),
    "another tokenizer": (GOOD, {"tokenizer": tiny_tokenizer(60)}, "vocabulary of 60 tokens.*one of 64"),
    "gamma 1": (GOOD, {"gamma": 1.0}, "gamma must lie strictly between 0 and 1, got 1.0"),
    "gamma 0": (GOOD, {"gamma": 0.0}, "gamma must lie strictly between 0 and 1, got 0.0"),
    "gamma above 1": (GOOD, {"gamma": 1.5}, "gamma must lie strictly between 0 and 1, got 1.5"),
    "gamma below 0": (GOOD, {"gamma": -0.1}, "gamma must lie strictly between 0 and 1, got -0.1"),
    "gamma not a number": (GOOD, {"gamma": float("nan")}, "gamma must lie strictly between 0 and 1, got nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_is_refused_and_nothing_is_lost(tmp_path, case):
    records, changes, problem = REFUSED[case]
    path = write(tmp_path / "rollouts.jsonl", records)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=problem):
        pretrain_file(tmp_path, path, **changes)
    after = contents(tmp_path)
    # Records that are set aside are in a file of their own, whole.
    rejected = after.pop(rejected_path(path).relative_to(tmp_path), b"")
    assert [json.loads(line)["record"] for line in rejected.splitlines()] in ([], records)
    assert after == before


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (make_rollout([6], []), "completion_ids is empty"),
        (make_rollout([], [7, EOS]), "prompt_ids is empty"),
        (make_rollout([6], [64, EOS]), "holds token 64, outside the vocabulary of 64 tokens"),
        ({**make_rollout([6], [7, EOS]), "finish_reason": "eos"}, "finish_reason must be one of stop, length"),
    ],
)
def test_a_bad_record_among_good_ones_is_set_aside_and_the_rest_is_fitted(tmp_path, bad, reason):
    path = write(tmp_path / "rollouts.jsonl", [*GOOD[:5], bad, *GOOD[5:]])
    before = path.read_bytes()
    model, _ = pretrain_file(tmp_path, path)
    assert model.config.gamma_fit["completions"] == 12
    (entry,) = [json.loads(line) for line in rejected_path(path).read_text().splitlines()]
    assert entry["line"] == 6 and reason in entry["reason"] and entry["record"] == bad
    assert path.read_bytes() == before


def test_a_half_written_last_line_is_set_aside_and_the_rest_is_fitted(tmp_path):
    path = write(tmp_path / "rollouts.jsonl", GOOD)
    path.write_bytes(path.read_bytes()[:-9])
    before = path.read_bytes()
    model, _ = pretrain_file(tmp_path, path)
    assert model.config.gamma_fit["completions"] == 11
    (entry,) = [json.loads(line) for line in rejected_path(path).read_text().splitlines()]
    assert (entry["line"], entry["reason"]) == (12, "half-written last line")
    assert entry["record"].encode() == before.splitlines()[-1] and path.read_bytes() == before


def test_a_parquet_file_that_is_none_is_named(tmp_path):
    path = write(tmp_path / "rollouts.parquet", GOOD)
    with pytest.raises(ValueError, match="rollouts.parquet"):
        read_rollouts(path)


def test_an_evaluation_without_a_finished_completion_is_refused_before_training(tmp_path, monkeypatch):
    def trained(*args, **kwargs):
        raise AssertionError("training began, and its result would be lost")

    monkeypatch.setattr(LengthValueTrainer, "train", trained)
    with pytest.raises(ValueError, match="only_correct"):
        args = make_args(tmp_path)
        metadata = make_metadata(TOKENIZER)
        pretrain(tiny_llama(), Dataset.from_list(GOOD), metadata, args, TOKENIZER, Dataset.from_list(CUT))


@pytest.mark.parametrize("lengths", [[], [0, 3], [-1], [float("nan")]])
def test_lengths_that_are_none_give_no_gamma(lengths):
    with pytest.raises(ValueError, match="at least (one length|1 token)"):
        fit_gamma(lengths)


# A disk that fills


@contextmanager
def largest_file(size):
    """Files cannot grow beyond `size` bytes: what a full disk does to the program that writes, as an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["rollouts.jsonl", "rollouts.parquet"])
def test_a_disk_that_fills_leaves_the_old_rollouts(tmp_path, name):
    write_rollouts(tmp_path / name, GOOD[:2], make_metadata(TOKENIZER))
    before = contents(tmp_path)
    with largest_file(1000), pytest.raises(OSError, match="File too large"):
        write_rollouts(tmp_path / name, GOOD * 20, make_metadata(TOKENIZER))
    assert contents(tmp_path) == before


def test_a_disk_that_fills_loses_no_sampled_batch(tmp_path):
    journal = Journal(tmp_path / "rollouts.journal", "job")
    journal.open()
    journal.append(0, GOOD[:3])
    size = journal.path.stat().st_size
    with largest_file(size + 50), pytest.raises(OSError, match="File too large"):
        journal.append(1, GOOD[3:6])
    assert journal.path.stat().st_size == size + 50
    resumed = Journal(journal.path, "job")
    assert resumed.open() == {0: GOOD[:3]} and journal.path.stat().st_size == size
    resumed.append(1, GOOD[3:6])
    assert Journal(journal.path, "job").open() == {0: GOOD[:3], 1: GOOD[3:6]}


def test_a_disk_that_fills_leaves_the_checkpoint_to_go_on_from(tmp_path):
    rollouts, metadata = Dataset.from_list(GOOD), make_metadata(TOKENIZER)
    settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4, "num_train_epochs": 2}

    def run(**changes):
        return pretrain(tiny_llama(), rollouts, metadata, make_args(tmp_path, **settings), TOKENIZER, **changes)

    whole, _ = run()
    for path in (tmp_path / "out").iterdir():
        if path.is_file():
            path.unlink()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    for name in ("checkpoint-4", "checkpoint-6"):
        (tmp_path / "out" / name).rename(tmp_path / name)
    before = contents(checkpoint)
    # safetensors reports the system's error under a name of its own.
    with largest_file(2000), pytest.raises(Exception, match="File too large|file too large|os error 27"):
        run(resume=True)
    assert contents(checkpoint) == before
    for path in (tmp_path / "out").glob("checkpoint-4*"):
        path.rename(tmp_path / "partial")
    resumed, _ = run(resume=True)
    for name, weight in whole.state_dict().items():
        assert weight.equal(resumed.state_dict()[name]), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_head_that_would_be_cast_by_a_sharding_engine_is_refused(precision):
    args = SimpleNamespace(**{"bf16": False, "fp16": False, precision: True})
    check_precision(args, sharded=False)
    check_precision(SimpleNamespace(bf16=False, fp16=False), sharded=True)
    with pytest.raises(ValueError, match="or launch with DDP"):
        check_precision(args, sharded=True)


def test_the_recipe_refuses_as_the_library_does(tmp_path):
    path = write(tmp_path / "rollouts.jsonl", [])
    tiny_llama().save_pretrained(tmp_path / "policy")
    TOKENIZER.save_pretrained(tmp_path / "policy")
    line = ["--rollouts", str(path), "--model_name_or_path", str(tmp_path / "policy"), "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="holds no valid rollout"):
        pretrain_lenvm.main(*pretrain_lenvm.make_parser().parse_args_and_config([*line, "--use_cpu", "true"]))
    assert isinstance(LengthValueModel.from_backbone(str(tmp_path / "policy"), gamma=0.9), LengthValueModel)
