"""Fuzzes what a rank reads from the store of the rendezvous: ``python tests/fuzz_rendezvous.py CORPUS SECONDS``.

Coverage-guided by atheris (libFuzzer). Any bytes of a peer end in a roster or in an error of the family.
"""

from __future__ import annotations

import sys
from typing import Any

try:
    import atheris
except ImportError:
    print("SKIPPED: the rendezvous is not fuzzed, atheris has no wheel for this Python")
    sys.exit(0)

with atheris.instrument_imports(include=["pyallreduce.rendezvous", "json"]):
    import json

    from pyallreduce import rendezvous

from pyallreduce.errors import Error

WILD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2,
    1e999,
    "",
    "a" * 65,
    "\ud800",
    [],
    {},
    [[]],
    {"size": 2},
)
SIZE = 2


class Store:
    """One rank's view of a store in which the other has written ``payload``, and has read everything."""

    def __init__(self, peer: int, payload: bytes) -> None:
        self._values = {f"communicator/1/{peer}": payload}

    def add(self, key: str, amount: int) -> int:
        return SIZE if key.endswith("/read") else amount

    def set(self, key: str, value: str) -> None:
        self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)


def payload_of(data: atheris.FuzzedDataProvider) -> bytes:
    """Any bytes; or a record as ranks write it, with some fields missing or of another kind."""
    if data.ConsumeBool():
        return bytes(data.ConsumeBytes(1 << 12))
    record = {
        "token": "0" * 64,
        "node": rendezvous._node_key(),
        "size": SIZE,
        "version": rendezvous.__version__,
    }
    for field in list(record):
        change = data.ConsumeIntInRange(0, 4)
        if change == 1:
            del record[field]
        elif change == 2:
            record[field] = data.PickValueInList(list(WILD))
        elif change == 3:
            record[field] = data.ConsumeUnicode(100)
    return json.dumps(record).encode()


def one_input(raw: bytes) -> None:
    data = atheris.FuzzedDataProvider(raw)
    rank = data.ConsumeIntInRange(0, SIZE - 1)
    try:
        roster = rendezvous.meet(Store(1 - rank, payload_of(data)), rank, SIZE, timeout_s=0.0)
    except Error as error:
        if error.peers not in ((), (0,), (1,)):
            raise AssertionError(f"peers that do not exist: {error.peers}") from error
        return
    assert len(roster.token) == 64
    assert roster.token.isascii()
    assert roster.node_ranks == (0, 1)
    assert (roster.node_rank, roster.num_nodes) == (0, 1)


def main() -> None:
    corpus, seconds = sys.argv[1:]
    options = [f"-max_total_time={seconds}", "-max_len=512", "-verbosity=1", "-print_final_stats=1"]
    # The first folder is libFuzzer's to write to: what it finds does not go into the committed corpus.
    atheris.Setup([sys.argv[0], *options, corpus], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
