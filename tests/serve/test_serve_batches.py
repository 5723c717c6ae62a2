"""Requests that are there at the same time are generated together, and each gets what it would get alone."""

import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import torch
from test_serve import MESSAGES, complete, ids_of, lengths_of, scripted_engine, serving, tiny_engine, wait_until
from tiny import tiny_gpt2, tiny_length_value_model, tiny_llama, tiny_tokenizer
from transformers import RwkvConfig, RwkvForCausalLM

from lenvm_rl.decoding.policy import SingleRowReader
from lenvm_rl.decoding.scoring import SlotScorer
from lenvm_rl.sandbox.scripted import EOS, START, geometric_chain
from lenvm_rl.serve.engine import Engine


@contextmanager
def together(engine, size):
    """A pool whose first `size` requests wait until all are there. Yields it and, for each step, its choices."""
    release, rows = threading.Event(), []
    advance, fits = engine._scores, engine._fits

    def spied(jobs):
        rows.append(sum(len(job.living) if job.choices else job.request.n for job in jobs))
        return advance(jobs)

    engine._scores, engine._fits = spied, lambda: release.is_set() and fits()

    def go():
        wait_until(lambda: len(engine.jobs) == size)
        release.set()
        with engine._changed:
            engine._changed.notify()

    try:
        with ThreadPoolExecutor(size + 1) as pool:
            pool.submit(go)
            yield pool, rows
    finally:
        release.set()
        engine._scores, engine._fits = advance, fits


def said(answer):
    """Of each choice: text, reason, what guidance did."""
    return [(choice.text, choice.finish_reason, choice.length_guidance) for choice in answer.choices]


def ask(client, fields):
    """The answer's choices, read whole or from a stream, and its counts."""
    if not fields.get("stream"):
        answer = complete(client, **fields)
        return said(answer), answer.usage, answer.length_guidance
    chunks = list(complete(client, stream_options={"include_usage": True}, **fields))
    choices = []
    for index in range(fields.get("n", 1)):
        own = [one for chunk in chunks for one in chunk.choices if one.index == index]
        choices.append(("".join(one.text for one in own), own[-1].finish_reason, own[-1].length_guidance))
    return choices, chunks[-1].usage, chunks[-2].length_guidance


MIXED = [
    {"prompt": "w6", "temperature": 0, "max_tokens": 40},
    {"prompt": "w6 " * 60, "temperature": 0, "max_tokens": 3, "stream": True},
    {"prompt": "w11 w12 w50", "temperature": 0, "max_tokens": 25, "guidance": {"strength": -4.0, "top_k": 9}},
    {"prompt": "w30 w31", "seed": 7, "n": 3, "max_tokens": 12, "stream": True},
    {"prompt": "w8 w9", "seed": -3, "temperature": 0.6, "top_p": 0.8, "stop": ["w1", "w2"], "max_tokens": 30},
    {"prompt": "w9", "seed": 5, "guidance": {"mode": "equal_to", "target_length": 9, "enforce": True, "top_k": 20}},
    {"prompt": "w9", "seed": 5, "guidance": {"mode": "at_most", "target_length": 2, "enforce": True, "top_k": 20}},
    {"prompt": "w60 w7", "guidance": {"strength": 2.0}, "temperature": 0, "stream": True, "stop": "w4"},
]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_each_gets_what_it_gets_alone(make):
    tokenizer = tiny_tokenizer()
    value = tiny_length_value_model(make(seed=1), tokenizer=tokenizer).freeze()
    engine = Engine(make(), value, tokenizer, "tiny")
    with serving(engine) as client:
        alone = [ask(client, fields) for fields in MIXED]
        with together(engine, len(MIXED)) as (pool, rows):
            beside = list(pool.map(lambda fields: ask(client, fields), MIXED))
        # One of them has three choices.
        assert rows[0] == len(MIXED) + 2
    for (choices, usage, about), (others, counts, told) in zip(alone, beside, strict=True):
        assert choices == others and usage == counts and about["forced"] == told["forced"]
        assert told["predicted_length"] == pytest.approx(about["predicted_length"], rel=1e-4, abs=1e-4)
    assert {reason for choices, *_ in beside for _, reason, _ in choices} == {"stop", "length"}


