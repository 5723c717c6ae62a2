"""Completions of vLLM, by a stand-in for TRL's engine: its importance ratios go with advantages per token."""

from types import SimpleNamespace

import pytest
import torch
import trl.trainer.grpo_trainer as trl_grpo
from tiny import EOS
from trainer_parts import first_is_w8, grpo, logged, ppo, random_lenvm


class StandIn:
    """What TRL asks of its vLLM engine: weights, and completions with the log-probability of each token."""

    def __init__(self, **kwargs):
        self.mode, self.synced = kwargs["mode"], 0
        # Asked for by TRL in server mode, which trusts only log-probabilities of what was sampled from.
        info = {"model_config": {"logprobs_mode": "processed_logprobs"}}
        self.vllm_client = SimpleNamespace(get_server_info=lambda: info)

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler=None, **kwargs):
        completions = [[8, 9, EOS] if row % 2 else [8, EOS] for row in range(len(prompts))]
        return (
            prompts,
            completions,
            [[[-2.0 - 0.25 * (row % 3)] for _ in ids] for row, ids in enumerate(completions)],
            None,
        )


@pytest.mark.parametrize("make", [grpo, ppo])
@pytest.mark.parametrize(("mode", "where"), [("token_truncate", "colocate"), ("sequence_mask", "server")])
def test_advantages_go_with_the_importance_ratios_of_vllm(tmp_path, monkeypatch, make, mode, where):
    monkeypatch.setattr(trl_grpo, "VLLMGeneration", StandIn)
    trainer = make(
        tmp_path, first_is_w8, random_lenvm(), use_vllm=True, vllm_mode=where, length_coef=0.5, length_gate="all",
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=1.3, loss_type="dapo", max_steps=2,
        learning_rate=1e-3, **({"critic": "lenvm"} if make is ppo else {}),
    )  # fmt: skip
    batches, compute = [], trainer._compute_loss

    def spy(model, inputs):
        batches.append(inputs)
        return compute(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    # The weights of every step go to the engine before it writes.
    assert trainer.vllm_generation.synced == len(batches) == 2
    for batch, loss in zip(batches, logged(trainer, "loss"), strict=True):
        mask = batch["completion_mask"]
        log_ratio = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * mask
        if mode == "token_truncate":
            ratio = log_ratio.exp().clamp(max=1.3)
        else:
            ratio = log_ratio.sum(1, keepdim=True).exp()
            ratio = torch.where(ratio > 1.3, 0.0, ratio)
        torch.testing.assert_close(batch["importance_sampling_ratio"] * mask, ratio * mask)
        assert batch["advantages"].shape == mask.shape and float(ratio.std()) > 0
        assert loss == pytest.approx(-float((ratio * batch["advantages"] * mask).sum() / mask.sum()), abs=1e-5)
