"""Machine code as NVIDIA's tools show it: what a kernel takes of registers and memory, and its instructions.

The disassembler takes a third of a second to start and a few hundredths for a kernel, so it is given many of one architecture at once:
their code without the files around it, one after the other.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import accumulate
from operator import methodcaller
from pathlib import Path
from tempfile import TemporaryDirectory

from marlinctl.benchmarking.machine_code import section
from tests.kernels.built import entry, kept

INSTRUCTION_BYTES = 16
# Address, predicate, name, operands.
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)(.*)", flags=re.MULTILINE)
SELECTOR = re.compile(r", (0x\d+)(?:, gsb0)? ;")


@dataclass(frozen=True)
class Usage:
    """What the assembler says of one kernel."""

    registers: int
    stack: int
    local: int
    shared: int  # static, and what the system reserves


@dataclass(frozen=True)
class MachineCode(Usage):
    """The same, and its instructions with all their modifiers."""

    instructions: Counter[str]
    selectors: Counter[str]  # of the lanes with metadata, in sparse products

    def count(self, pattern: str) -> int:
        return sum(number for name, number in self.instructions.items() if re.fullmatch(pattern, name))


def disassemble(kernel: str, architecture: str, cubins: Sequence[bytes]) -> list[MachineCode]:
    """What is in cubins of one architecture that hold one kernel each; kept for equal machine code and tools."""
    tools = [metadata.version("nvidia-cuda-cuobjdump"), metadata.version("nvidia-cuda-nvdisasm")]
    inputs = [[tools, Path(__file__).read_text("utf-8"), hashlib.sha256(cubin).hexdigest()] for cubin in cubins]
    missing = [i for i, key in enumerate(inputs) if not entry("json", key).exists()]
    if missing:
        made = dict(zip(missing, _disassemble(kernel, architecture, [cubins[i] for i in missing]), strict=True))
        for i, code in made.items():
            kept("json", inputs[i], methodcaller("write_text", json.dumps(vars(code))))
    documents = [json.loads(entry("json", key).read_text()) for key in inputs]
    return [MachineCode(**{**document, **{key: Counter(document[key]) for key in ("instructions", "selectors")}}) for document in documents]


def _disassemble(kernel: str, architecture: str, cubins: list[bytes]) -> list[MachineCode]:
    texts = [section(cubin, f".text.{kernel}".encode()) for cubin in cubins]
    with TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        raw.write_bytes(b"".join(texts))
        command = [_tool("nvdisasm"), "--binary", architecture.replace("sm_", "SM"), "--print-code", "--no-dataflow", str(raw)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usages = [usage_of(cubin) for cubin in cubins]
    found = INSTRUCTION.findall(listing)
    ends = list(accumulate(len(text) // INSTRUCTION_BYTES for text in texts))
    assert [int(address, 16) for address, *_ in found] == list(range(0, ends[-1] * INSTRUCTION_BYTES, INSTRUCTION_BYTES))
    codes = []
    for usage, begin, end in zip(usages, [0, *ends], ends, strict=False):
        names = Counter(name for _, name, _ in found[begin:end])
        sparse = [SELECTOR.search(operands) for _, name, operands in found[begin:end] if re.match(r"HG?MMA\.SP\.", name)]
        codes.append(MachineCode(**vars(usage), instructions=names, selectors=Counter(match[1] for match in sparse if match)))
    return codes


def usage_of(cubin: bytes) -> Usage:
    """Without the instructions: a hundredth of a second."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cubin"
        path.write_bytes(cubin)
        command = [_tool("cuobjdump"), "--dump-resource-usage", str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", printed))
    return Usage(int(numbers["REG"]), int(numbers["STACK"]), int(numbers["LOCAL"]), int(numbers["SHARED"]))


def _tool(name: str) -> str:
    """A program of NVIDIA's that a wheel brought."""
    files = [path for path in metadata.files(f"nvidia-cuda-{name}") or () if path.name == name and path.parent.name == "bin"]
    assert len(files) == 1, f"{name} is not where its wheel used to put it"
    return str(files[0].locate())