def test_chats_and_completions_share_a_generation():
    engine = tiny_engine()
    with serving(engine) as client:

        def chat(_):
            answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=9)
            return answer.choices[0].message.content

        alone = chat(0), complete(client, temperature=0, max_tokens=9).choices[0].text
        with together(engine, 2) as (pool, rows):
            jobs = pool.submit(chat, 0), pool.submit(complete, client, temperature=0, max_tokens=9)
            assert (jobs[0].result(), jobs[1].result().choices[0].text) == alone
        assert rows[0] == 2


def test_a_token_costs_one_forward_for_all_who_wait():
    engine = scripted_engine(geometric_chain(1e-9, 20))
    forwards = []
    engine.decoder.policy.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with serving(engine) as client, together(engine, 8) as (pool, rows):
        answers = list(pool.map(lambda i: complete(client, [START + i], max_tokens=10 + i), range(8)))
    assert [lengths_of(answer) for answer in answers] == [[10 + i] for i in range(8)]
    assert rows == [8 - max(0, step - 9) for step in range(17)] and len(forwards) == 17


def test_no_more_rows_than_max_choices_in_the_order_of_arrival():
    engine = scripted_engine(geometric_chain(1e-9, 20), max_choices=4)
    with serving(engine) as client, together(engine, 4) as (pool, rows):
        jobs = []
        for place, n in enumerate((3, 2, 1, 4), 1):
            jobs.append(pool.submit(complete, client, [START], n=n, max_tokens=3))
            if place < 4:
                wait_until(lambda place=place: len(engine.jobs) == place)
        assert [len(job.result().choices) for job in jobs] == [3, 2, 1, 4]
    assert rows == [3] * 6 + [4] * 3


def test_who_comes_joins_those_under_way_and_is_answered_while_they_go_on():
    engine = scripted_engine(geometric_chain(1e-9, 20))
    with serving(engine) as client, complete(client, [START], max_tokens=50_000, stream=True) as endless:
        next(iter(endless))
        assert lengths_of(complete(client, [START], max_tokens=3)) == [3]
        (job,) = engine.jobs
        assert job.choices[0].finish_reason is None


def test_who_joins_late_gets_what_it_gets_alone():
    engine = tiny_engine()
    fields = {"guidance": {"strength": -3.0, "top_k": 9}, "max_tokens": 30, "seed": 4, "n": 2}
    with serving(engine) as client:
        alone = said(complete(client, **fields))
        with complete(client, "w9", {"strength": -90.0, "top_k": 9}, max_tokens=500, stream=True) as other:
            next(iter(other))
            assert said(complete(client, **fields)) == alone


def test_who_leaves_frees_its_row_and_the_last_one_ends_the_generation():
    engine = scripted_engine(geometric_chain(1e-9, 20))
    with serving(engine) as client, together(engine, 3) as (pool, rows):
        streams = list(pool.map(lambda _: complete(client, [START], max_tokens=50_000, stream=True), range(3)))
        jobs = engine.jobs
        for left, stream in enumerate(streams, 1):
            next(iter(stream))
            stream.close()
            wait_until(lambda left=left: len(engine.jobs) == 3 - left, 5)
            if left < 3:
                going = next(job for job in jobs if not job.cancelled)
                before = len(going.choices[0].token_ids)
                wait_until(lambda going=going, before=before: len(going.choices[0].token_ids) > before)
        assert lengths_of(complete(client, [START], max_tokens=3)) == [3] and rows[0] == 3


@pytest.mark.parametrize("streams", [False, True])
def test_one_that_fails_does_not_take_the_others_with_it(streams):
    engine = scripted_engine(geometric_chain(1e-9, 20))
    engine.decoder.length_value_model.table.weight[START + 1] = math.nan
    with serving(engine) as client, together(engine, 3) as (pool, rows):

        def one(fields):
            return ask(client, {"prompt": [START], "max_tokens": 8, "stream": streams, **fields})

        good = [pool.submit(one, {"seed": seed}) for seed in (1, 2)]
        bad = pool.submit(one, {"guidance": {"strength": 1.0}})
        with pytest.raises(openai.APIError, match="gave NaN or infinity"):
            bad.result()
        assert [job.result()[0][0][1:] for job in good] == [("length", {"length": 8, "forced": 0})] * 2
    # Each tries alone, and the two go on together.
    assert rows[:5] == [3, 1, 1, 1, 2]


