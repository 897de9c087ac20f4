"""A tied output head as a tensor of its own: the bytes of the embedding under a second name.

    before    model.embed_tokens.weight ─► bytes                    tie_word_embeddings: true
    after     model.embed_tokens.weight ─► the same bytes           tie_word_embeddings: false
              lm_head.weight            ─► the same bytes

So whatever reads, solves and writes a head of its own does it for a tied one; nothing is copied until the head is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from marlinctl.checkpoint.reader import Checkpoint
from marlinctl.checkpoint.safetensors_header import TensorInfo
from marlinctl.models.architectures import Architecture


def with_own_head(checkpoint: Checkpoint, known: Architecture) -> Checkpoint:
    """The checkpoint of a model whose head is tied (`known.tied`). A copy of the head that it holds already is taken as it is: it is the
    embedding (folder.py). Files stay those of `checkpoint`, and are closed with it.
    """
    assert known.tied is not None
    name = f"{known.tied.name}.weight"
    head = checkpoint.tensors.get(name) or replace(checkpoint.tensors[f"{known.embedding}.weight"], name=name)
    return replace(checkpoint, config={**checkpoint.config, "tie_word_embeddings": False}, tensors={**checkpoint.tensors, name: head})


def with_embedding(checkpoint: Checkpoint, known: Architecture) -> Checkpoint:
    """The checkpoint of a model whose head is tied and that stores the matrix under the name of the head alone: under the name of the
    embedding, as everybody else has it. Itself where it has one."""
    embedding = f"{known.embedding}.weight"
    head = None if known.tied is None else f"{known.tied.name}.weight"
    if head is None or embedding in checkpoint.tensors or head not in checkpoint.tensors:
        return checkpoint
    tensors = {name: info for name, info in checkpoint.tensors.items() if name != head}
    tensors[embedding] = replace(checkpoint.tensors[head], name=embedding)
    return replace(checkpoint, tensors=tensors, stored=checkpoint.stored or checkpoint.tensors)


def stored_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of tensors in their files; those under two names count once."""
    return sum({(info.file, info.begin, info.cut): info.nbytes for info in tensors.values()}.values())
