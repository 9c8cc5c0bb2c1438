"""What every rank of the tests would otherwise import for itself: the fork server of ranks.py has it once for all."""

import atexit
import gc

import numpy  # noqa: F401
import pytest  # noqa: F401  0.1 s
import torch._dynamo  # noqa: F401  1.8 s after torch itself, in the first optimizer of a process

import pyallreduce.aggregator  # noqa: F401

# A rank's garbage collector does not go through all of this again, and copies none of it: 0.25 s each time.
# At a process's end it is garbage as ever, or libraries complain of leaks.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
