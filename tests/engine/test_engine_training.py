"""Both trainers with a real vLLM in their process: what it writes is the policy's as it is at that step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from trainer_parts import VOCAB


def outcome(folder, **settings):
    """What a run in a process of its own found."""
    program = Path(__file__).with_name("colocated_run.py")
    command = [sys.executable, str(program), str(folder), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "found.pt", weights_only=True)


def log_probabilities(weights, batch):
    """Those of the completions' tokens under a policy of these weights, `(B, T)`."""
    policy = tiny_llama(VOCAB, hidden=128)
    policy.load_state_dict(weights)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = policy(ids, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0)).logits
    width = batch["completion_ids"].shape[1]
    logps = logits[:, -width - 1 : -1].log_softmax(dim=-1)
    return logps.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["grpo", "ppo"])
def test_the_engine_samples_from_the_policy_of_each_step(tmp_path, trainer):
    """Its log-probabilities are those that the policy has when it is asked, and not those that it began with."""
    found = outcome(tmp_path, trainer=trainer)
    batches, first = found["batches"], tiny_llama(VOCAB, hidden=128, seed=1).state_dict()
    assert len(batches) == 4
    for step, batch in enumerate(batches):
        mask = batch["completion_mask"].bool()
        said = batch["sampling_per_token_logps"][mask]
        torch.testing.assert_close(said, batch["old_per_token_logps"][mask], rtol=0, atol=1e-5)
        begun = (said - log_probabilities(first, batch)[mask]).abs().max()
        assert begun < 1e-5 if step == 0 else begun > 1e-2
        # The length stream: one advantage for each token.
        assert batch["advantages"].shape == mask.shape and float(batch["advantages"][mask].std()) > 0
        assert batch["importance_sampling_ratio"].sub(1.0).abs().max() < 1e-3
    assert any(not torch.equal(weight, first[name]) for name, weight in found["policy"].items())
    logs = [entry for entry in found["log"] if "loss" in entry]
    assert len(logs) == 4 and all("length/coef" in entry for entry in logs)
    assert all(("critic/value_loss" in entry) == (trainer == "ppo") for entry in logs)
