"""Runner V2, which needs Triton and so a GPU, by a stand-in that follows its source.

Slots are filled and never announced as free, rows come in any order, prompts are read in parts, and requests that were
preempted come back in another slot.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_parts import ASKED, NEW_TOKENS, PROCESSOR, parameters, random_prompts, references
from tiny import EOS
from transformers import AutoModelForCausalLM
from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_by_fqcns

SLOTS, LONGEST, PART, VOCABULARY = 16, 128, 16, 64


class StandIn:
    """As much of runner V2 as a processor sees."""

    def __init__(self, models, seed):
        [kind] = _load_v2_logitsprocs_by_fqcns([PROCESSOR])
        # The frontend of either runner loads it, to look at what requests ask for.
        assert _load_logitsprocs_by_fqcns([PROCESSOR]) == [kind]
        self.states = LogitsProcRequestState(
            device=torch.device("cpu"),
            max_num_reqs=SLOTS,
            vocab_size=VOCABULARY,
            all_token_ids=SimpleNamespace(gpu=torch.zeros(SLOTS, LONGEST, dtype=torch.int32)),
            prompt_len=SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32)),
            prefill_len=SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32)),
            total_len=SimpleNamespace(gpu=torch.zeros(SLOTS, dtype=torch.int32)),
        )
        self.processor = kind(SimpleNamespace(additional_config={"length_value_model": models[1]}), self.states)
        self.policy = AutoModelForCausalLM.from_pretrained(models[0]).eval()
        self.random = random.Random(seed)
        self.free = list(range(SLOTS))
        self.random.shuffle(self.free)
        self.live = []

    def admit(self, number, prompt, params, output):
        """A request in a free slot, with what it has written before it was preempted."""
        slot, ids = self.free.pop(), prompt + output
        self.states.all_token_ids.gpu[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        self.states.prompt_len.np[slot], self.states.prefill_len.np[slot] = len(prompt), len(ids)
        guided = self.processor.add_request(slot, params)
        one = SimpleNamespace(
            number=number, prompt=prompt, params=params, output=output, slot=slot, computed=0, cache=None, guided=guided
        )
        self.live.append(one)

    def preempt(self):
        """Takes a request out and puts it in again."""
        one = self.live.pop(self.random.randrange(len(self.live)))
        self.free.insert(0, one.slot)
        self.admit(one.number, one.prompt, one.params, one.output)

    def step(self):
        """One step of all live requests; returns those that ended."""
        self.random.shuffle(self.live)
        rows = []
        for one in self.live:
            ids = one.prompt + one.output
            part = ids[one.computed : one.computed + PART]
            with torch.no_grad():
                output = self.policy(torch.tensor([part]), past_key_values=one.cache, use_cache=True)
            one.cache, one.computed = output.past_key_values, one.computed + len(part)
            rows.append(output.logits[0, -1].float())
        slots = np.array([one.slot for one in self.live], dtype=np.int32)
        mapping, lengths = torch.from_numpy(slots), np.array([one.computed for one in self.live], dtype=np.int32)
        context = LogitsContext(
            expanded_idx_mapping=mapping,
            idx_mapping=mapping,
            idx_mapping_np=slots,
            expanded_local_pos=torch.zeros_like(mapping),
            input_ids=torch.zeros_like(mapping),
            pos=torch.from_numpy(lengths - 1),
            seq_lens_upper_bound_np=lengths,
        )
        scores = torch.stack(rows)
        guided = self.processor.apply(scores.clone(), context)
        return [one for row, one in enumerate(list(self.live)) if self._take(one, scores[row], guided[row])]

    def _take(self, one, scores, guided):
        assert one.guided or torch.equal(scores, guided)
        if one.computed < len(one.prompt) + len(one.output):
            # A part of a prompt was read, and nothing is sampled.
            assert torch.equal(scores, guided)
            return False
        token = int(guided.argmax())
        self.states.all_token_ids.gpu[one.slot, one.computed] = token
        one.output.append(token)
        ended = token == EOS or len(one.output) == NEW_TOKENS
        if ended:
            self.live.remove(one)
            self.free.append(one.slot)
        return ended


@pytest.mark.parametrize("seed", [0, 1])
def test_slots_are_guided_as_each_request_alone(models, seed):
    prompts = random_prompts(len(ASKED), seed)
    runner, waiting, finished, step = StandIn(models, seed), list(range(len(ASKED))), {}, 0
    while waiting or runner.live:
        if waiting and step % 2 == 0:
            number = waiting.pop(0)
            params = parameters(ASKED[number])
            params.update_from_generation_config({"eos_token_id": EOS}, EOS)
            runner.admit(number, prompts[number], params, [])
        if step % 7 == 6 and len(runner.live) > 2:
            runner.preempt()
        finished |= {one.number: one.output for one in runner.step()}
        step += 1
    assert [finished[number] for number in range(len(ASKED))] == references(models, prompts, ASKED)
