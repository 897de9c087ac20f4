"""What `marlinctl doctor` tests. Every check tries the thing itself and yields lines that are ok, warn or fail, the last two with a cure.

    result.py        one line of the answer
    installation.py  Python, where marlinctl comes from, its requirements, versions known to be bad, a distribution found twice
    known_bad.py     those versions, with reason and source
    names.py         folders and files that hide a package
    places.py        cache folders, temporary folder, free space, shared memory
    hub.py           reachable, or offline by whose wish; is there a token
    driver.py        an NVIDIA device and its driver, asked without torch
    computing.py     torch, GPU, NVRTC, kernels, packed products, in a child process: an import that crashes must not end the doctor
    child.py         runs that process and reads its lines

All but computing.py import neither torch nor anything else that is slow, so that `doctor --quick` answers at once; what may be broken
(packaging, huggingface_hub) is imported where it is used.
"""
