"""Codes to bytes and back: MARLIN tiles for kernels, compressed-tensors and GPTQ words for everybody else.

    tile.py           the layouts, one function each
    marlin.py         native MARLIN
    sparse_marlin.py  native Sparse-MARLIN for 2:4, and new survivors while a model runs
    interchange.py    compressed-tensors pack-quantized, GPTQ v1 and v2

Every packer has an exact inverse and neither of the two rounds anything.
"""
