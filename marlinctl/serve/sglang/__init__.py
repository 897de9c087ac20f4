"""marlinctl inside of SGLang, which finds it by an entry point (pyproject.toml: sglang.srt.plugins). It was not run on a GPU yet.

    plugin.py     register: what SGLang calls in each of its processes
    versions.py   for which release of SGLang it was written
    config.py     native folders, as SGLang's quantization config
    method.py     one linear of such a folder

SGLang's layers are a fork of vLLM's, and what both share is in serve/native/. What differs: the folder is named in the model's own config,
a rank is asked of the layer's group, and a model's loader skips tensors that it has no parameter for, so more is counted here.
"""
