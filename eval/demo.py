"""A page to try length guidance on: a prompt, its base and its guided completion side by side, coloured by token.

    python -m eval.demo                                 # on the sandbox, with what `make quickstart` left
    python -m eval.demo --policy PATH --length_value_model PATH --chat true

Both completions have one seed and one candidate rule, so strength 0 writes the same text twice. Each token is coloured
by its horizon shift, as in `eval.viewer` (orange: the completion became longer than expected, blue: shorter), and says
more when it is pointed at. The page asks nothing of the network. Needs the extra `demo`.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

from eval.datasets import sandbox_problems
from eval.runs import CANDIDATES, SANDBOX_CANDIDATES, ModelArguments, find_run, is_sandbox, run_evaluation, set_threads
from eval.viewer.tokens import Piece, TokenValues, token_pieces, token_values
from lenvm_rl.decoding.generation import generate_guided
from lenvm_rl.decoding.guidance import AT_LEAST, AT_MOST, EQUAL_TO, FEASIBLE, RULES, TILT, LengthGuidance
from lenvm_rl.endings import end_token_ids, own_length, padding_id, strip_completion
from lenvm_rl.modeling.backbones import context_of
from lenvm_rl.modeling.loading import load_length_value_model, load_policy, load_tokenizer
from lenvm_rl.programs import sentence_of
from lenvm_rl.tokenization import check_room, tokenize_prompts

try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise ImportError("eval.demo is a page of gradio: pip install -e '.[demo]'") from error

logger = logging.getLogger(__name__)

NAMES = ("Base", "Guided")
MODE_CHOICES = [("lean", TILT), ("equal to", EQUAL_TO), ("at most", AT_MOST), ("at least", AT_LEAST)]
EXAMPLES = 8
# Fonts of the reader's system: the themes' own come from a network.
SANS, MONO = ("system-ui", "Segoe UI", "Arial", "sans-serif"), ("ui-monospace", "Menlo", "Consolas", "monospace")
# Light as in eval/viewer; in the dark the text is light, and the hues are deep enough for it.
STYLE = """
.gradio-container { --longer: #f08a24; --shorter: #549cde; --paper: #fff; --ink: #1a1a1a; --soft: #5c5c5c; }
.dark .gradio-container { --longer: #a85508; --shorter: #1f66a8; --paper: #18181b; --ink: #f0f0f0; --soft: #a8a8ac; }
#base .html-container, #guided .html-container { padding: 0; }
.heat { background: var(--paper); color: var(--ink); border: 1px solid var(--border-color-primary); border-radius: 6px;
  padding: 10px 14px; min-height: 130px; }
.heat .name { font-weight: 600; font-size: 16px; } .heat .facts { color: var(--soft); margin: 2px 0 8px; }
.heat .facts b { color: var(--ink); font-weight: 600; } .heat .t { border-radius: 2px; padding: 2px 0; }
.heat .text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; max-height: 50vh; overflow-y: auto; }
.heat .longer { background: color-mix(in srgb, var(--longer) var(--share), var(--paper)); }
.heat .shorter { background: color-mix(in srgb, var(--shorter) var(--share), var(--paper)); }
.heat .special { font: 12px var(--font-mono); border: 1px solid #777; padding: 1px 4px; margin: 0 2px; }
.heat .part::before { content: "▯"; color: var(--soft); } .heat .end::before { content: "↵"; color: var(--soft); }
.legend { display: flex; gap: 8px; align-items: center; justify-content: center; }
.legend .bar { width: 190px; height: 15px; border: 1px solid #999;
  background: linear-gradient(to right, var(--shorter), var(--paper), var(--longer)); }
"""


@dataclass
class DemoArguments(ModelArguments):
    """Which models the page shows, and where it is served."""

    chat: bool | None = HfArg(
        default=None,
        help="Wrap the prompt as a user's message, for the policy's chat template. Default: as in the run, else not.",
    )
    max_new_tokens: int | None = HfArg(
        default=None, help="Longest completion at first; the page can change it. Default: as the model was fitted on."
    )
    max_strength: float = HfArg(default=10.0, help="Where the slider of the strength ends, either way.")
    host: str = HfArg(default="127.0.0.1", help="Address to serve on; 0.0.0.0 lets other machines in.")
    port: int = HfArg(default=7860, help="Port to serve on.")

    def __post_init__(self) -> None:
        if not self.max_strength > 0:
            raise ValueError(f"max_strength must be above 0, got {self.max_strength}.")


@dataclass(frozen=True)
class DemoModels:
    """What completions are made with.

    Args:
        policy (`PreTrainedModel`), length_value_model (`LengthValueModel`), tokenizer: loaded, and checked to fit.
        candidates ([`LengthGuidance`]): temperature and candidate rule of both completions, without guidance.
        chat (`bool`): whether the prompt is wrapped as a user's message.
        examples (sequence of `str`): prompts to choose from; none but for the sandbox's policies.
    """

    policy: PreTrainedModel
    length_value_model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    candidates: LengthGuidance
    chat: bool = False
    examples: Sequence[str] = ()


@dataclass(frozen=True)
class DemoSettings:
    """What the page sets; a field that means nothing to the mode is left out of the guidance."""

    mode: str = TILT
    strength: float = 2.0
    target_length: int = 12
    rule: str = FEASIBLE
    seed: int = 0
    max_new_tokens: int = 96

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value < 2**63:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")

    def guidance(self, candidates: LengthGuidance) -> LengthGuidance:
        """The guidance that the settings ask for, on top of a candidate rule."""
        if self.mode == TILT:
            return replace(candidates, strength=self.strength)
        return replace(candidates, mode=self.mode, target_length=self.target_length, rule=self.rule)


@dataclass(frozen=True)
class ShownCompletion:
    """A completion as the page shows it.

    Args:
        pieces (list of [`~eval.viewer.tokens.Piece`]): the text of each token.
        values ([`~eval.viewer.tokens.TokenValues`]): what the length value model says at each.
        predicted (`float`): length that it predicts at the prompt, end-of-sequence not counted.
        length (`int`): realised, end-of-sequence not counted.
        finished (`bool`): whether it ended; else it was cut.
    """

    pieces: list[Piece]
    values: TokenValues
    predicted: float
    length: int
    finished: bool


def load_models(args: DemoArguments) -> tuple[DemoModels, DemoArguments]:
    """The models that the arguments name, or the run's, and the arguments filled in with how those sample."""
    source = find_run(args.run_dir, args.policy, args.length_value_model)
    args = args.from_run(source).as_fitted()
    tokenizer = load_tokenizer(args.policy, source.data.get("pad_token"))
    sandbox = is_sandbox(tokenizer)
    set_threads(sandbox)
    base = args.base or args.policy
    length_value_model = load_length_value_model(args.length_value_model, base, tokenizer=tokenizer)
    policy = load_policy(args.policy)
    ends = end_token_ids(tokenizer, policy.generation_config)
    # Nothing of the policy's own settings acts but its ends: no repetition penalty, no top-k of its own.
    policy.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=padding_id(tokenizer, ends))
    candidates = LengthGuidance(temperature=args.temperature, **(SANDBOX_CANDIDATES if sandbox else CANDIDATES))
    chat = bool(source.data.get("chat")) if args.chat is None else args.chat
    examples = [problem.prompt for problem in sandbox_problems(EXAMPLES)] if sandbox else []
    return DemoModels(policy, length_value_model, tokenizer, candidates, chat, examples), args


def complete_both(models: DemoModels, prompt: str, settings: DemoSettings) -> list[ShownCompletion]:
    """The base completion of a prompt and the guided one, drawn with the same random numbers.

    What cannot be done is a `ValueError`, before anything is generated.
    """
    guidance, tokenizer = settings.guidance(models.candidates), models.tokenizer
    given = [{"role": "user", "content": prompt}] if models.chat else prompt
    [prompt_ids] = tokenize_prompts(tokenizer, [given])
    unknown = [word for word in prompt.split() if word not in tokenizer.get_vocab()] if is_sandbox(tokenizer) else []
    if unknown:
        raise ValueError(f"The sandbox has no words {', '.join(unknown)}: write the prompt as in the examples.")
    check_room([len(prompt_ids)], settings.max_new_tokens, context_of(models.policy.config), "The prompt")
    # The guided one first: what is refused is refused before time is spent.
    records = [sample_record(models, prompt_ids, each, settings) for each in (guidance, models.candidates)][::-1]
    ends = end_token_ids(tokenizer, models.policy.generation_config)
    found = token_values(models.length_value_model, records)
    return [
        ShownCompletion(
            pieces=token_pieces(tokenizer, record["completion_ids"], prompt_ids),
            values=values,
            predicted=max(0.0, float(values.remaining[0]) - 1.0),
            length=own_length(record["completion_ids"], ends),
            finished=record["finish_reason"] == "stop",
        )
        for record, values in zip(records, found, strict=True)
    ]


@torch.no_grad()
def sample_record(
    models: DemoModels, prompt_ids: list[int], guidance: LengthGuidance, settings: DemoSettings
) -> dict[str, Any]:
    """A completion as a record of rollouts; the global random state is left as it was."""
    policy, budget = models.policy, settings.max_new_tokens
    ends = end_token_ids(models.tokenizer, policy.generation_config)
    ids = torch.tensor([prompt_ids], device=policy.device)
    with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        output = generate_guided(
            policy, models.length_value_model, inputs, guidance, tokenizer=models.tokenizer, max_new_tokens=budget
        )
    completion_ids, reason = strip_completion(output[0, ids.shape[1] :].tolist(), ends, budget)
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "finish_reason": reason}


