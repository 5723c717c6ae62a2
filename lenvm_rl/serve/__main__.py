"""`python -m lenvm_rl.serve`."""

from transformers import HfArgumentParser

from lenvm_rl.serve.app import ServeArguments, main

if __name__ == "__main__":
    main(HfArgumentParser(ServeArguments).parse_args_into_dataclasses()[0])
