"""A server of vLLM with the processor, asked by OpenAI's own client."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import openai
import pytest
from engine_parts import GUIDANCES, NEW_TOKENS, PROCESSOR, random_prompts, references
from places import ROOT

from lenvm_rl.decoding.requests import keys_of_guidance

# Seconds that a server may take to load, or to end: minutes on a machine that is busy with other things.
TO_LOAD, TO_END = 900, 120


@pytest.fixture(scope="module")
def client(models, tmp_path_factory):
    """A client of a server that is up."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", models[0], "--dtype", "float32"]
    command += ["--max-model-len", "96", "--enforce-eager", "--generation-config", "vllm", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--logits-processors", PROCESSOR, "--served-model-name", "policy"]
    command += ["--additional-config", f'{{"length_value_model": "{models[1]}"}}', "--return-tokens-as-token-ids"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    said = tmp_path_factory.mktemp("server") / "said.txt"
    with said.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + TO_LOAD
        while not is_up(port):
            assert server.poll() is None and time.monotonic() < deadline, said.read_text(encoding="utf-8")[-3000:]
            time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=TO_END)
    finally:
        server.terminate()
        server.wait(timeout=TO_END)


def is_up(port):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
    except OSError:
        return False
    return True


def ids_of(choice):
    return [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]


def complete(client, prompt, guidance=None, **options):
    keys = {} if guidance is None else {"vllm_xargs": keys_of_guidance(guidance)}
    given = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "logprobs": 0, "extra_body": keys} | options
    return client.completions.create(model="policy", prompt=prompt, **given)


def test_completions_are_those_of_generate_guided(client, models):
    prompts = random_prompts(4, seed=21)
    asked = [GUIDANCES[0], GUIDANCES[4], GUIDANCES[6], None]
    found = [ids_of(complete(client, prompt, each).choices[0]) for prompt, each in zip(prompts, asked, strict=True)]
    assert found == references(models, prompts, asked)


def test_chats_streams_and_several_choices(client):
    question = [{"role": "user", "content": "w7 w8"}]
    xargs = {"vllm_xargs": keys_of_guidance(GUIDANCES[5])}
    options = {"model": "policy", "messages": question, "max_tokens": NEW_TOKENS, "extra_body": xargs}
    answer = client.chat.completions.create(temperature=0.0, **options)
    # At most 5 tokens, the end not counted.
    assert answer.usage.completion_tokens <= 6 and answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(temperature=0.0, stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == answer.choices[0].message.content
    several = client.chat.completions.create(temperature=1.0, n=4, seed=0, **options)
    assert len(several.choices) == 4 and several.usage.completion_tokens <= 4 * 6


@pytest.mark.parametrize(
    ("xargs", "options", "named"),
    [
        ({"length_strenght": 1.0}, {}, "length_strenght"),
        ({"length_mode": "equal_to", "length_top_k": 8}, {}, "target_length"),
        (keys_of_guidance(GUIDANCES[3]), {"max_tokens": 5}, "max_tokens"),
        (keys_of_guidance(GUIDANCES[0]), {"top_p": 0.5, "temperature": 1.0}, "length_top_p"),
    ],
)
def test_what_makes_no_sense_is_a_400_with_our_sentence(client, xargs, options, named):
    with pytest.raises(openai.BadRequestError, match=named):
        complete(client, [7, 8], extra_body={"vllm_xargs": xargs}, **options)
    # And the server goes on.
    assert complete(client, [7, 8], GUIDANCES[0]).choices[0].finish_reason in ("stop", "length")
