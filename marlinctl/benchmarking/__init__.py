"""`marlinctl bench`, in parts: marlinctl/benchmarking/run.py strings them together.

    cases.py           what is measured: shapes, layer sets, the layers of a checkpoint
    weights.py         random words, scales and metadata, made where they are used
    accuracy.py        is it right: before anything is timed
    gpu.py             graphs, events, ceilings and clocks of one CUDA device; nothing else here knows CUDA
    timing.py          rotation, turns, medians
    peers.py           other people's kernels, where they are installed
    documents.py       measurements as one JSON document, and back
    table.py           the document for people
    pictures.py        the document as the MARLIN paper draws it
    building.py        compiling ahead of time, which needs no GPU
    machine_code.py    registers and stack, read from the header of a cubin

Measuring and telling meet in the document alone: table and pictures are drawn from a file as well as from a run.
"""
