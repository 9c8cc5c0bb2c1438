"""The trainer: the recipe of "Accurate, Large Minibatch SGD" on top of `pyallreduce`.

`python -m train classify --preset digits --nproc 2`. Only public names of `pyallreduce` are used
here; the library does not know this package.
"""
