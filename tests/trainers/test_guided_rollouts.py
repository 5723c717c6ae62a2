"""Guided rollouts inside the trainers: what they are drawn from, how they are weighed, and what is refused."""

import pytest
import torch
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer
from trainer_parts import VOCAB, batch_of, counts_of_w8, grpo, logged, ppo, prompts, random_lenvm, settings

from lenvm_rl.decoding import GuidanceReport, LengthGuidance, LengthGuidedLogitsProcessor, generate_guided
from lenvm_rl.decoding.guidance import tilt
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer, rollouts
from lenvm_rl.trainers.rollouts import importance_ratio


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class TestLogProbabilities:
    def test_they_are_those_of_the_two_distributions(self):
        """Against forwards of their own: the tilted distribution, and the policy without its candidate rule."""
        policy, value = tiny_llama(), tiny_length_value_model(tiny_llama(), 0.9, 1).freeze()
        ids = torch.randint(6, 64, (5, 4))
        guidance = LengthGuidance(strength=6.0, temperature=0.8, top_k=5)
        out, report = generate_guided(policy, value, ids, guidance, max_new_tokens=9, return_report=True)
        assert report.log_probs.shape == (5, out.shape[1] - 4)
        for row in range(5):
            prefix, ended = ids[row], False
            for step, token in enumerate(out[row, 4:]):
                if ended:
                    assert report.log_probs[row, step] == 0 and report.policy_log_probs[row, step] == 0
                    continue
                logits = policy(prefix.unsqueeze(0)).logits[0, -1] / 0.8
                kept = logits.topk(5).indices
                states = torch.stack([torch.cat([prefix, candidate.view(1)]) for candidate in kept])
                values = value(states).values[:, -1].masked_fill(kept == 1, 0.0)
                guided = tilt(logits[kept], values, 6.0).log_softmax(-1)[kept == token]
                torch.testing.assert_close(report.log_probs[row, step : step + 1], guided, rtol=0, atol=1e-4)
                plain = logits.log_softmax(dim=0)[token]
                torch.testing.assert_close(report.policy_log_probs[row, step], plain, rtol=0, atol=1e-4)
                prefix, ended = torch.cat([prefix, token.view(1)]), bool(token == 1)

    def test_other_sequences_are_refused(self):
        policy, value = tiny_llama(), tiny_length_value_model(tiny_llama(), 0.9, 1).freeze()
        processor = LengthGuidedLogitsProcessor(value, LengthGuidance(strength=1.0), eos_token_id=1, record=True)
        policy.generate(torch.randint(6, 64, (2, 3)), logits_processor=[processor], max_new_tokens=3)
        with pytest.raises(ValueError, match="sequences"):
            processor.finish(torch.zeros(2, 6, dtype=torch.long))


def test_the_ratio_by_hand():
    policy = torch.tensor([[0.5, 0.6, 0.9, 1.0]]).log()
    guided = torch.tensor([[0.25, 0.1, 0.9, 1.0]]).log()
    report = GuidanceReport(*[torch.zeros(1)] * 3, guided, policy)
    ratio, weight = importance_ratio(report, torch.tensor([[1, 1, 1, 0, 0]]))
    torch.testing.assert_close(ratio, torch.tensor([[2.0, 6.0, 1.0, 1.0, 1.0]]))
    torch.testing.assert_close(weight, torch.tensor([[2.0, 3.0, 1.0, 1.0, 1.0]]))


