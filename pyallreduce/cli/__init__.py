"""The commands of ``pyallreduce``."""
