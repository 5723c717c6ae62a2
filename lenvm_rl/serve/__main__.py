"""`python -m lenvm_rl.serve`."""

from transformers import HfArgumentParser

import lenvm_rl.serve
from lenvm_rl.serve.app import ServeArguments, main

if __name__ == "__main__":
    description = lenvm_rl.serve.__doc__.partition("\n")[0]
    main(HfArgumentParser(ServeArguments, description=description).parse_args_into_dataclasses()[0])
