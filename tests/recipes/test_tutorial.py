"""What a newcomer pastes runs as it stands: README's script as a whole, the tutorial's commands at tiny sizes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from tiny import tiny_llama, tiny_tokenizer

# What the tutorial's sizes become.
TINY = {
    "--num_samples": "4", "--max_new_tokens": "16", "--max_completion_length": "16", "--max_steps": "2",
    "--num_prompts": "4",
}  # fmt: skip


def blocks(page, language):
    """The fenced texts of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def run(command, folder, **variables):
    """Runs a command in a folder where `recipes/` is, and returns what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def as_run_here(text, model):
    """A command of the tutorial, as words: this Python, a tiny model, tiny sizes."""
    words = shlex.split(text.replace("\\\n", " "))
    if words[:2] == ["accelerate", "launch"]:
        words[:2] = ["python", "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    words = [sys.executable if word == "python" else str(model) if word == "MODEL" else word for word in words]
    for place, word in enumerate(words[:-1]):
        words[place + 1] = TINY.get(word, words[place + 1])
    return words


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run_one_after_the_other(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    model = tmp_path / "model"
    tiny_llama(layers=1).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    work = tmp_path / "work"
    work.mkdir()
    rows = [{"prompt": f"w{number} w{number + 1}", "answer": f"w{number % 3}"} for number in range(1, 25)]
    assert json.loads(blocks("docs/tutorial.md", "json")[0]).keys() == rows[0].keys()
    for name in ("prompts", "test"):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "rewards.py").write_text(blocks("docs/tutorial.md", "python")[0])

    said = [run(as_run_here(text, model), tmp_path) for text in blocks("docs/tutorial.md", "bash")]
    assert len(said) == 5
    sampled, fitted, _, trained, compared = said
    assert "96 completions of 24 prompts" in sampled and "next: accelerate launch recipes/pretrain_lenvm.py" in sampled
    assert "gamma" in fitted and "the other half of the samples" in fitted
    assert (work / "viewer.html").read_text().startswith("<!DOCTYPE html>")
    assert "next: python -m eval.tradeoff --run_dir work/run" in trained
    assert "base" in compared and (work / "run/tradeoff/tradeoff.png").is_file()


@pytest.mark.slow
def test_the_script_of_the_readme_shortens_completions(tmp_path):
    [script] = [text for text in blocks("README.md", "python") if "fit_policy" in text]
    assert len(script.splitlines()) <= 25
    script += "\nimport json\nprint('LOG', json.dumps(trainer.state.log_history))\n"
    path = Path(tmp_path / "script.py")
    path.write_text(script)
    [line] = [line for line in run([sys.executable, str(path)], tmp_path).splitlines() if line.startswith("LOG ")]
    lengths = [entry["length/mean"] for entry in json.loads(line[4:]) if "length/mean" in entry]
    assert lengths[-1] < 0.8 * lengths[0]