def colour_limit(shown: Sequence[ShownCompletion]) -> float:
    """The shift that has the full colour: nearly all are told apart, as in `eval/viewer/page.js`."""
    shifts = torch.cat([one.values.horizon_shift for one in shown]).abs().sort().values
    return float(shifts[int(0.99 * (len(shifts) - 1))]) or float(shifts[-1]) or 1.0


def heat_map(name: str, shown: ShownCompletion, limit: float) -> str:
    """A completion as HTML: what is known of it, and its tokens coloured by their horizon shift."""
    end = "ended" if shown.finished else "cut, its full length is not known"
    facts = f"<b>{shown.length} tokens</b>, {end} · predicted at the prompt: <b>{shown.predicted:.1f}</b>"
    tokens = "".join(_token_html(shown, place, limit) for place in range(len(shown.pieces)))
    return _panel(name, facts, tokens)


def _panel(name: str, facts: str, tokens: str = "") -> str:
    inside = f'<div class="name">{name}</div><div class="facts">{facts}</div><div class="text">{tokens}</div>'
    return f'<div class="heat">{inside}</div>'


def legend(limit: float) -> str:
    """What the colours mean, as HTML."""
    low, high = (f"{end:+.3f}" for end in (-limit, limit))
    return f'<div class="legend">shorter {low}<span class="bar"></span>{high} longer (horizon shift, in value)</div>'


