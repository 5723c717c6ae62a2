"""`python -m lenvm_rl.serve`."""

from lenvm_rl.programs import ProgramParser, run_program
from lenvm_rl.serve.app import ServeArguments, main

if __name__ == "__main__":
    purpose = "Serves an OpenAI-compatible endpoint whose completions a length value model can guide."
    parser = ProgramParser(ServeArguments, prog="python -m lenvm_rl.serve", description=purpose)
    run_program(lambda: main(*parser.parse_args_and_config()), "Stopped.")
