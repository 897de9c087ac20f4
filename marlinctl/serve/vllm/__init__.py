"""marlinctl inside of vLLM, which finds it by an entry point (pyproject.toml: vllm.general_plugins).

    plugin.py          register: what vLLM calls in each of its processes
    versions.py        with which releases of vLLM
    linear_kernel.py   a kernel for 4-bit checkpoints that vLLM loads itself: GPTQ, compressed-tensors
    config.py          native folders, as vLLM's quantization config
    method.py          one linear of such a folder
    cache_key.py       vLLM's cache of compiled models, which must know what our linears look like

What does not depend on vLLM is in serve/native/. Nothing else imports vLLM, and plugin.py alone is imported before it has a model to load.
"""
