"""Several processes of a run, played by threads: what one exchanges arrives at the others, or nobody waits for long."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import torch


class FakeProcesses:
    """Stands in for `torch.distributed` where objects are gathered.

    Args:
        monkeypatch: of pytest.
        count (`int`): processes.
    """

    def __init__(self, monkeypatch, count):
        self.count = count
        self.exchanges = 0
        self._own, self._given = threading.local(), [None] * count
        self._meeting = threading.Barrier(count, timeout=5)
        for name, fake in {
            "is_initialized": lambda: True,
            "get_world_size": lambda: count,
            "get_rank": lambda: self._own.rank,
            "all_gather_object": self._gather,
        }.items():
            monkeypatch.setattr(torch.distributed, name, fake)

    def _gather(self, everyone, given):
        self._given[self._own.rank] = pickle.dumps(given)
        if self._meeting.wait() == 0:
            self.exchanges += 1
        everyone[:] = [pickle.loads(one) for one in self._given]
        self._meeting.wait()

    def run(self, call):
        """What `call(rank)` returns on each process, or the error that it raises."""

        def outcome(rank):
            self._own.rank = rank
            try:
                return call(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(outcome, range(self.count)))
