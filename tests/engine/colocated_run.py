"""A run whose completions come from vLLM in the same process, as a program: `python colocated_run.py FOLDER '{…}'`.

An engine and the process group that TRL gives it last as long as the process, so each run has one of its own.
"""

import json
import os
import sys
from copy import deepcopy
from functools import partial

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
import trl.generation.vllm_generation as trl_vllm
from peft import LoraConfig, PeftModel
from tiny import tiny_llama, tiny_tokenizer
from trainer_parts import VOCAB, batch_of, counts_of_w8, grpo, ppo, prompts, random_lenvm, weights

from lenvm_rl.trainers import LenVMGRPOTrainer, LenVMPPOTrainer

TRAINERS = {"grpo": (grpo, LenVMGRPOTrainer), "ppo": (ppo, LenVMPPOTrainer)}


def policy_of_run():
    """Where every run begins. Heads of 64: vLLM's attention has kernels for few sizes only."""
    return tiny_llama(VOCAB, hidden=128, seed=1, initializer_range=0.1)


def colocated(folder, trainer, lora=False, **changes):
    """The trainer of a run on a policy in `folder`, the engine in float32 as they are."""
    trl_vllm.LLM = partial(trl_vllm.LLM, dtype="float32", enforce_eager=True)
    policy_of_run().save_pretrained(f"{folder}/policy")
    tiny_tokenizer(VOCAB).save_pretrained(f"{folder}/policy")
    settings = {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1, "vllm_max_model_length": 128,
        "policy": f"{folder}/policy", "lenvm": random_lenvm(), "rewards": counts_of_w8, "data": prompts(16),
        "length_coef": 0.3, "length_gate": "all", "max_completion_length": 12, "max_steps": 4, "learning_rate": 3e-3,
        "loss_type": "dr_grpo",
    }  # fmt: skip
    make, kind = TRAINERS[trainer]
    if lora:
        kind = partial(kind, peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    return make(f"{folder}/run", trainer=kind, **{**settings, **changes})


def policy_weights(model):
    """Those of the policy, with its adapters in them."""
    return weights(deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model)


def tensors(batch):
    return {name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)}


def batches_of(trainer):
    """Trains, and returns what went into the loss at every step, with the weights of the policy there."""
    batches, compute = [], trainer._compute_loss

    def spy(model, inputs):
        batches.append(tensors(inputs) | {"policy": policy_weights(model)})
        return compute(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    return batches


if __name__ == "__main__":
    run = colocated(sys.argv[1], **json.loads(sys.argv[2]))
    found = {"batches": batches_of(run), "log": run.state.log_history}
    # Of evaluation, after the last step.
    found["evaluated"] = tensors(batch_of(run, "eval")) | {"policy": policy_weights(run.model)}
    torch.save(found, f"{sys.argv[1]}/found.pt")
