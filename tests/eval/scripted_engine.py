"""A stand-in for the module `vllm`: an engine that writes words, and obeys the length guidance that it is asked for."""

import random
from types import ModuleType, SimpleNamespace

from tiny import EOS

from lenvm_rl.decoding.requests import guidance_of_request


def written(prompt_ids, params):
    """What the engine writes: for a target length, so many words; else words with a chance of 1/8 of the end, and of
    7/8 where a tilt leans towards it."""
    guidance = guidance_of_request(params.extra_args, params.temperature, params.max_tokens)
    draw, chance = random.Random(f"{prompt_ids}:{params.seed}"), 7 / 8 if guidance.strength > 0 else 1 / 8
    ids = []
    while len(ids) < params.max_tokens and EOS not in ids:
        ends = draw.random() < chance if guidance.target_length is None else len(ids) == guidance.target_length
        ids.append(params.stop_token_ids[0] if ends else draw.randrange(6, 64))
    return ids


def scripted_vllm(dies_after=None):
    """The module, and a record of its engines' settings and of the requests that they ended, the last one first."""
    record = SimpleNamespace(engines=[], ended=[], dies_after=dies_after)

    class SamplingParams(SimpleNamespace):
        pass

    class LLM:
        def __init__(self, model, **settings):
            record.engines.append({"model": model, **settings})
            self.waiting = []
            self.llm_engine = self

        def add_request(self, request_id, prompt, params):
            self.waiting.append((f"{request_id}-0f", prompt["prompt_token_ids"], params))

        def has_unfinished_requests(self):
            return bool(self.waiting)

        def step(self):
            if record.dies_after is not None and len(record.ended) >= record.dies_after:
                raise RuntimeError("out of memory")
            name, prompt_ids, params = self.waiting.pop()
            record.ended.append((prompt_ids, params))
            answer = SimpleNamespace(token_ids=tuple(written(prompt_ids, params)))
            going_on = SimpleNamespace(request_id="0-0f", finished=False, outputs=[])
            return [going_on, SimpleNamespace(request_id=name, finished=True, outputs=[answer])]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    return module, record
