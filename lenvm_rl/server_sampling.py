"""Rollouts from a server: many requests at once, each repeated until it is answered, token ids kept where they are.

Where a server gives text only, its ids are made from the text again. That has to be asked for (`retokenize=True`), is
checked against the number of tokens that the server counts, and is reported (see `lenvm_rl.retokenization`).
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lenvm_rl.endings import strip_completion
from lenvm_rl.retokenization import retokenization_columns, retokenization_report, retokenize
from lenvm_rl.rollouts import RolloutMetadata
from lenvm_rl.sampling_jobs import Prompt, SamplingJob, SamplingSettings, run_to_file
from lenvm_rl.servers import CompletionServer, ServerAnswer, ServerError


def sample_from_server(
    path: str | os.PathLike,
    server: CompletionServer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    *,
    seed: int,
    extra_columns: dict[str, Sequence[Any]] | None = None,
    eos_token_ids: Sequence[int] | None = None,
    retokenize: bool = False,
    generator: str | None = None,
) -> tuple[Dataset, RolloutMetadata]:
    """Samples completions of a server's model into a rollout file.

    Killed at any moment and started again with the same arguments (the address and `batch_size` may change), it asks
    for no finished completion again.

    Args:
        path (`str` or `os.PathLike`): a name that ends in `.jsonl` or `.parquet`.
        server ([`~lenvm_rl.servers.CompletionServer`]): as `lenvm_rl.servers.connect` makes it.
        tokenizer (`PreTrainedTokenizerBase`): that of the server's model.
        prompts, extra_columns: see [`~lenvm_rl.sampling_jobs.SamplingJob`].
        settings ([`~lenvm_rl.sampling_jobs.SamplingSettings`]): `batch_size` is the number of requests under way at
            once.
        seed (`int`): decides the seed of every request. The same completions come back only from a server that keeps
            to seeds, and few do whatever else they are computing at the time.
        eos_token_ids (`Sequence[int]`, *optional*, defaults to the tokenizer's): every id that ends a completion.
        retokenize (`bool`, *optional*, defaults to `False`): make token ids from text if the server gives none. The
            records then have the columns `completion_text`, `length_error` and `text_changed`.
        generator (`str`, *optional*, defaults to the model's name on the server): what the metadata calls the policy.

    Returns:
        `tuple[datasets.Dataset, RolloutMetadata]`: as `read_rollouts` gives them.

    Raises:
        ValueError: see [`ServerJob`] and [`~lenvm_rl.sampling_jobs.run_to_file`].
        ServerError: if the server refuses a request or keeps failing; what was finished before is kept.
    """
    job = ServerJob(
        server,
        tokenizer,
        prompts,
        settings,
        seed=seed,
        extra_columns=extra_columns,
        eos_token_ids=eos_token_ids,
        retokenize=retokenize,
    )
    return run_to_file(path, job, generator or server.model)


class ServerJob(SamplingJob):
    """A sampling job whose completions come from a server.

    Args:
        server, retokenize: see [`sample_from_server`].
        others: see [`~lenvm_rl.sampling_jobs.SamplingJob`].

    Raises:
        ValueError: also if the server gives no token ids and `retokenize` is not set, or takes prompts as text and
            there is no text that it would turn into a prompt's ids.
    """

    engine = "server"

    def __init__(
        self,
        server: CompletionServer,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        *,
        retokenize: bool = False,
        **others: Any,
    ):
        super().__init__(tokenizer, prompts, settings, **others)
        self.server = server
        if not server.gives_token_ids and not retokenize:
            raise ValueError(
                f"A server of the kind {server.kind!r} gives text, not the token ids that were sampled, and labels "
                "made from a text's tokens can be off. Use a server that gives ids (vllm, sglang, llama.cpp), or set "
                "retokenize=True and look at sampling['retokenization'] in the metadata."
            )
        self.requested: list[str] | list[list[int]] = self.prompt_ids
        if not server.takes_token_ids:
            self.requested = [self._prompt_text(index) for index in range(len(self.prompts))]

    def description(self):
        """See [`~lenvm_rl.sampling_jobs.SamplingJob.description`]."""
        token_ids = "sampled" if self.server.gives_token_ids else "retokenized"
        return {"server": self.server.kind, "model": self.server.model, "token_ids": token_ids}

    def report(self, records):
        """See [`~lenvm_rl.sampling_jobs.SamplingJob.report`]."""
        return {} if self.server.gives_token_ids else {"retokenization": retokenization_report(records)}

    def sample(self, steps: Sequence[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """See [`~lenvm_rl.sampling_jobs.SamplingJob.sample`]; the records come in the order of the answers."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        answers: queue.SimpleQueue[tuple[int, ServerAnswer | Exception]] = queue.SimpleQueue()
        abandoned = threading.Event()
        for number in steps:
            waiting.put(number)

        def work() -> None:
            while not abandoned.is_set():
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    answers.put((number, self.server.complete(self._request(number), abandoned)))
                except Exception as error:  # raised again below, by the thread that consumes
                    answers.put((number, error))

        # Daemons, so that nobody who stops the program waits for requests that are under way.
        for _ in range(min(self.settings.batch_size, len(steps))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in steps:
                number, answer = answers.get()
                if isinstance(answer, Exception):
                    answer.add_note(f"This was for a completion of prompt {self.prompt_of(number)}.")
                    raise answer
                yield number, [self._record(number, answer)]
        finally:
            abandoned.set()

    def _prompt_text(self, index: int) -> str:
        """What to send so that the server, which adds its tokenizer's special tokens, sees the prompt's ids."""
        prompt = self.prompts[index]
        if not isinstance(prompt, str):
            prompt = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for text in (prompt, prompt.removeprefix(self.tokenizer.bos_token or "")):
            if list(self.tokenizer(text)["input_ids"]) == self.prompt_ids[index]:
                return text
        raise ValueError(
            f"Prompt {index} cannot be sent as text: the server would read other tokens than the chat template gives. "
            f"Use a server that takes token ids; {self.server.kind!r} does not."
        )

    def _request(self, number: int) -> dict[str, Any]:
        # Without ids, an end at the last allowed token cannot be told from a cut. One token more, and it can.
        most = self.settings.max_new_tokens + (not self.server.gives_token_ids)
        prompt = self.requested[self.prompt_of(number)]
        return self.server.request(prompt, self.settings, most, self.seed_of(number), self.eos_token_ids)

    def _record(self, number: int, answer: ServerAnswer) -> dict[str, Any]:
        prompt = self.prompt_of(number)
        if answer.prompt_tokens not in (None, len(self.prompt_ids[prompt])):
            raise ValueError(
                f"The server counts {answer.prompt_tokens} tokens in prompt {prompt}, the tokenizer "
                f"{len(self.prompt_ids[prompt])}: give the tokenizer of the server's model."
            )
        make = self._from_ids if self.server.gives_token_ids else self._from_text
        ids, finish_reason, columns = make(answer)
        return self.record(number, ids, finish_reason, **columns)

    def _from_ids(self, answer: ServerAnswer) -> tuple[list[int], str, dict[str, Any]]:
        if answer.token_ids is None:
            raise ServerError(
                f"The server gave no token ids, so it is no {self.server.kind} that knows how to: use a newer version, "
                "or the kind 'openai' with retokenize=True."
            )
        ids, count = answer.token_ids, answer.completion_tokens
        ended = bool(ids) and ids[-1] in self.eos_token_ids
        if answer.finish_reason == "stop" and not ended and count == len(ids) + 1:
            # It counts the end of sequence and leaves it out.
            ids = [*ids, answer.end_token if answer.end_token in self.eos_token_ids else self.tokenizer.eos_token_id]
        return *strip_completion(ids, self.eos_token_ids, self.settings.max_new_tokens), {}

    def _from_text(self, answer: ServerAnswer) -> tuple[list[int], str, dict[str, Any]]:
        limit, count = self.settings.max_new_tokens, answer.completion_tokens
        if count is None:
            raise ServerError(
                "The server does not say how many tokens it sampled (`usage`), so ids made from its text cannot be "
                "checked: use another server."
            )
        if answer.finish_reason == "length" and count <= limit:
            raise ServerError(
                f"The server cut a completion after {count} tokens, though {limit + 1} were allowed: its context is "
                "too small for prompt and completion. Raise it, or lower max_new_tokens."
            )
        ids, changed = retokenize(self.tokenizer, answer.text)
        if count <= limit:
            ids = [*ids, self.tokenizer.eos_token_id]
            return ids, "stop", retokenization_columns(answer.text, len(ids) - count, changed)
        # The token one too many is in the text, unless it is the end. transformers calls an end there a cut too; that
        # looks like a special token left out of the text and is marked as an error, rather than miss those.
        error = len(ids) + (answer.finish_reason == "stop") - count
        return ids[:limit], "length", retokenization_columns(answer.text, error, changed)
