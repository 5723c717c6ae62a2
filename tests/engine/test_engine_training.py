"""Both trainers with a real vLLM in their process: what it writes is the policy's as it is at that step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from colocated_run import policy_of_run
from tiny import EOS
from trainer_parts import random_lenvm

from lenvm_rl.decoding import LengthGuidance, LengthGuidedLogitsProcessor

STRENGTH, TOP_K = 6.0, 8


def outcome(folder, **settings):
    """What a run in a process of its own found."""
    program = Path(__file__).with_name("colocated_run.py")
    command = [sys.executable, str(program), str(folder), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "found.pt", weights_only=True)


def log_probabilities(weights, batch, guidance=None):
    """Those of the completions' tokens under a policy of these weights, guided or not, `(B, T)`; 0 where none is."""
    policy, lenvm = policy_of_run(), random_lenvm().freeze()
    policy.load_state_dict(weights)
    mask = batch["completion_mask"].bool()
    found = torch.zeros(mask.shape)
    for row, (exists, completion) in enumerate(zip(mask, batch["completion_ids"], strict=True)):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        processor = LengthGuidedLogitsProcessor(lenvm, guidance or LengthGuidance(), eos_token_id=EOS)
        for place in range(int(exists.sum())):
            ids = torch.cat([prompt, completion[:place]]).unsqueeze(0)
            with torch.no_grad():
                scores = processor(ids, policy(ids).logits[:, -1])
            found[row, place] = scores.log_softmax(dim=1)[0, completion[place]]
    return found


# Adapters are merged into the weights that go to the engine; the critic reads the base without them.
LORA = {"lora": True, "learning_rate": 3e-2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "settings"), [("grpo", {}), ("ppo", {}), ("grpo", LORA), ("ppo", {**LORA, "critic_form": "head"})]
)
def test_the_engine_samples_from_the_policy_of_each_step(tmp_path, trainer, settings):
    """Its log-probabilities are those that the policy has when it is asked, and not those that it began with."""
    found = outcome(tmp_path, trainer=trainer, **settings)
    batches, first = found["batches"], policy_of_run().state_dict()
    assert len(batches) == 4
    for step, batch in enumerate([*batches, found["evaluated"]]):
        mask = batch["completion_mask"].bool()
        said = batch["sampling_per_token_logps"][mask]
        torch.testing.assert_close(said, log_probabilities(batch["policy"], batch)[mask], rtol=0, atol=1e-5)
        begun = (said - log_probabilities(first, batch)[mask]).abs().max()
        assert begun < 1e-5 if step == 0 else begun > 1e-2
        assert batch["importance_sampling_ratio"].sub(1.0).abs().max() < 1e-3
        # The length stream: one advantage for each token.
        assert batch["advantages"].shape == mask.shape and float(batch["advantages"][mask].std()) > 0
    logs = [entry for entry in found["log"] if "loss" in entry]
    assert len(logs) == 4 and all("length/coef" in entry for entry in logs)
    assert all(("critic/value_loss" in entry) == (trainer == "ppo") for entry in logs)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["grpo", "ppo"])
def test_guided_rollouts_are_drawn_from_the_guidance_and_weighed_by_the_policy(tmp_path, trainer):
    """Of training: the engine's log-probabilities are those of p', TRL's ratio is p / p'. Evaluation has neither."""
    guidance = LengthGuidance(strength=STRENGTH, top_k=TOP_K)
    given = {"rollout_guidance": {"strength": STRENGTH}, "top_k": TOP_K, "length_coef": 0.0}
    found = outcome(tmp_path, trainer=trainer, vllm_importance_sampling_mode="token_truncate", **given)
    ratios = [entry["guidance/ratio"] for entry in found["log"] if "guidance/ratio" in entry]
    truncated = [entry["guidance/truncated"] for entry in found["log"] if "guidance/truncated" in entry]
    assert len(ratios) == len(truncated) == len(found["batches"]) == 4
    for step, batch in enumerate(found["batches"]):
        mask = batch["completion_mask"].bool()
        guided, own = (log_probabilities(batch["policy"], batch, each)[mask] for each in (guidance, None))
        torch.testing.assert_close(batch["sampling_per_token_logps"][mask], guided, rtol=0, atol=1e-4)
        ratio = (own - guided).exp()
        torch.testing.assert_close(batch["importance_sampling_ratio"][mask], ratio.clamp(max=3.0), rtol=1e-3, atol=0)
        assert float(ratio.std()) > 0.1
        assert ratios[step] == pytest.approx(float(ratio.mean()), rel=1e-3)
        assert truncated[step] == pytest.approx(float((ratio > 3.0).float().mean()))
    batch = found["evaluated"]
    mask = batch["completion_mask"].bool()
    # TRL's own rule, the most probable ones, is what the engine draws from.
    own = log_probabilities(batch["policy"], batch, LengthGuidance(top_k=TOP_K))[mask]
    torch.testing.assert_close(batch["sampling_per_token_logps"][mask], own, rtol=0, atol=1e-4)
