"""The model card of a trained policy: TRL's, which calls a model `None` that is on no hub."""

import textwrap
from pathlib import Path

from trl import GRPOTrainer

# What TRL's template makes of a base model, and of a trained one, without a hub id.
NO_BASE, NO_NAME = "[None](https://huggingface.co/None)", 'model="None"'


class CardWritingTrainer(GRPOTrainer):
    """`GRPOTrainer` whose cards say of a local model, or one made in memory, what is known of it."""

    def create_model_card(self, *arguments, **options):
        """See TRL."""
        super().create_model_card(*arguments, **options)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir, "README.md")
            kind = self.accelerator.unwrap_model(self.model).config.model_type
            card = path.read_text(encoding="utf-8")
            card = card.replace(NO_BASE, f"a model of type `{kind}` that is on no hub")
            path.write_text(card.replace(NO_NAME, 'model="path/to/this/folder"'), encoding="utf-8")


LENVM_CITATION = textwrap.dedent("""\
    @article{zhang2026length,
        title        = {{Length Value Model: Scalable Value Pretraining for Token-Level Length Modeling}},
        author       = {Zhen Zhang and Changyi Yang and Zijie Xia and Zhen Yang and Chengzhi Liu and Zhaotiao Weng and
                        Yepeng Liu and Haobo Chen and Jin Pan and Chenyang Zhao and Yuheng Bu and Alkesh Patel and
                        Zhe Gan and Xin Eric Wang},
        year         = 2026,
        eprint       = {arXiv:2604.27039},
    }""")
PPO_CITATION = textwrap.dedent("""\
    @article{schulman2017proximal,
        title        = {{Proximal Policy Optimization Algorithms}},
        author       = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
        year         = 2017,
        eprint       = {arXiv:1707.06347},
    }""")
