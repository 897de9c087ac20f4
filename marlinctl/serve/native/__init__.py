"""What servers share that load native folders with marlinctl's kernels. Nothing here imports a server.

    config.py     what every server asks of a config, and the config of a release that is not known
    folder.py     a folder as a server meets it: which linears are packed, checked from the headers before a weight is read
    layout.py     which part of which tensor goes where, on one device or several
    method.py     one linear: parameters, loading, product
    products.py   kernels compiled before the first request
    release.py    which releases of a server a plugin works with
    refusals.py   our errors as a server shows them

vllm/ and sglang/ hold what differs: base classes, the names of settings, and when each of these is asked.
"""
