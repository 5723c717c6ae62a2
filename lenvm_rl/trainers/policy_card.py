"""The model card of a trained policy: TRL's, which calls a model `None` that is on no hub."""

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
