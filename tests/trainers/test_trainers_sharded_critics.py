"""A learned critic in a run whose weights are cut up: it learns what it learns under DDP, and is resumed exactly."""

import json

import pytest
from engines import run_two
from places import PATHS
from test_trainers_forms import base_policy, lenvm_on, saved_policy, with_adapters
from test_trainers_sharded_bases import close
from trainer_parts import ppo

from lenvm_rl.trainers import sharding

SCRIPT = """
import json, os, sys
sys.path[:0] = {paths!r}
engine, folder, *cases = sys.argv[1:]
from engines import is_cut, start, whole
start(engine)

import torch
from functools import partial

from peft import LoraConfig
from test_trainers_forms import LORA
from trainer_parts import counts_of_w8, ppo

from lenvm_rl.trainers import LenVMPPOTrainer

cut = engine in ("fsdp2", "zero3")

def run(case, resume=None, **changes):
    form, base, *more = case.split()
    if base == "adapters":
        torch.manual_seed(2)
        changes["trainer"] = partial(LenVMPPOTrainer, peft_config=LoraConfig(**LORA, init_lora_weights=False))
    changes.update(beta=0.1 if "reference" in case else 0.0, critic_form=form)
    changes.update(dict(critic_warmup_steps=1) if "warmup" in more else {{}})
    changes.update(dict(critic_updates_per_step=2) if "updates" in more else {{}})
    lenvm = folder + "/lenvm" if form == "head" else None
    changes.update(dict(length_coef=0.5) if lenvm else {{}})
    # Bounds that the norms are above of, a schedule, two micro-batches per step, each generation used twice, and steps
    # that make no more of what is rounded otherwise.
    common = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_generations=8, max_steps=4,
                  num_iterations=2, ddp_backend="gloo", save_strategy="steps", save_steps=2, max_grad_norm=0.1,
                  weight_decay=0.1, lr_scheduler_type="linear", critic_learning_rate=1e-2, adam_epsilon=1e-4,
                  use_cpu=not engine.startswith("zero"))
    torch.manual_seed(4)
    trainer = ppo(f"{{folder}}/{{engine}}/{{case}}", counts_of_w8, lenvm, policy=folder + "/policy",
                  **{{**common, **changes}})
    # What starts from random numbers is the first process's in all of them.
    trainer.train(resume_from_checkpoint=resume)
    critic = trainer.accelerator.unwrap_model(trainer.critic)
    for name, weight in critic.named_parameters():
        assert weight.dtype == torch.float32 and is_cut(weight) == (cut and name.startswith("backbone")), name
    log = [[entry[key] for entry in trainer.state.log_history if key in entry]
           for key in ("loss", "critic/value_loss", "critic/explained_variance", "critic/grad_norm",
                       "critic/learning_rate", "reward")]
    models = (critic, trainer.model)
    return log, [whole(weight).flatten().tolist() for model in models for weight in model.parameters()
                 if weight.requires_grad]

results = {{case: run(case) for case in cases}}
for case in cases:
    if "resumed" in case:
        results["again " + case] = run(case, resume=f"{{folder}}/{{engine}}/{{case}}/checkpoint-2")
if torch.distributed.get_rank() == 0:
    with open(f"{{folder}}/{{engine}}/{{len(cases)}}.json", "w") as file:
        json.dump(results, file)
"""
CASES = ["head adapters", "adapter adapters resumed", "adapter reference updates", "head reference"]
# DeepSpeed makes a step of the policy's from every loss, and a decoder that learns is FSDP2's alone.
OF_FSDP2 = ["full none resumed", "adapter adapters warmup resumed"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`launch(engine, *cases)` gives what two processes of the script logged and learned, case by case."""
    folder = tmp_path_factory.mktemp("critics")
    saved_policy(folder / "policy")
    lenvm_on(base_policy(), "head").save_pretrained(folder / "lenvm")
    script = folder / "two.py"
    script.write_text(SCRIPT.format(paths=PATHS))

    def launched(engine, *cases):
        results = folder / engine / f"{len(cases)}.json"
        if not results.exists():
            run_two(script, folder, *cases, engine=engine, timeout=600)
        return json.loads(results.read_text())

    return launched


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_a_critic_beside_a_policy_in_shards_learns_what_it_learns_under_ddp(launch, engine):
    cases = CASES + (OF_FSDP2 if engine == "fsdp2" else [])
    ours, theirs = launch(engine, *cases), launch("ddp", *CASES, *OF_FSDP2)
    for case in cases:
        close(ours[case], theirs[case])
        if "resumed" in case:
            close(ours[f"again {case}"], ours[case])
    # Four steps, and bounds that were reached.
    assert len(ours[CASES[0]][0][1]) == 4 and ours[CASES[0]][0][3][-1] > 0.1


def refused(tmp_path, monkeypatch, engine, **changes):
    """What is said of a learned critic under an engine."""
    trainer = ppo(tmp_path, policy=with_adapters(base_policy()), critic_form="head")
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    monkeypatch.setattr(sharding, "engine_of", lambda trainer: engine)
    monkeypatch.setattr(sharding, "is_sharded", lambda trainer: True)
    trainer.is_deepspeed_enabled = "DeepSpeed" in engine
    with pytest.raises(ValueError) as error:
        sharding.check_critic_engine(trainer.args.critic_form, trainer)
    return str(error.value)


def test_what_a_critic_cannot_learn_under_is_refused(tmp_path, monkeypatch):
    assert "critic_form" in refused(tmp_path, monkeypatch, "DeepSpeed ZeRO-2", critic_form="full")
    assert "target_kl" in refused(tmp_path, monkeypatch, "DeepSpeed ZeRO-3", target_kl=0.1)
    assert "critic_warmup_steps" in refused(tmp_path, monkeypatch, "DeepSpeed ZeRO-3", critic_warmup_steps=1)
    assert "fp16" in refused(tmp_path, monkeypatch, "FSDP2", fp16=True)
    assert "fsdp_version" in refused(tmp_path, monkeypatch, "FSDP1")