def _token_html(shown: ShownCompletion, place: int, limit: float) -> str:
    piece, shift = shown.pieces[place], float(shown.values.horizon_shift[place])
    change, before = float(shown.values.shift_in_tokens[place]), float(shown.values.remaining[place])
    kind = "special" if piece.special else "part" if piece.part < piece.parts else ""
    direction = "longer" if shift > 0 else "shorter"
    told = f"{abs(change):.2f} tokens {'longer' if change > 0 else 'shorter'} than expected"
    title = f"token {place + 1}: {told}; still to come {before:.1f} → {before + change - 1:.1f}"
    text, share = _escape(piece.text).replace("\n", '<i class="end">\n</i>'), 100 * min(1.0, abs(shift) / limit)
    return f'<span class="t {direction} {kind}" style="--share:{share:.1f}%" title="{title}">{text}</span>'


def _escape(text: str) -> str:
    """Text as HTML, of which gradio's own templates find nothing to fill in."""
    return "".join(f"&#{ord(sign)};" if sign in "${}@" else sign for sign in html.escape(text))


def respond(models: DemoModels, prompt: str, settings: Mapping[str, Any]) -> tuple[str, str, str]:
    """What pressing the button shows: both heat maps and the legend; what is refused, as a sentence in the page."""
    try:
        shown = complete_both(models, prompt, DemoSettings(**settings))
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        raise gr.Error(_escape(sentence), duration=None, print_exception=False) from error
    limit = colour_limit(shown)
    return *(heat_map(name, one, limit) for name, one in zip(NAMES, shown, strict=True)), legend(limit)