def test_one_that_fails_at_its_draw_leaves_those_that_ended_before_it():
    engine = tiny_engine()
    with torch.no_grad():
        engine.decoder.policy.model.get_input_embeddings().weight[50] = math.nan
    with serving(engine) as client, together(engine, 2) as (pool, _):
        good = pool.submit(complete, client, [7, 8], max_tokens=1)
        wait_until(lambda: len(engine.jobs) == 1)
        bad = pool.submit(complete, client, [7, 50], max_tokens=5)
        with pytest.raises(openai.APIError):
            bad.result()
        assert lengths_of(good.result()) == [1]


def test_rows_that_are_not_guided_are_not_scored():
    """Beside a guided row with few candidates, their whole vocabulary would be scored."""
    engine = tiny_engine()
    with serving(engine) as client, together(engine, 3) as (pool, rows):
        widths = []
        model = engine.decoder.length_value_model
        score = model.forward
        model.forward = lambda **inputs: widths.append(inputs["input_ids"].shape) or score(**inputs)
        guided = pool.submit(complete, client, guidance={"strength": -9.0, "top_k": 5}, max_tokens=20)
        plain = [pool.submit(complete, client, max_tokens=20) for _ in range(2)]
        assert len(ids_of(guided.result())[0]) and all(job.result().choices for job in plain)
    assert rows[0] == 3
    # The prompts, to predict; one prompt and its candidates; its candidates alone.
    widths = [tuple(shape) for shape in widths]
    assert widths[:5] == [(1, 3)] * 3 + [(1, 3 + 5), (1, 5)] and not any(count == 3 for count, _ in widths)


class TestAnyDecoder:
    """Where rows cannot share a forward, they share a step."""

    @pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
    def test_rows_go_up_to_the_context_together(self, make):
        long, short = {"prompt": "w6 " * 100, "max_tokens": 20}, {"prompt": "w6 w7", "max_tokens": 110}
        tokenizer = tiny_tokenizer()
        value = tiny_length_value_model(make(seed=1), tokenizer=tokenizer).freeze()
        model = make()
        # It never ends, so that both go on as long as they may.
        model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.clone())
        model.get_output_embeddings().weight.data[EOS] = 0.0
        engine = Engine(model, value, tokenizer, "tiny")
        assert type(engine.decoder.policy) is SlotScorer
        with serving(engine) as client:
            asked = [{**fields, "guidance": {"strength": -200.0}, "temperature": 0} for fields in (long, short)]
            alone = [ask(client, fields)[0] for fields in asked]
            with together(engine, 2) as (pool, rows):
                assert [choices for choices, *_ in pool.map(lambda fields: ask(client, fields), asked)] == alone
            assert rows[0] == 2

    def test_frequencies_of_the_longest_row(self):
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0}
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        tokenizer = tiny_tokenizer()
        model = tiny_llama(rope_parameters=rope)
        engine = Engine(model, tiny_length_value_model(tokenizer=tokenizer).freeze(), tokenizer, "tiny")
        assert type(engine.decoder.policy) is SingleRowReader
        short, long = ({"prompt": "w6 " * size, "max_tokens": 6, "temperature": 0} for size in (4, 30))
        with serving(engine) as client:
            alone = [ask(client, fields)[0] for fields in (short, long)]
            with together(engine, 3) as (pool, rows):
                jobs = [pool.submit(ask, client, fields) for fields in (short, short, long)]
                assert [job.result()[0] for job in jobs] == [alone[0], alone[0], alone[1]]
            assert rows[0] == 3

    def test_decoders_without_a_cache_of_keys(self, caplog):
        config = RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = RwkvForCausalLM(config).eval()
        tokenizer = tiny_tokenizer()
        with caplog.at_level(logging.WARNING):
            engine = Engine(model, tiny_length_value_model(tokenizer=tokenizer).freeze(), tokenizer, "tiny")
        assert "one after the other" in caplog.text
        with serving(engine) as client, together(engine, 2) as (pool, rows):
            prompts = [[6, 7, 8], [9]]
            answers = pool.map(lambda ids: complete(client, ids, temperature=0, max_tokens=9), prompts)
            for ids, answer in zip(prompts, answers, strict=True):
                expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=9, eos_token_id=EOS)
                assert ids_of(answer) == [expected[0, len(ids) :].tolist()]
