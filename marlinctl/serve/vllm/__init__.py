"""marlinctl inside of vLLM, which finds it by an entry point (pyproject.toml: vllm.general_plugins).

    plugin.py          register: what vLLM calls in each of its processes
    versions.py        with which releases of vLLM
    linear_kernel.py   a kernel for 4-bit checkpoints that vLLM loads itself: GPTQ, compressed-tensors
    config.py          native folders: which linears are packed, from their headers
    method.py          one linear of such a folder: parameters, loading, product
    layout.py          which part of which tensor goes where, without vLLM
    products.py        kernels compiled before the first request
    cache_key.py       vLLM's cache of compiled models, which must know what our linears look like

Nothing but these files imports vLLM, and plugin.py alone is imported before vLLM has a model to load.
"""