def build_page(models: DemoModels, args: DemoArguments) -> gr.Blocks:
    """The page; nothing is sent to gradio's makers."""
    budget, strength = args.max_new_tokens, min(3.0, args.max_strength)
    first = DemoSettings(strength=strength, target_length=min(12, budget), max_new_tokens=budget)
    with gr.Blocks(title="Length guidance", analytics_enabled=False) as page:
        gr.Markdown(f"# Length guidance\n{_about(models, args)}")
        # The longest of the first four says most.
        prompt = gr.Textbox(max(models.examples[:4], key=len, default=""), label="prompt", lines=2, elem_id="prompt")
        if models.examples:
            gr.Examples(list(models.examples), prompt, label="prompts of the sandbox")
        controls = _controls(first, args.max_strength)
        press = gr.Button("Complete", variant="primary", elem_id="complete")
        with gr.Row():
            shown = [gr.HTML(_panel(name, "Press Complete."), elem_id=name.lower()) for name in NAMES]
        key = gr.HTML(elem_id="key")

        def press_button(text: str, *values: Any) -> tuple[str, str, str]:
            return respond(models, text, dict(zip(controls, values, strict=True)))

        # Gradio runs one call of an event at a time: the random state of torch is the whole process's.
        inputs = [prompt, *controls.values()]
        gr.on([press.click, prompt.submit], press_button, inputs, [*shown, key], show_progress_on=shown)
    return page


def _controls(first: DemoSettings, max_strength: float) -> dict[str, gr.components.Component]:
    """What sets each field of the settings, in their order; what means nothing to the mode is hidden."""
    with gr.Row():
        mode = gr.Radio(MODE_CHOICES, value=first.mode, label="mode", elem_id="mode")
        strength = gr.Slider(
            -max_strength, max_strength, first.strength, step=max_strength / 100, label="strength",
            info="above 0: shorter; below: longer", elem_id="strength",
        )  # fmt: skip
        target = gr.Slider(
            0, first.max_new_tokens, first.target_length, step=1, label="target length", info="in tokens",
            elem_id="target", visible=False,
        )  # fmt: skip
        rule = gr.Radio(list(RULES), value=first.rule, label="rule", elem_id="rule", visible=False)
        seed = gr.Number(first.seed, precision=0, label="seed", elem_id="seed")
        budget = gr.Number(first.max_new_tokens, precision=0, label="max tokens", elem_id="budget")
    changing = [strength, target, rule]
    mode.change(
        lambda chosen: [gr.update(visible=(chosen == TILT) == (each is strength)) for each in changing],
        mode, changing, show_progress="hidden")  # fmt: skip
    return dict(zip(asdict(first), (mode, strength, target, rule, seed, budget), strict=True))


def _about(models: DemoModels, args: DemoArguments) -> str:
    rule = models.candidates
    return (
        f"Policy `{args.policy}`, length value model `{args.length_value_model}`. Both completions: temperature "
        f"{rule.temperature:g}, top-k {rule.top_k}, top-p {rule.top_p:g}, min-p {rule.min_p:g}, and one seed. Lengths "
        "leave the end-of-sequence token out. Point at a token to read what it changed."
    )


class OwnServerOnly:
    """Tells the browser with every answer to load nothing from elsewhere: some versions of gradio ask a network.

    Args:
        app (`starlette.types.ASGIApp`): what answers.
    """

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", self.POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def serve_page(page: gr.Blocks, args: DemoArguments, block: bool = True) -> None:
    """Serves the page on this machine, until Ctrl-C or, without `block`, until it is closed."""
    # It tells of the requests with which gradio asks whether its own server has come up.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # SSR would need a server of its own, and quiet leaves out an invitation to a public link.
    page.launch(
        server_name=args.host, server_port=args.port, share=False, ssr_mode=False, quiet=True, footer_links=[],
        prevent_thread_lock=True, css=STYLE, theme=gr.themes.Default(font=SANS, font_mono=MONO),
        app_kwargs={"middleware": [Middleware(OwnServerOnly)]},
    )  # fmt: skip
    logger.info("Open http://%s:%d in a browser; Ctrl-C ends it.", args.host, args.port)
    if block:
        page.block_thread()


def main(args: DemoArguments) -> None:
    """Loads the models and serves the page."""
    transformers_logging.set_verbosity_error()
    models, args = load_models(args)
    serve_page(build_page(models, args), args)


if __name__ == "__main__":
    run_evaluation(DemoArguments, main, "eval.demo", __doc__)
