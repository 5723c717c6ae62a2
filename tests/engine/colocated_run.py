"""A run whose completions come from vLLM in the same process, as a program: `python colocated_run.py FOLDER '{…}'`.

An engine and the process group that TRL gives it last as long as the process, so each run has one of its own.
"""

import json
import os
import sys
from functools import partial

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
import trl.generation.vllm_generation as trl_vllm
import vllm.model_executor.layers.utils as vllm_layers
from tiny import tiny_llama, tiny_tokenizer
from trainer_parts import VOCAB, batch_of, counts_of_w8, grpo, ppo, prompts, random_lenvm, weights

TRAINERS = {"grpo": grpo, "ppo": ppo}


def keep_weights(layer, remove_weight):
    """Instead of vLLM's preparation of a linear layer for a CPU: that packs the weights and drops them, and TRL would
    have nothing to load new ones into. On a GPU they stay as they are."""
    layer.cpu_linear = torch.nn.functional.linear


def policy_of_run():
    """Where every run begins. Heads of 64: vLLM's attention has kernels for few sizes only."""
    return tiny_llama(VOCAB, hidden=128, seed=1, initializer_range=0.1)


def colocated(folder, trainer, **changes):
    """The trainer of a run on a policy in `folder`, the engine in float32 as they are."""
    vllm_layers.dispatch_cpu_unquantized_gemm = keep_weights
    trl_vllm.LLM = partial(trl_vllm.LLM, dtype="float32", enforce_eager=True)
    policy_of_run().save_pretrained(f"{folder}/policy")
    tiny_tokenizer(VOCAB).save_pretrained(f"{folder}/policy")
    settings = {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1, "vllm_max_model_length": 128,
        "policy": f"{folder}/policy", "lenvm": random_lenvm(), "rewards": counts_of_w8, "data": prompts(16),
        "length_coef": 0.3, "length_gate": "all", "max_completion_length": 12, "max_steps": 4, "learning_rate": 3e-3,
        "loss_type": "dr_grpo",
    }  # fmt: skip
    return TRAINERS[trainer](f"{folder}/run", **{**settings, **changes})


def tensors(batch):
    return {name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)}


def batches_of(trainer):
    """Trains, and returns what went into the loss at every step, with the weights of the policy there."""
    batches, compute = [], trainer._compute_loss

    def spy(model, inputs):
        batches.append(tensors(inputs) | {"policy": weights(model)})
        return compute(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    return batches


if __name__ == "__main__":
    run = colocated(sys.argv[1], **json.loads(sys.argv[2]))
    found = {"batches": batches_of(run), "log": run.state.log_history}
    # Of evaluation, after the last step.
    found["evaluated"] = tensors(batch_of(run, "eval")) | {"policy": weights(run.model)}
    torch.save(found, f"{sys.argv[1]}/found.pt")
