"""A folder that Hugging Face's `kernels` package loads: the operators, modules and packers of marlinctl, without marlinctl.

    python scripts/make_kernels_hub.py OUT
    python -c "from pathlib import Path; import kernels; kernels.get_local_kernel(Path('OUT'))"

    marlinctl/{kernels,pack,sparsify,quantize}/*.py       what the operators need, found by their imports
         │  from marlinctl.pack.types import ..  ─►  from ..pack.types import ..      a folder is loaded under a name of its own
         │  torch.ops.marlinctl                  ─►  torch.ops.marlinctl_<digest>     several versions may be loaded in one process
         ▼
    OUT/build/torch-universal/   __init__.py  metadata.json  kernels/ (with csrc/ and dispatch.json)  pack/  sparsify/  quantize/
    OUT/README.md, LICENSE

One variant for all versions of Python, torch and CUDA, because kernels are compiled at first use. docs/decisions/README.md says what of the
hub's rules that breaks, and why nothing is published yet. Nothing is uploaded here.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "marlinctl"
ROOMS = ("quantize", "sparsify", "pack", "kernels")
VERSION = 1  # of the interface below: goes up when a call of it changes
VARIANT = "torch-universal"
INTERFACE = '''"""INT4 matrix products for Ampere, Ada and Hopper, dense and 2:4, compiled at first use without a C++ compiler.

    marlin_gemm(activations [.., K], qweight, scales, out_features, group_size, bias=None, overlap=False, rounding="none") -> [.., N]
    sparse_marlin_gemm(activations, qweight, meta, scales, out_features, group_size, bias=None, overlap=False, rounding="none")
    pack_marlin(QuantizedLinear(codes [N, K] int8, scales [N, G] float16, group_size)) -> PackedLinear
    pack_sparse_marlin(SparseQuantizedLinear(codes, scales, group_size, mask)) -> PackedSparseLinear
    MarlinLinear(packed), SparseMarlinLinear(packed): modules
"""

from .kernels.linear import MarlinLinear, SparseMarlinLinear
from .kernels.ops import marlin_gemm, sparse_marlin_gemm
from .pack.marlin import pack_marlin, unpack_marlin
from .pack.sparse_marlin import pack_sparse_marlin, unpack_sparse_marlin
from .pack.types import PackedLinear, PackedSparseLinear
from .quantize.types import QuantizedLinear
from .sparsify.types import SparseQuantizedLinear

__all__ = [
    "MarlinLinear", "PackedLinear", "PackedSparseLinear", "QuantizedLinear", "SparseMarlinLinear", "SparseQuantizedLinear", "marlin_gemm",
    "pack_marlin", "pack_sparse_marlin", "sparse_marlin_gemm", "unpack_marlin", "unpack_sparse_marlin",
]
'''
CARD = """---
library_name: kernels
license: apache-2.0
---

# marlinctl

{interface}

```python
from kernels import get_kernel

marlin = get_kernel("OWNER/marlinctl", version={version}, trust_remote_code=["OWNER/marlinctl"])
```

Needs cuda-bindings and NVRTC of CUDA 13, which torch's CUDA wheels for Linux bring. On a CPU the modules multiply by torch's int4
operator, the operators by a slow reference. Written by `scripts/make_kernels_hub.py` of marlinctl, from the sources with SHA-256 {digest}.
"""
_ALLOWED = sys.stdlib_module_names | {"torch"}  # the hub's rule
_BINDINGS = "cuda"  # and the one exception: inside of functions


def sources() -> dict[str, str]:
    """Every file of the variant but its metadata, by its path: text, with relative imports and the operators' own namespace."""
    found: dict[str, str] = {"__init__.py": INTERFACE}
    waiting = _modules(ast.parse(INTERFACE), "")
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        text = re.sub(r"^(\s*)from marlinctl\.", r"\1from ..", (PACKAGE / path).read_text("utf-8"), flags=re.MULTILINE)
        text = re.sub(r"^(\s*)from marlinctl import ", r"\1from .. import ", text, flags=re.MULTILINE)
        found[path] = text
        waiting |= _modules(ast.parse(text, path), path)
    for source in sorted((PACKAGE / "kernels" / "csrc").iterdir()):
        found[f"kernels/csrc/{source.name}"] = source.read_text("utf-8")
    found["kernels/dispatch.json"] = (PACKAGE / "kernels" / "dispatch.json").read_text("utf-8")
    return found


def _modules(tree: ast.AST, path: str) -> set[str]:
    """The modules of the rooms that a file imports. ValueError for an import that the hub does not allow, except `cuda` in a function."""
    found = set()
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            found |= set(_files(node))
            continue
        else:
            continue
        for name in names:
            first = name.partition(".")[0]
            if first not in _ALLOWED and not (first == _BINDINGS and id(node) in inside):
                raise ValueError(f"{path}, line {node.lineno}: imports {name}, which a kernel of the hub may not")
    return found


def _files(node: ast.ImportFrom) -> Iterator[str]:
    """`from ..pack.types import X` and `from ..pack import types` -> pack/types.py"""
    parts = (node.module or "").split(".")
    if parts[0] not in ROOMS:
        raise ValueError(f"line {node.lineno}: imports {node.module}, which is in none of {', '.join(ROOMS)}")
    if len(parts) == 2:
        yield f"{parts[0]}/{parts[1]}.py"
    else:
        yield from (f"{parts[0]}/{alias.name}.py" for alias in node.names)


def digest_of(files: Mapping[str, str]) -> str:
    """SHA-256 over names and contents."""
    digest = hashlib.sha256()
    for path, text in sorted(files.items()):
        digest.update(f"{path}\0{len(text.encode())}\0".encode() + text.encode())
    return digest.hexdigest()


def write(out: Path) -> str:
    """The repository folder; returns the digest of its sources. FileExistsError where there is something."""
    files = sources()
    digest = digest_of(files)
    namespace = f"marlinctl_{digest[:12]}"
    for path, kind in (("kernels/ops.py", "DEF"), ("kernels/cpu.py", "FRAGMENT")):
        for old, new in (
            (f'Library("marlinctl", "{kind}")', f'Library("{namespace}", "{kind}")'),
            ("torch.ops.marlinctl.", f"torch.ops.{namespace}."),
        ):
            if old not in files[path]:
                raise ValueError(f"{path} has no {old} to rename")
            files[path] = files[path].replace(old, new)
    metadata = {
        "id": namespace, "name": "marlinctl", "version": VERSION, "license": "apache-2.0", "python-depends": [],
        "backend": {"type": "cuda", "archs": ["8.0", "9.0"]},
    }  # fmt: skip
    files["metadata.json"] = json.dumps(metadata, indent=2) + "\n"
    out.mkdir(parents=True)
    for path, text in files.items():
        place = out / "build" / VARIANT / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, "utf-8")
    interface = ast.get_docstring(ast.parse(INTERFACE)) or ""
    (out / "README.md").write_text(CARD.format(interface=interface, version=VERSION, digest=digest), "utf-8")
    shutil.copyfile(ROOT / "LICENSE", out / "LICENSE")
    return digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write; it must not exist")
    arguments = parser.parse_args()
    print(f"{arguments.out}: version {VERSION}, sources {write(arguments.out)}")


if __name__ == "__main__":
    main()
