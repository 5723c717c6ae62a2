"""Requests that come while others are under way, are read in parts, and start anew where blocks run out."""

import pytest
from engine_parts import ASKED, parameters, random_prompts, references, tokens

# Prompts are longer than what is read in a step, and all requests together need more blocks than there are.
SETTINGS = {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 6, "block_size": 32}


@pytest.mark.parametrize("seed", [1, 2])
def test_requests_that_come_in_turns_and_are_preempted(engine, models, seed):
    """Prompts are read in parts; every third step another request comes; blocks run out, and requests start anew."""
    prompts, core = random_prompts(len(ASKED), seed), engine.llm_engine
    preempted, counted = 0, core.engine_core.engine_core.scheduler
    waiting, finished, step = list(enumerate(zip(prompts, ASKED, strict=True))), {}, 0
    original = counted._preempt_request

    def counting(*arguments, **options):
        nonlocal preempted
        preempted += 1
        return original(*arguments, **options)

    counted._preempt_request = counting
    while waiting or core.has_unfinished_requests():
        if waiting and step % 3 == 0:
            number, (prompt, guidance) = waiting.pop(0)
            core.add_request(str(number), {"prompt_token_ids": prompt}, parameters(guidance))
        for output in core.step():
            if output.finished:
                finished[int(output.request_id.split("-")[0])] = tokens(output)
        step += 1
    counted._preempt_request = original
    assert [finished[number] for number in range(len(prompts))] == references(models, prompts, ASKED)
    assert preempted > 0