def test_token_weights_turn_guided_samples_into_the_policys_gradient():
    """One step, every token enumerated: sum over p' of (p / p') A grad log p is the sum over p, for any tilt."""
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    values, advantage = -torch.rand(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    policy = logits.log_softmax(dim=0)
    guided = tilt(policy.detach(), values, 4.0).log_softmax(-1)
    report = GuidanceReport(*[torch.zeros(6)] * 3, guided.unsqueeze(1), policy.detach().unsqueeze(1))
    ratio, _ = importance_ratio(report, torch.ones(6, 1))
    weighed = (guided.exp() * ratio.squeeze(1) * advantage * policy).sum()
    own = (policy.detach().exp() * advantage * policy).sum()
    (first,), (second,) = (torch.autograd.grad(each, logits, retain_graph=True) for each in (weighed, own))
    torch.testing.assert_close(first, second)
    unweighed = (guided.exp() * advantage * policy).sum()
    assert not torch.allclose(torch.autograd.grad(unweighed, logits)[0], second, rtol=0.05)


class TestTraining:
    @pytest.mark.parametrize("make", [grpo, ppo])
    def test_strength_zero_is_training_without_guidance(self, tmp_path, make):
        # One after the other: each sets the seed when it is made.
        plain = make(tmp_path / "plain", lenvm=random_lenvm(), length_coef=0.2)
        plain.train()
        guided = make(tmp_path / "guided", lenvm=random_lenvm(), length_coef=0.2, rollout_guidance={"strength": 0.0})
        guided.train()
        torch.testing.assert_close(weights(guided.model), weights(plain.model), rtol=0, atol=1e-6)
        log = [entry for entry in guided.state.log_history if "guidance/ratio" in entry]
        assert len(log) == 3 and all(entry["guidance/ratio"] == pytest.approx(1.0, abs=1e-4) for entry in log)
        assert "generate" not in vars(guided.model)

    def test_guidance_moves_the_lengths_of_training_and_not_of_evaluation(self, tmp_path):
        lengths, ratios = {}, {}
        for strength in (-60.0, 60.0):
            guidance = {"strength": strength}
            trainer = grpo(tmp_path, lenvm=random_lenvm(), rollout_guidance=guidance, max_completion_length=16)
            for mode in ("train", "eval"):
                torch.manual_seed(0)
                lengths[mode, strength] = float(batch_of(trainer, mode)["completion_mask"].sum(dim=1).float().mean())
            ratios[strength] = trainer._metrics["train"]["guidance/ratio"][0]
            assert not trainer._metrics["eval"]["guidance/ratio"]
        assert lengths["train", -60.0] > lengths["train", 60.0] + 2
        assert lengths["eval", -60.0] == lengths["eval", 60.0]
        assert all(ratio != pytest.approx(1.0, abs=1e-2) for ratio in ratios.values())

    def test_the_advantages_are_weighed_token_by_token(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rollouts, "RATIO_MAX", 1.2)
        trainer = grpo(tmp_path, lenvm=random_lenvm(), rollout_guidance={"strength": -2.0})
        seen, put = {}, trainer._set

        def spy(metrics, batch, read, streams):
            seen.update(before=streams.advantages, report=trainer._guidance_report, mask=read.completions.mask)
            put(metrics, batch, read, streams)

        trainer._set = spy
        advantages, mask = batch_of(trainer)["advantages"], seen["mask"]
        report = seen["report"]
        ratio = (report.policy_log_probs - report.log_probs)[:, : mask.shape[1]].exp().clamp(max=1.2)
        torch.testing.assert_close(advantages[mask], (ratio * seen["before"])[mask])
        assert float(ratio[mask].max()) == pytest.approx(1.2) and float(ratio[mask].std()) > 0.01

    def test_what_is_logged(self, tmp_path):
        trainer = grpo(tmp_path, lenvm=random_lenvm(), rollout_guidance={"strength": 8.0}, max_steps=2)
        trainer.train()
        assert len(logged(trainer, "guidance/ratio")) == len(logged(trainer, "guidance/truncated")) == 2


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rollout_guidance": {"strength": 1.0, "top_k": 3}}, "rollout_guidance sets top_k"),
            ({"rollout_guidance": {"beta": 1.0}}, "has beta, which no LengthGuidance has"),
            ({"rollout_guidance": "tilt"}, "no JSON object"),
            ({"rollout_guidance": {"mode": "equal_to"}}, "needs target_length"),
            ({"rollout_guidance": {"strength": 1.0}, "importance_sampling_level": "sequence"}, "same weight"),
        ],
    )
    def test_settings(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            grpo(tmp_path, lenvm=random_lenvm(), **changes)

    def test_without_a_length_value_model(self, tmp_path):
        with pytest.raises(ValueError, match="length_value_model"):
            grpo(tmp_path, lenvm=None, rollout_guidance={"strength": 1.0})

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"vllm_mode": "server"}, "vllm_mode"),
            ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size"),
            ({"vllm_importance_sampling_correction": False}, "vllm_importance_sampling_correction"),
            # TRL's default.
            ({"vllm_importance_sampling_mode": "sequence_mask"}, "vllm_importance_sampling_mode"),
            ({"top_k": 0}, "top_k"),
            ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ],
    )
    def test_settings_of_vllm_before_it_is_loaded(self, tmp_path, changes, named):
        settings = {"vllm_mode": "colocate", "vllm_importance_sampling_mode": "token_truncate", "top_k": 8} | changes
        with pytest.raises(ValueError, match=named):
            grpo(tmp_path, lenvm=random_lenvm(), use_vllm=True, rollout_guidance={"strength": 1.0}, **settings)

    def test_rollouts_of_another_make(self, tmp_path):
        args = LenVMGRPOConfig(**settings(tmp_path, rollout_guidance={"strength": 1.0}))
        with pytest.raises(ValueError, match="both say how to generate"):
            LenVMGRPOTrainer(
                tiny_llama(VOCAB, seed=1),
                counts_of_w8,
                args,
                train_dataset=prompts(),
                processing_class=tiny_tokenizer(VOCAB),
                length_value_model=random_lenvm(),
                rollout_func=lambda *_: {},
            )
