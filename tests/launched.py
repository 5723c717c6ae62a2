"""Two real processes of a script (gloo), which leave their process group before they end.

A process that ends with its group alive may abort: a thread of gloo that waits for the interpreter is then cut off.
"""

import runpy
import subprocess
import sys


def two_processes(script, *arguments):
    """The command that runs a script in two processes, on a port that is free."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [sys.executable, *launcher, __file__, *map(str, (script, *arguments))]


def run_two(script, *arguments, timeout=300):
    """Run a script in two processes, and fail with what they said if one of them does."""
    done = subprocess.run(two_processes(script, *arguments), capture_output=True, text=True, timeout=timeout)
    said = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert done.returncode == 0, "\n".join(said)[-3000:] or done.stderr[-3000:]


if __name__ == "__main__":
    from torch import distributed

    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    if distributed.is_initialized():
        distributed.destroy_process_group()
