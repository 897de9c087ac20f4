"""Draws the layouts of marlinctl/pack/tile.py into docs/formats, between HTML markers.

    python scripts/draw_formats.py            # rewrite the drawings
    python scripts/draw_formats.py --check    # exit 1 and name the pages whose drawings are not what tile.py says

A page asks for a drawing with `<!-- drawn by scripts/draw_formats.py: NAME -->`; everything up to `<!-- end of drawing -->`
is replaced. The drawings are computed from the maps alone: there is no second table here that could drift.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from marlinctl.pack import tile

PAGES = Path(__file__).resolve().parent.parent / "docs" / "formats"
MARKED = re.compile(r"(<!-- drawn by scripts/draw_formats\.py: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end of drawing -->)", re.DOTALL)


def marlin_tile() -> str:
    """Which lane and nibble hold each weight of the 16 x 16 block that word 0 of every lane covers."""
    lines = ["lane.nibble of weight (k, n) in the words of j = 0; columns 16j + n lie in word j of the same lane at the same nibble", ""]
    lines.append("  k\\n" + "".join(f"{n:>6}" for n in range(16)))
    for k in range(tile.TILE_K):
        places = [tile.marlin_place(k, n) for n in range(16)]
        lines.append(f"{k:>5}" + "".join(f"{f'{p.column // 4}.{p.nibble}':>6}" for p in places))
    return "\n".join(lines)


def marlin_word() -> str:
    """What the eight nibbles of a word are, seen from its lane."""
    nibbles = range(tile.NIBBLES - 1, -1, -1)
    weights = [tile.marlin_weight(0, 0, nibble) for nibble in nibbles]
    return "\n".join(
        [
            "word j of lane t:  qweight[row, 128 block + 4t + j],   k0 = 16 row + 2 (t % 4),   n0 = 64 block + 16 j + t // 4",
            "",
            "bits    " + "".join(f"{f'{4 * i + 3}..{4 * i}':>8}" for i in nibbles),
            "nibble  " + "".join(f"{i:>8}" for i in nibbles),
            "k - k0  " + "".join(f"{k:>8}" for k, _ in weights),
            "n - n0  " + "".join(f"{n:>8}" for _, n in weights),
        ]
    )


def marlin_scales() -> str:
    """The columns in stored order."""
    grouped, channel = ([slot(n) for n in range(64)] for slot in (tile.grouped_slot, tile.channel_slot))  # both are their own inverse
    return "\n".join(
        [
            "slot         " + "".join(f"{i:>4}" for i in range(16)) + "  ..",
            "grouped      " + "".join(f"{n:>4}" for n in grouped[:16]) + "  ..   repeats every 64 columns",
            "channel-wise " + "".join(f"{n:>4}" for n in channel[:16]) + "  ..   repeats every 32 columns",
        ]
    )


def marlin_example() -> str:
    """The first words of nibble(k, n) = (k + n) mod 16."""
    words = [0] * 128
    for k in range(tile.TILE_K):
        for n in range(tile.TILE_N):
            place = tile.marlin_place(k, n)
            words[place.column] |= (k + n) % 16 << 4 * place.nibble
    shown = [0, 1, 2, 3, 4, 8, 12, 16, 127]
    weights = [(0, 0), (1, 0), (8, 0), (0, 8), (2, 0), (0, 1), (0, 16), (0, 64), (16, 0), (15, 63)]
    lines = [f"B[0, {column:>3}] = 0x{words[column]:08X}   lane {column // 4:>2}, word {column % 4}" for column in shown]
    lines.append("")
    for k, n in weights:
        place = tile.marlin_place(k, n)
        lines.append(f"k = {k:>2}, n = {n:>2}  ->  B[{place.row}, {place.column:>3}] nibble {place.nibble}")
    return "\n".join(lines)


def sparse_quads() -> str:
    """The six nibbles of metadata."""
    columns = [(first, second) for second in range(4) for first in range(second)]
    pictures = ["".join("x" if i in pair else "." for i in range(4)) for pair in columns]
    return "\n".join(
        [
            "columns k % 4 = 0123   " + "".join(f"{picture:>7}" for picture in pictures) + "     x is kept",
            "first, second          " + "".join(f"{f'{first}, {second}':>7}" for first, second in columns),
            "nibble                 " + "".join(f"{f'0x{tile.meta_nibble(*pair):X}':>7}" for pair in columns),
        ]
    )


def sparse_tile() -> str:
    """Which lane and nibble hold each kept weight of the 16 x 16 block that word 0 of every lane covers."""
    outputs = range(0, tile.TILE_N, 4)
    lines = ["lane.nibble of kept weight (c, n) in the words of j = 0; outputs n + j lie in word j of the same lane at the same nibble", ""]
    lines.append("  c\\n" + "".join(f"{n:>6}" for n in outputs))
    for c in range(tile.TILE_K):
        places = [tile.sparse_place(c, n) for n in outputs]
        lines.append(f"{c:>5}" + "".join(f"{f'{p.column // 4}.{p.nibble}':>6}" for p in places))
    return "\n".join(lines)


def sparse_word() -> str:
    """What the eight nibbles of a word are, seen from its lane."""
    nibbles = range(tile.NIBBLES - 1, -1, -1)
    kept = [tile.sparse_survivor(0, 0, nibble) for nibble in nibbles]
    return "\n".join(
        [
            "word j of lane t:  qweight[row, 128 block + 4t + j],   c0 = 16 row + 2 (t % 4),   n0 = 64 block + 8 (t // 4) + j",
            "",
            "bits    " + "".join(f"{f'{4 * i + 3}..{4 * i}':>8}" for i in nibbles),
            "nibble  " + "".join(f"{i:>8}" for i in nibbles),
            "c - c0  " + "".join(f"{c:>8}" for c, _ in kept),
            "n - n0  " + "".join(f"{n:>8}" for _, n in kept),
        ]
    )


def sparse_meta() -> str:
    """Where the two metadata words of each output lie among the 128 of a block, and who reads them."""
    lines = ["column of meta[row, 128 block + ..] for output n; further octets of outputs lie 8 columns on", ""]
    lines.append("n % 64               " + "".join(f"{n:>5}" for n in (*range(8), 8, 9, 63)))
    for half in range(2):
        columns = [tile.meta_place(4 * half, n).column for n in (*range(8), 8, 9, 63)]
        lines.append(f"k % 32 = {16 * half:>2}..{16 * half + 15}      " + "".join(f"{column:>5}" for column in columns))
    lines.append("")
    lines.append("ldmatrix.x2 gives lane t columns 2t, 2t + 1 (register 0) and 64 + 2t, 64 + 2t + 1 (register 1):")
    lines.append("")
    lines.append("lane                 " + "".join(f"{lane:>16}" for lane in (0, 1, 2, 3, 4)))
    for register in range(2):
        for half_word, name in enumerate(("low ", "high")):
            cells = [tile.meta_quad(0, 64 * register + 2 * lane + half_word, 0) for lane in (0, 1, 2, 3, 4)]
            shown = [f"n={n} k={4 * quad}..{4 * quad + 15}" for quad, n in cells]
            lines.append(f"register {register}, {name}      " + "".join(f"{cell:>16}" for cell in shown))
    return "\n".join(lines)


def sparse_scales() -> str:
    """The columns in stored order."""
    grouped = [tile.sparse_grouped_column(slot) for slot in range(16)]
    return "\n".join(
        [
            "slot         " + "".join(f"{i:>4}" for i in range(16)) + "  ..",
            "grouped      " + "".join(f"{n:>4}" for n in grouped) + "  ..   repeats every 8 columns",
            "channel-wise " + "".join(f"{n:>4}" for n in range(16)) + "  ..   plain order",
        ]
    )


# kept columns of the first four groups of four in row 0, and their codes
EXAMPLE = (((1, 3), (5, -2)), ((0, 1), (1, 2)), ((2, 3), (-8, 7)), ((0, 2), (3, -3)))


def sparse_example() -> str:
    """The words of row 0 of EXAMPLE; every other code is 0."""
    words, meta = [0x88888888] * 128, 0
    for quad, (columns, codes) in enumerate(EXAMPLE):
        meta |= tile.meta_nibble(*columns) << 4 * tile.meta_place(quad, 0).nibble
        for odd, code in enumerate(codes):
            place = tile.sparse_place(2 * quad + odd, 0)
            words[place.column] ^= (8 ^ code + 8) << 4 * place.nibble
    lines = [f"B_24[0, {i:>2}] = 0x{words[i]:08X}   lane {i // 4}, word {i % 4}" for i in range(128) if words[i] != 0x88888888]
    lines.append(f"B_meta[0, {tile.meta_place(0, 0).column}] = 0x{meta:04X}")
    lines.append("")
    for k, n in ((16, 0), (0, 1), (0, 2), (0, 4), (0, 8), (16, 63)):
        lines.append(f"k = {k:>2} .. {k + 15}, n = {n:>2}  ->  B_meta[0, {tile.meta_place(k // 4, n).column:>3}]")
    return "\n".join(lines)


def along_k(word: str, place: Callable[[int, int], tile.Place[int]], weight: Callable[[int, int, int], tuple[int, int]]) -> str:
    """The nibbles of word [0, 0] of a matrix that is packed along K, and the words of nibbles 0, 1, .. 15."""
    nibbles = range(tile.NIBBLES - 1, -1, -1)
    words = {0: 0, 1: 0}  # by row + column, one of which stays 0 for n = 0
    for k in range(16):
        row, column, nibble = place(k, 0)
        words[row + column] |= k << 4 * nibble
    return "\n".join(
        [
            word,
            "",
            "bits    " + "".join(f"{f'{4 * i + 3}..{4 * i}':>8}" for i in nibbles),
            "k - 8r  " + "".join(f"{weight(0, 0, i)[0]:>8}" for i in nibbles),
            "",
            "codes -8, -7, .. 7 (nibbles 0, 1, .. 15) along K:  " + "  ".join(f"0x{value:08X}" for value in words.values()),
        ]
    )


def gptq_zeros() -> str:
    """The nibbles of a word of qzeros, which is packed along N."""
    nibbles = range(tile.NIBBLES - 1, -1, -1)
    return "\n".join(
        [
            "word [group, c] of qzeros",
            "",
            "bits    " + "".join(f"{f'{4 * i + 3}..{4 * i}':>8}" for i in nibbles),
            "n - 8c  " + "".join(f"{tile.gptq_zero(0, 0, i)[1]:>8}" for i in nibbles),
        ]
    )


DRAWINGS: dict[str, Callable[[], str]] = {
    "marlin-tile": marlin_tile,
    "marlin-word": marlin_word,
    "marlin-scales": marlin_scales,
    "marlin-example": marlin_example,
    "sparse-quads": sparse_quads,
    "sparse-tile": sparse_tile,
    "sparse-word": sparse_word,
    "sparse-meta": sparse_meta,
    "sparse-scales": sparse_scales,
    "sparse-example": sparse_example,
    "ct-word": lambda: along_k("word [n, r] of weight_packed", tile.ct_place, tile.ct_weight),
    "gptq-word": lambda: along_k("word [r, n] of qweight", tile.gptq_place, tile.gptq_weight),
    "gptq-zeros": gptq_zeros,
}


def redrawn(page: str) -> str:
    """The text of a page with its drawings made anew."""
    return MARKED.sub(lambda m: f"{m[1]}```text\n{DRAWINGS[m['name']]()}\n```\n{m[4]}", page)


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        sys.exit(f"usage: draw_formats.py [--check], not {' '.join(arguments)}")
    drifted = []
    for path in sorted(PAGES.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        fresh = redrawn(page)
        if fresh == page:
            continue
        drifted.append(path.name)
        if not arguments:
            path.write_text(fresh, encoding="utf-8")
    if not arguments:
        print(f"redrawn: {', '.join(drifted) or 'nothing, all drawings were current'}")
        return 0
    if drifted:
        print(f"not what marlinctl/pack/tile.py says: {', '.join(drifted)}; run python scripts/draw_formats.py", file=sys.stderr)
    return 1 if drifted else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
