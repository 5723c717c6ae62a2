"""Requests that wait together are generated together, and each gets what it would get alone."""

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

from lenvm_rl.sandbox.scripted import EOS, START, geometric_chain
from lenvm_rl.serve.engine import Engine


@contextmanager
def together(engine, size):
    """A pool whose first `size` requests wait until all are there. Yields it and, for each generation, its rows."""
    release, rows, generate = threading.Event(), [], engine.model.generate

    def spied(prompts, **arguments):
        rows.append(prompts.shape[0])
        return generate(prompts, **arguments)

    engine.model.generate = spied
    engine._worker.submit(release.wait, 20)
    try:
        with ThreadPoolExecutor(size + 1) as pool:
            pool.submit(lambda: (wait_until(lambda: len(engine.jobs) == size), release.set()))
            yield pool, rows
    finally:
        release.set()
        engine.model.generate = generate


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
        assert rows == [len(MIXED) + 2]
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
        assert rows == [2]


def test_a_token_costs_one_forward_for_all_who_wait():
    engine = scripted_engine(geometric_chain(1e-9, 20))
    forwards = []
    engine.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with serving(engine) as client, together(engine, 8) as (pool, rows):
        answers = list(pool.map(lambda i: complete(client, [START + i], max_tokens=10 + i), range(8)))
    assert [lengths_of(answer) for answer in answers] == [[10 + i] for i in range(8)]
    assert rows == [8] and len(forwards) == 17


def test_requests_sent_at_once_find_each_other(monkeypatch):
    """The first of them does not run off alone."""
    monkeypatch.setattr("lenvm_rl.serve.engine.GATHER", 0.5)
    engine = scripted_engine(geometric_chain(1e-9, 20))
    with serving(engine) as client, together(engine, 1) as (pool, rows):
        complete(client, [START], max_tokens=1)
        assert list(pool.map(lambda _: complete(client, [START], max_tokens=4), range(2)))
    assert rows == [1, 2]


def test_no_more_rows_than_max_choices_in_the_order_of_arrival():
    engine = scripted_engine(geometric_chain(1e-9, 20), max_choices=4)
    with serving(engine) as client, together(engine, 4) as (pool, rows):
        jobs = []
        for place, n in enumerate((3, 2, 1, 4), 1):
            jobs.append(pool.submit(complete, client, [START], n=n, max_tokens=3))
            if place < 4:
                wait_until(lambda place=place: len(engine.jobs) == place)
        assert [len(job.result().choices) for job in jobs] == [3, 2, 1, 4]
    assert rows == [3, 3, 4]


def test_who_is_done_is_answered_while_others_go_on():
    engine = scripted_engine(geometric_chain(1e-9, 20), max_new_tokens_limit=50_000)
    with serving(engine) as client, together(engine, 2) as (pool, rows):
        endless = pool.submit(complete, client, [START], max_tokens=50_000, stream=True)
        assert lengths_of(pool.submit(complete, client, [START], max_tokens=3).result(10)) == [3]
        assert rows == [2] and engine.jobs
        endless.result().close()
        wait_until(lambda: not engine.jobs, 5)


def test_who_leaves_frees_its_row_and_the_last_one_ends_the_generation():
    engine = scripted_engine(geometric_chain(1e-9, 20), max_new_tokens_limit=50_000)
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
        assert lengths_of(complete(client, [START], max_tokens=3)) == [3] and rows == [3, 1]


@pytest.mark.parametrize("streams", [False, True])
def test_one_that_fails_does_not_take_the_others_with_it(streams):
    engine = scripted_engine(geometric_chain(1e-9, 20))
    engine.length_value_model.table.weight[START + 1] = math.nan
    with serving(engine) as client, together(engine, 3) as (pool, rows):

        def one(fields):
            return ask(client, {"prompt": [START], "max_tokens": 8, "stream": streams, **fields})

        good = [pool.submit(one, {"seed": seed}) for seed in (1, 2)]
        bad = pool.submit(one, {"guidance": {"strength": 1.0}})
        with pytest.raises(openai.APIError, match="gave NaN or infinity"):
            bad.result()
        assert [job.result()[0][0][1:] for job in good] == [("length", {"length": 8, "forced": 0})] * 2
    assert sorted(rows) == [1, 1, 1, 3]


