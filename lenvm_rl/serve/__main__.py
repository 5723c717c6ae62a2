"""`python -m lenvm_rl.serve`."""

from lenvm_rl.programs import ProgramParser, run_program
from lenvm_rl.serve.app import ServeArguments, main

if __name__ == "__main__":
    description = "Serves an OpenAI-compatible endpoint whose completions a length value model can guide."
    parser = ProgramParser(ServeArguments, prog="python -m lenvm_rl.serve", description=description)
    run_program(lambda: main(*parser.parse_args_and_config()), "Stopped.")
