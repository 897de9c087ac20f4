"""Everything that can go wrong, made on purpose: tables of what is done, and of what must be said about it.

    checkpoints.py   a folder of weights is damaged                                    B, C, D   FAULTS
    commands.py      arguments, places, recipes, numbers, texts, the machine           A, C, E, F   COMMANDS; WORKS: must work all the same
    machines.py      GPUs, drivers and compilers that cannot be used                   F   MACHINES; STILL_WORKS: compressing does
    packed.py        what marlinctl published comes back damaged                       H   PACKED

An entry makes the damage and names the exit code and a text that the error must have. tests/test_faults.py runs every entry of every table,
some of them in a process of their own; the reader's tests ask FAULTS of the preflight as well. The letters are those of the list of faults
behind them: A arguments and paths, B structure of checkpoints, C contents of tensors, D config and tokenizer, E calibration, F resources
and crashes, G hub and network, H packed outputs. Crashes and full disks are made by tests/killing.py, the hub's faults by the server in
tests/checkpoint/test_source.py.
"""
