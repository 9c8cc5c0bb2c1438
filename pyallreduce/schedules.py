"""All-reduce algorithms as data: who exchanges which chunks with whom, step by step.

``ring(rank, size)``, ``halving_doubling(rank, size)`` and ``direct(rank, size)`` return what one
rank does, as a ``Schedule(rank, size, num_chunks, steps)``. Each step is a ``Step(sends, recvs)``
of ``Transfer(peer, begin, end, reduce)``: chunks ``[begin, end)`` of the buffer go to, or come
from, ``peer``, and are added (``reduce``) or overwritten at the receiver. Sends read what was there
before the step; a send meets its receive in the same step. Nothing here communicates, and torch is
not needed.

Goyal et al. 2017, section 4.1, compares ring and halving-doubling, and extends the latter to any
number of ranks by binary blocks. With p ranks and b bytes, each rank sends:

================  =======================  ===================  =============================
algorithm         steps                    bytes                chunks
================  =======================  ===================  =============================
ring              2(p-1)                   2(p-1)/p b           p
halving_doubling  2 log2 p (other p: +2)   2(p-1)/p b (<= 2 b)  largest power of two <= p
direct            2, of p-1 messages       2(p-1)/p b           p
================  =======================  ===================  =============================

``cost`` gives the seconds an algorithm takes by the alpha-beta model: a message of m bytes takes
``alpha_s + m * beta_s_per_byte``, and a rank sends one at a time. ``select`` names the cheapest.
"""

from pyallreduce._core import schedules as _core

Schedule = _core.Schedule
Step = _core.Step
Transfer = _core.Transfer

ring = _core.ring
halving_doubling = _core.halving_doubling
direct = _core.direct

names = _core.names
cost = _core.cost
select = _core.select

__all__ = [
    "Schedule",
    "Step",
    "Transfer",
    "cost",
    "direct",
    "halving_doubling",
    "names",
    "ring",
    "select",
]
