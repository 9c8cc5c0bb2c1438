"""Faults on purpose: each rank of a small job is stopped at a chosen moment, one of them is struck, all are judged.

``cases`` is the matrix as data, ``server`` a fork server that runs one case and collects facts, ``rank`` the program of
its ranks, ``kernel_view`` what the operating system tells about a thread, ``judge`` compares facts with the contract.
``python -m tests.chaos`` (``make chaos``) runs the whole matrix; tests/test_chaos.py a pairwise sample.
"""
