"""marlinctl: compress language models to 4-bit checkpoints that real runtimes load.

The command line is marlinctl.cli, the Python API marlinctl.api. This file holds the version and imports nothing, so that
`marlinctl --help` answers at once.
"""

__version__ = "0.1.0"
