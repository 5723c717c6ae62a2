"""A tiny policy and length value model on disk, an engine of vLLM around them, and guidances to ask for."""

import gc
import os
import random
from contextlib import contextmanager
from dataclasses import replace

# Before vLLM is imported: the engine in this process, on the cores that there are.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from lenvm_rl.decoding import LengthGuidance, generate_guided
from lenvm_rl.decoding.requests import keys_of_guidance
from lenvm_rl.modeling.length_value_model import LengthValueModel

PROCESSOR = "lenvm_rl.decoding.vllm:LengthGuidanceProcessor"
GUIDANCES = [
    LengthGuidance(strength=40.0, top_k=15),
    LengthGuidance(strength=-40.0, top_k=9, top_p=0.9),
    LengthGuidance(strength=30.0, top_k=12, candidate_mass=0.7),
    LengthGuidance(mode="equal_to", target_length=12, rule="patient", top_k=8),
    LengthGuidance(mode="equal_to", target_length=10, rule="paper", top_k=8, enforce=True),
    LengthGuidance(mode="at_most", target_length=5, top_k=8, enforce=True),
    LengthGuidance(mode="at_least", target_length=17, top_k=8, enforce=True),
    LengthGuidance(mode="at_least", target_length=9, top_k=8, min_p=0.01),
]
# Guided requests of every kind, beside some that ask for nothing.
ASKED = [*GUIDANCES, None, None, None, None]
NEW_TOKENS = 24


def policy_and_values(folder):
    """Paths of a policy that vLLM's attention takes (heads of 32), and of a length value model."""
    tokenizer = tiny_tokenizer(chat=True)
    tiny_llama(hidden=64, layers=2, max_position_embeddings=256).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    values = tiny_llama(hidden=32, layers=2, seed=1, max_position_embeddings=256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LengthValueModel.from_backbone(values, gamma=0.9, tokenizer=tokenizer)
        # A new head says nearly the same everywhere.
        torch.nn.init.normal_(model.head.output.weight, std=0.5)
    model.save_pretrained(folder / "lenvm")
    return str(folder / "policy"), str(folder / "lenvm")


def random_prompts(count, seed=0, longest=40):
    """Prompts of words, some longer than a part that a cramped engine reads at once."""
    rng = random.Random(seed)
    return [[rng.randrange(6, 64) for _ in range(rng.randrange(2, longest))] for _ in range(count)]


def parameters(guidance=None, **settings):
    """`SamplingParams` of a request, greedy unless said otherwise."""
    extra = None if guidance is None else keys_of_guidance(guidance)
    return SamplingParams(**{"temperature": 0.0, "max_tokens": NEW_TOKENS, "extra_args": extra, **settings})


@contextmanager
def an_engine(policy, values, **settings):
    """`vllm.LLM` with the processor, gone afterwards."""
    llm = LLM(
        policy,
        dtype="float32",
        max_model_len=96,
        enforce_eager=True,
        generation_config="vllm",
        **{
            "logits_processors": [PROCESSOR],
            "max_num_seqs": 16,
            "enable_prefix_caching": False,
            "additional_config": {"length_value_model": values},
            **settings,
        },
    )
    yield llm
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def references(models, prompts, guidances, **settings):
    """What `generate` and `generate_guided` write, each prompt alone, greedy."""
    policy = AutoModelForCausalLM.from_pretrained(models[0]).eval()
    lenvm = LengthValueModel.from_pretrained(models[1]).freeze()
    written = []
    for prompt, guidance in zip(prompts, guidances, strict=True):
        ids, options = torch.tensor([prompt]), {"max_new_tokens": NEW_TOKENS, **settings}
        if guidance is None:
            output = policy.generate(ids, do_sample=False, **options)
        else:
            output = generate_guided(policy, lenvm, ids, replace(guidance, temperature=0.0), **options)
        written.append(output[0, len(prompt) :].tolist())
    return written


def tokens(output):
    return list(output.outputs[0].token_ids)


def as_prompts(prompts):
    return [{"prompt_token_ids": ids} for ids in prompts]


def guide_of(llm):
    """The processor's guide, inside of the engine."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    [found] = [each for each in runner.input_batch.logitsprocs.all if hasattr(each, "guide")]
    return found.guide
