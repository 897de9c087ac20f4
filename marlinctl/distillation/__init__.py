"""How a student is trained toward its teacher. marlinctl/distillation/run.py is the public face.

losses.py      cross entropy, SquareHead and divergence, as sums over counted tokens
settings.py    what the settings come to, and which contradict each other
rows.py        the training text as rows of tokens, and which rows each step reads
open.py     everything that can be refused, before any work
parameters.py      where a tensor of the checkpoint lies in transformers' model
masks.py       the 2:4 masks: fixed, or renewed while all weights are trained
scales.py      linears whose codes stay and whose scales are trained
teacher.py     what the teacher says about a batch: asked as we go, or cached once
distributed.py   one process or many: which saves, reports and holds which part of a parameter
state.py         the folder of a running job: fingerprint, states, resuming
system/signals.py    Ctrl-C and SIGTERM, answered after the current step
loop.py        the training loop over the whole model
blockwise.py   the training loop over one block at a time
publish.py     the result as a checkpoint, checked from disk
"""
