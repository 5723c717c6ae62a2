"""The card beside the weights says what the values mean and where they come from, and reaches the hub with them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.utils.hub as hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from tiny import tiny_llama, tiny_tokenizer

from lenvm_rl.modeling.card import model_card, write_model_card
from lenvm_rl.modeling.length_value_model import LengthValueConfig, LengthValueModel

KNOWN = {
    "gamma_fit": {"quantile": 0.99, "completions": 1234, "percentiles": {"50": 80, "99": 460}},
    "generator": "sandbox|policy",
    "truncated_share": 0.03125,
    "sampling": {"temperature": 0.7, "max_new_tokens": 512},
}


def make_model(form="full"):
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=0.99, form=form, tokenizer=tiny_tokenizer(), **KNOWN)
    model.config.metrics = {"math": {"mae": 12.5, "tau": 0.8125}, "chat": {"mae": 40.0, "bias": -1e-7}}
    return model


def test_the_card_says_everything_that_the_config_knows():
    text = model_card(make_model().config, name="someone/lenvm")
    for part in (
        "γ = 0.99**",
        "`G = -(1 - γ^n)`",
        "negative costs in (-1, 0). 0 is the end itself, -1 infinitely far from it",
        "V = -1/2, is 69 tokens.",  # ln 2 / -ln 0.99 = 68.97
        "| Generator (whose completions) | sandbox\\|policy |",
        "| Sampling | temperature 0.7, max_new_tokens 512 |",
        "| γ fitted on | quantile 0.99, completions 1234, percentiles (50: 80, 99: 460) |",
        "| Truncated completions | 3.12 % |",
        "| Tokenizer | vocab_size 64, ",
        "| metric | math | chat |\n| --- | ---: | ---: |\n"
        "| `mae` | 12.5 | 40 |\n| `tau` | 0.8125 | – |\n| `bias` | – | -1e-07 |",
        "LengthValueModel.from_pretrained('someone/lenvm')\n",
    ):
        assert part in text, part
    card = ModelCard(text)
    assert card.data.tags == ["length-value-model"] and card.data.library_name == "transformers"
    assert card.data.base_model is None


def test_what_is_not_known_is_said_to_be_so():
    text = model_card(LengthValueConfig(backbone_config=tiny_llama().config, gamma=0.9))
    assert text.count("| not recorded |") == 5 and "Results" not in text
    unknown = model_card(LengthValueConfig(backbone_config=tiny_llama().config))
    assert "γ is not recorded" in unknown and "does not load" in unknown


def test_metrics_without_domains_are_one():
    config = make_model().config
    config.metrics = {"mae": 3.0}
    assert "| metric | all |\n| --- | ---: |\n| `mae` | 3 |" in model_card(config)


@pytest.mark.parametrize("form", ["adapter", "head"])
def test_a_form_without_a_decoder_is_called_that(form):
    config = make_model(form).config
    config.backbone_config.name_or_path = "Qwen/Qwen2.5-0.5B"
    text = model_card(config, "x/y")
    assert f"`form: {form}`" in text and "base=policy" in text and "without the base model" in text
    assert ModelCard(text).data.base_model == "Qwen/Qwen2.5-0.5B"
    config.backbone_config.name_or_path = "/somewhere/here"
    assert ModelCard(model_card(config)).data.base_model is None and "/somewhere" not in model_card(config)


def test_the_card_is_written_on_saving_and_again_but_not_over_ones_own(tmp_path):
    model, path = make_model(), tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    assert path.read_text(encoding="utf-8") == model_card(model.config, tmp_path.name)
    model.config.metrics = {"law": {"mae": 1.0}}
    model.save_pretrained(tmp_path)
    assert "law" in path.read_text(encoding="utf-8")
    path.write_text("Mine.", encoding="utf-8")
    write_model_card(tmp_path, model.config)
    assert path.read_text(encoding="utf-8") == "Mine."
    model.save_pretrained(tmp_path / "elsewhere", is_main_process=False)
    assert not (tmp_path / "elsewhere" / "README.md").exists()


class FakeHub:
    """Keeps what is uploaded."""

    def __init__(self):
        self.files = {}

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **_):
        self.files = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}
        return repo_id


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
@pytest.mark.parametrize("form", ["full", "adapter", "head"])
def test_the_card_goes_to_the_hub_with_the_weights(way, form, tmp_path, monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(hub, "hf_api", lambda: fake)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: fake)

    def no_card(*_, **__):
        raise EntryNotFoundError("no card there yet")

    monkeypatch.setattr(ModelCard, "load", no_card)
    model = make_model(form)
    if way == "push_to_hub":
        model.push_to_hub("someone/lenvm")
    else:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/lenvm")
    assert sorted(fake.files) == ["README.md", "config.json", "model.safetensors"]
    assert fake.files["README.md"].decode() == model_card(model.config, "someone/lenvm")
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in fake.files.items():
        (folder / name).write_bytes(content)
    loaded = LengthValueModel.from_pretrained(folder, **({} if form == "full" else {"base": tiny_llama()}))
    assert loaded.config.generator == KNOWN["generator"] and loaded.config.metrics == model.config.metrics


def test_a_card_that_somebody_wrote_on_the_hub_is_kept(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(hub, "hf_api", lambda: fake)
    monkeypatch.setattr(ModelCard, "load", lambda *_, **__: ModelCard("---\ntags: []\n---\n\nTheirs."))
    make_model().push_to_hub("someone/lenvm")
    assert "Theirs." in fake.files["README.md"].decode()
