"""Both trainers on two processes (gloo): the same weights, the same numbers, and groups that span both."""

import pytest
from launched import run_two
from places import PATHS

TWO_PROCESSES = """
import sys
sys.path[:0] = {paths!r}
import torch

from critic_parts import reward_model
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from trainer_parts import first_is_w8, grpo, ppo, random_lenvm

from lenvm_rl.trainers import streams
from lenvm_rl.trainers.streams import Completions, Outcomes, Processes, centered_gated_advantage, whiten

def sum_of_ids(completion_ids, **kwargs):
    return [sum(ids) / 100 for ids in completion_ids]

starts = []

def spy(*arguments):
    starts.append(arguments[-1].first_row)
    return centered_gated_advantage(*arguments)

streams.centered_gated_advantage = spy

def check(name, trainer):
    trainer.train()
    parts = [trainer.model, trainer.accelerator.unwrap_model(trainer.length_value_model)]
    parts += [trainer.accelerator.unwrap_model(trainer.critic)] if name == "ppo" else []
    flat = torch.cat([p.detach().flatten() for part in parts for p in part.parameters()])
    everyone = trainer.accelerator.gather(flat.unsqueeze(0))
    assert everyone.shape[0] == 2 and torch.equal(everyone[0], everyone[1]), "the processes have drifted apart"
    keys = sorted(key for key in trainer.state.log_history[-2] if "/" in key and not key.startswith("profiling"))
    mine = torch.tensor([trainer.state.log_history[-2][k] or 0.0 for k in keys if k.startswith(("le", "adv"))])
    everyone = trainer.accelerator.gather(mine.unsqueeze(0))
    assert torch.equal(everyone[0], everyone[1]), "the processes logged different numbers"

# A process generates eight completions at once (four for each of two steps), and groups are of sixteen: they span both.
common = dict(per_device_train_batch_size=4, num_generations=16, length_coef=0.5, length_gate_center=True,
              gradient_accumulation_steps=2, gate_threshold=-1.0, ddp_backend="gloo", max_steps=3)
check("grpo", grpo({folder!r} + "/grpo", first_is_w8, random_lenvm(), length_target=2.0, **common))
trainer = ppo({folder!r} + "/ppo", sum_of_ids, random_lenvm(), shaping_coef=0.5, **common)
check("ppo", trainer)
# Each process has groups and tokens of the other in its gate, its whitening and its coefficient.
more = dict(common, length_gate_center=False, length_gate="pass_rate", critic_warmup_steps=1, accuracy_floor=0.1)
for whiten_what in ("streams", "sum"):
    check("ppo", ppo({folder!r} + "/" + whiten_what, first_is_w8, random_lenvm(), whiten=whiten_what, **more))

# A critic of which adapters and head learn, and one that does not learn.
adapted = get_peft_model(reward_model(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
check("ppo", ppo({folder!r} + "/adapted", first_is_w8, random_lenvm(), critic=adapted, **more))
still = dict(more, critic_warmup_steps=0, critic_learning_rate=0.0)
check("ppo", ppo({folder!r} + "/still", first_is_w8, random_lenvm(), critic=reward_model(), **still))

# A critic of which a head, or an adapter and a head, learn on the base under the policy's adapters.
for form in ("head", "adapter"):
    policy = get_peft_model(tiny_llama(16, seed=1), LoraConfig(r=2, target_modules=["q_proj"]))
    check("ppo", ppo({folder!r} + "/" + form, first_is_w8, random_lenvm(), policy=policy, critic_form=form, **more))

# Each process re-fits the length value model to completions of its own, with the gradients of both: it moves alike.
def flat_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])

refresh = dict(refresh_steps=1, refresh_learning_rate=1e-2, refresh_completions=20)
lenvm = random_lenvm()
start = flat_of(lenvm)
refreshed = ppo({folder!r} + "/refresh", first_is_w8, lenvm, **refresh, **more)
check("ppo", refreshed)
assert float((flat_of(lenvm) - start).abs().max()) > 1e-3, "the length value model has not moved"
assert "refresh/loss_last" in refreshed.state.log_history[-2]
rows = refreshed._frozen.refresh.rollouts
assert len(rows) == 10, "twenty completions of both"
sums = torch.tensor([float(sum(sum(row["completion_ids"]) * i for i, row in enumerate(rows)))])
first, second = trainer.accelerator.gather(sums)
assert first != second, "both keep the same completions"

# A process reads its own rows of what all completions were paid and centred with.
process = trainer.accelerator.process_index
assert set(starts) == {{8 * process}}
trainer.model.train()
batch = trainer._generate_and_score_completions([dict(trainer.train_dataset[0]) for _ in range(8)])
mine = trainer._collect(batch | {{"advantages": torch.zeros(8)}}).outcomes.rewards
torch.testing.assert_close(mine, (batch["completion_ids"] * batch["completion_mask"]).sum(1) / 100)
# DDP averages what each process makes of the value loss into the mean over the tokens of all.
trainer.current_gradient_accumulation_steps = 2
loss = trainer.accelerator.reduce(trainer._value_loss(batch).detach(), "mean")
trainer.unread.read()
assert abs(float(loss) - trainer._metrics["train"]["critic/value_loss"][-1]) < 1e-6 < float(loss)
first, second = trainer.accelerator.gather(mine).view(2, 8)
assert not torch.equal(first, second)

# Half of the rows on each process give half of what one process makes of them all.
torch.manual_seed(0)
mask = torch.arange(5) < torch.randint(1, 6, (8, 1))
values, correct, nothing = -torch.rand(8, 5), torch.rand(8) < 0.6, torch.zeros(8)

def stream(rows, **processes):
    finished = torch.ones(len(mask[rows]), dtype=torch.bool)
    completions = Completions(mask[rows], mask[rows], finished, mask[rows].sum(1))
    judged = torch.ones_like(correct[rows])
    outcomes = Outcomes(nothing[rows], judged, correct[rows], judged)
    return centered_gated_advantage(values[rows], completions, 0.9, nothing[rows], outcomes, Processes(8, **processes))

mine = slice(4 * trainer.accelerator.process_index, 4 * trainer.accelerator.process_index + 4)
torch.testing.assert_close(
    stream(mine, gather=trainer.accelerator.gather, first_row=mine.start), stream(slice(None))[mine]
)
torch.testing.assert_close(whiten(values[mine], mask[mine], trainer._sum_over_processes), whiten(values, mask)[mine])
"""


@pytest.mark.slow
def test_two_processes_stay_together(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(paths=PATHS, folder=str(tmp_path)))
    run_two(script)
