"""docs/metrics.md says what is logged: each name, in which lines, when it is absent and when it is null."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from places import ROOT
from ragged import EOS, random_rollouts
from tiny import tiny_llama, tiny_tokenizer
from trainer_parts import VOCAB, first_is_w8, grpo, no_reward, ppo, prompts, random_lenvm, scripted

from lenvm_rl.pretraining.metrics import POINTS, length_value_metrics
from lenvm_rl.pretraining.references import reference_metrics
from lenvm_rl.pretraining.trainer import LengthValueTrainingArguments, pretrain
from lenvm_rl.rollouts.record import RolloutMetadata
from lenvm_rl.tokenization import tokenizer_fingerprint
from lenvm_rl.trainers import LenVMPPOTrainer

PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
OURS = ["Completions", "Length value model", "Streams of advantage", "Task critic"]
POLICY = [*OURS, "TRL's own"]
# Every absence that a table names; a run says which of them hold.
NO_LENVM, NO_CRITIC, EVALUATION = "no length value model", "no learned critic", "evaluation"
NO_KL = "`beta = 0`"
NO_RATIO_CLIP, NO_CISPO = "`loss_type` cispo, sapo or vespo", "`loss_type` other than cispo"
ABSENCES = {NO_LENVM, NO_CRITIC, EVALUATION, NO_KL, NO_RATIO_CLIP, NO_CISPO}


@dataclass(frozen=True)
class Row:
    """A row of a table: a name, the cells after it, and what its last cell says of absence and null."""

    name: str
    cells: tuple[str, ...]

    @property
    def absences(self):
        return {part for part in self.cells[-1].split("; ") if part != "–" and not part.startswith("null: ")}

    @property
    def nullable(self):
        return "null: " in self.cells[-1]


def rows(*sections):
    """Rows of the tables of sections; names with `<p>` stand for one at each point, `<function>` for the test's own."""
    found = []
    for section in sections:
        (body,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
        for line in re.findall(r"^\| (`.+) \|$", body, re.MULTILINE):
            first, *cells = line.split(" | ")
            name = first.strip("`").replace("<function>", "first_is_w8")
            points = POINTS if "<p>" in name else [None]
            found.extend(Row(name.replace("<p>", str(point)), tuple(cells)) for point in points)
    return found


def columns(kind):
    """Columns of metrics.jsonl that stand in every line of a kind."""
    return {row.name for row in rows("metrics.jsonl") if kind in row.cells[0].split(", ")}


def there(absences, sections=POLICY):
    """Metrics of policies that the page promises where certain absences hold."""
    return {row.name for row in rows(*sections) if not row.absences & absences}


def lines(folder):
    """The lines of metrics.jsonl in order, each as (kind, entry)."""
    found = []
    for text in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(text)
        marks = {"event": "event", "train_runtime": "closing", "eval_loss": "evaluation"}
        found.append((next((kind for mark, kind in marks.items() if mark in entry), "training"), entry))
    return found


def entries(folder, kind):
    return [entry for found, entry in lines(folder) if found == kind]


def with_kl(folder, **settings):
    """GRPO with everything that it can log; the reference model is loaded from disk."""
    tiny_llama(VOCAB, seed=1).save_pretrained(folder / "policy")
    return grpo(folder, first_is_w8, random_lenvm(), policy=str(folder / "policy"), beta=0.1, **settings)


RUNS = {
    "GRPO alone": (
        lambda folder, **settings: grpo(folder, first_is_w8, loss_type="cispo", **settings),
        {NO_LENVM, NO_CRITIC, NO_KL, NO_RATIO_CLIP},
    ),
    "GRPO": (with_kl, {NO_CRITIC, NO_CISPO}),
    "PPO": (
        lambda folder, **settings: ppo(folder, first_is_w8, random_lenvm(), length_coef=0.1, **settings),
        {NO_KL, NO_CISPO},
    ),
    "PPO without a length value model": (
        lambda folder, **settings: ppo(folder, first_is_w8, max_grad_norm=0.0, **settings),
        {NO_LENVM, NO_KL, NO_CISPO},
    ),
    "PPO without a critic": (
        lambda folder, **settings: ppo(folder, first_is_w8, random_lenvm(), critic="lenvm", **settings),
        {NO_CRITIC, NO_KL, NO_CISPO},
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_policy_logs_what_the_page_says_and_nothing_else(tmp_path, run):
    make, absences = RUNS[run]
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    trainer.evaluate(prompts(4))
    assert [kind for kind, _ in lines(tmp_path)] == ["event", "training", "closing", "evaluation"]
    logged = {kind: set(entry) for kind, entry in lines(tmp_path)}
    assert logged["event"] == columns("event") and logged["closing"] == columns("closing")
    assert logged["training"] == there(absences) | columns("training")
    evaluated = {f"eval_{name}" for name in there(absences | {EVALUATION})}
    assert logged["evaluation"] == evaluated | columns("evaluation")


def pretraining_folder(folder):
    """A folder with the metrics of a short pretraining and its evaluation."""
    tokenizer = tiny_tokenizer()
    metadata = RolloutMetadata("policy", tokenizer_fingerprint(tokenizer), {}, 0, [EOS], truncated_share=0.2)
    args = LengthValueTrainingArguments(
        str(folder), max_steps=1, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
    )
    train, held_out = (Dataset.from_list(random_rollouts(8, seed)) for seed in (0, 1))
    pretrain(tiny_llama(), train, metadata, args, tokenizer, held_out)
    return folder


def test_pretraining_logs_what_the_page_says_and_nothing_else(tmp_path):
    logged = {kind: set(entry) for kind, entry in lines(pretraining_folder(tmp_path))}
    names = {row.name for row in rows("Value pretraining")}
    of_evaluation = {name for name in names if name.startswith("eval_")}
    assert logged["event"] == columns("event") and logged["closing"] == columns("closing")
    assert logged["training"] == names - of_evaluation | columns("training")
    assert logged["evaluation"] == of_evaluation | columns("evaluation")


def test_every_absence_on_the_page_is_one_that_the_runs_know():
    """So that a misspelt one does not pass for one that never holds; and no row stands there twice."""
    for sections in (POLICY, ["Value pretraining"], ["metrics.jsonl"]):
        names = [row.name for row in rows(*sections)]
        assert len(names) > 10 and len(names) == len(set(names))
    assert set().union(*(row.absences for row in rows(*POLICY))) == ABSENCES
    assert not any(row.absences for row in rows("Value pretraining"))


def test_every_metric_that_the_text_mentions_is_in_a_table():
    known = {row.name for row in rows(*POLICY)}
    mentioned = re.findall(r"`((?:length|lenvm|advantage|critic|completions|clip_ratio)/[^`]*)`", PAGE)
    assert len(mentioned) > 50
    assert [name for name in mentioned if name not in known and not name.endswith("/…")] == []


def nothing_defined(folder, **settings):
    """PPO on completions that are all cut, of which two reward functions differ about what is correct."""

    def no_other(completions, **kwargs):
        return [0.0] * len(completions)

    cut = scripted(LenVMPPOTrainer, [[8, 9, 10]] * 8)
    return ppo(
        folder, [no_reward, no_other], random_lenvm(), trainer=cut, max_completion_length=3, max_steps=1, **settings
    )


def nulls(folder):
    (line,) = entries(folder, "training")
    return {name for name, value in line.items() if value is None}


def test_nulls_of_a_policy_are_those_on_the_page(tmp_path):
    nothing_defined(tmp_path).train()
    assert nulls(tmp_path) == {row.name for row in rows(*POLICY) if row.nullable}


def test_a_batch_without_tokens_leaves_the_nulls_that_the_page_names(tmp_path):
    nothing_defined(tmp_path, mask_truncated_completions=True).train()
    empty = {row.name for row in rows(*OURS[1:])} - {"critic/grad_norm", "critic/learning_rate", "lenvm/stale"}
    assert {name for name in nulls(tmp_path) if name.startswith(("lenvm/", "advantage/", "critic/"))} == empty


def test_nulls_of_pretraining_are_those_on_the_page():
    # Two prompts with two completions of one token each, one of them cut, and the same value everywhere.
    ones, finished, groups = torch.ones(4, dtype=torch.long), torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 1, 1])
    metrics = length_value_metrics(torch.zeros(4, 1), ones, finished, groups, 0.5)
    metrics |= reference_metrics(ones, ones, finished, groups, 0.5)
    undefined = {f"eval_{name}" for name, value in metrics.items() if value != value}
    assert undefined == {row.name for row in rows("Value pretraining") if row.nullable}


def test_steps_that_reuse_a_batch_log_what_the_page_says(tmp_path):
    ppo(tmp_path, first_is_w8, random_lenvm(), max_steps=2, num_iterations=2).train()
    (listed,) = re.findall(r"^- Every optimizer step gives (.+?)\. All other", PAGE, re.MULTILINE | re.DOTALL)
    listed = re.findall(r"`([^`]+)`", listed)
    of_step = there({NO_KL, NO_CISPO}, [*POLICY, "Divergence within a batch"]) | columns("training")
    of_step = {n for n in of_step if any(n == each or n.startswith(each.removesuffix("…")) for each in listed)}
    fresh, reused = (set(entry) for entry in entries(tmp_path, "training"))
    assert reused == {name.replace("<k>", "2") for name in of_step} | {"epoch", "step"}
    assert fresh > {name.replace("pass_2", "pass_1") for name in reused}


def test_the_closing_line_takes_what_no_training_line_had(tmp_path):
    grpo(tmp_path, first_is_w8, random_lenvm(), max_steps=3, logging_steps=2).train()
    (closing,) = entries(tmp_path, "closing")
    gathered = there({NO_CRITIC, NO_KL, NO_CISPO}) - {"loss"}
    assert set(closing) == gathered | columns("closing")


def test_lengths_of_trl_count_the_end_of_sequence(tmp_path):
    grpo(tmp_path, first_is_w8, max_steps=3).train()
    for entry in entries(tmp_path, "training"):
        expected = entry["length/mean"] + 1 - entry["length/truncated"]
        assert entry["completions/mean_length"] == pytest.approx(expected) and entry["length/truncated"] < 1


def test_the_recipe_for_reading_leaves_out_lost_steps(tmp_path, monkeypatch):
    (recipe,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    begin = {"event": "train_begin"}
    written = [{**begin, "step": 0}, *({"step": step, "try": 1} for step in (1, 2, 3))]
    written += [{**begin, "step": 2}, *({"step": step, "try": 2} for step in (3, 4))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, written)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(recipe, names)
    assert [(line["step"], line["try"]) for line in names["lines"]] == [(1, 1), (2, 1), (3, 2), (4, 2)]