def test_rows_that_are_not_guided_are_not_scored():
    """Beside a guided row with few candidates, their whole vocabulary would be scored."""
    engine = tiny_engine()
    with serving(engine) as client, together(engine, 3) as (pool, rows):
        widths = []
        score = engine.length_value_model.forward
        engine.length_value_model.forward = lambda **inputs: widths.append(inputs["input_ids"].shape) or score(**inputs)
        guided = pool.submit(complete, client, guidance={"strength": -9.0, "top_k": 5}, max_tokens=20)
        plain = [pool.submit(complete, client, max_tokens=20) for _ in range(2)]
        assert len(ids_of(guided.result())[0]) and all(job.result().choices for job in plain)
    assert rows == [3]
    # The prompts, to predict; one prompt and its candidates; its candidates alone.
    assert [tuple(shape) for shape in widths[:3]] == [(3, 3), (1, 3 + 5), (1, 5)]
    # (Rows of 2 and 6, and a few long ones, compare what is cached with full rows.)
    steps = [size for count, size in widths[3:] if count == 1 and size <= 6]
    assert len(steps) > 4 and not any(count == 3 for count, _ in widths[3:])


class TestWhatMayStandTogether:
    """Where the company of others would change an answer, it is given alone."""

    def test_rows_go_on_past_a_context_that_rotates_and_never_past_a_table(self):
        long, short = {"prompt": "w6 " * 100, "max_tokens": 20}, {"prompt": "w6 w7", "max_tokens": 110}
        for make, expected in ((tiny_gpt2, [1, 1]), (lambda seed=0: tiny_llama(max_position_embeddings=128), [2])):
            tokenizer = tiny_tokenizer()
            value = tiny_length_value_model(make(seed=1), tokenizer=tokenizer).freeze()
            model = make()
            # It never ends, so that both go on as long as they may.
            model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.clone())
            model.get_output_embeddings().weight.data[EOS] = 0.0
            engine = Engine(model, value, tokenizer, "tiny")
            with serving(engine) as client:
                asked = [{**fields, "guidance": {"strength": -200.0}, "temperature": 0} for fields in (long, short)]
                alone = [ask(client, fields) for fields in asked]
                with together(engine, 2) as (pool, rows):
                    assert [choices for choices, *_ in pool.map(lambda fields: ask(client, fields), asked)] == [
                        choices for choices, *_ in alone
                    ]
                assert rows == expected

    def test_frequencies_of_the_longest_row(self):
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0}
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        tokenizer = tiny_tokenizer()
        model = tiny_llama(rope_parameters=rope)
        engine = Engine(model, tiny_length_value_model(tokenizer=tokenizer).freeze(), tokenizer, "tiny")
        assert engine.widest == 16
        short, long = ({"prompt": "w6 " * size, "max_tokens": 6, "temperature": 0} for size in (4, 30))
        with serving(engine) as client:
            alone = [ask(client, fields)[0] for fields in (short, long)]
            with together(engine, 3) as (pool, rows):
                jobs = [pool.submit(ask, client, fields) for fields in (short, short, long)]
                assert [job.result()[0] for job in jobs] == [alone[0], alone[0], alone[1]]
            assert sorted(rows) in ([1, 2], [1, 1, 1])

    def test_decoders_that_read_padding(self, caplog):
        config = RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = RwkvForCausalLM(config).eval()
        tokenizer = tiny_tokenizer()
        with caplog.at_level(logging.WARNING):
            engine = Engine(
                model, tiny_length_value_model(tokenizer=tokenizer).freeze(), tokenizer, "t", max_new_tokens_limit=9
            )
        engine.close()
        assert engine.widest == 0 and "one after the other" in caplog.text

    def test_most_decoders_bear_company_of_any_width(self):
        engine = tiny_engine()
        engine.close()
        assert engine.widest == math.inf
