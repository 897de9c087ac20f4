"""Every verb with random damage to every kind of file that it reads, and with random arguments; and what must hold all the same.

A room of small files (`furnish`) is copied for each trial. `Trial(seed)` draws a command line that works on it, damages files, changes
arguments, and says what it did, so that a failure is one number. `run` runs it in this process, `judge` names what is wrong:

    an exit code outside of the table, 70 among them         a traceback                a file written where none may be written

A hang is one too: after PATIENCE seconds the trial is interrupted. More of it, and what it finds as a table:

    python -m tests.every_verb 0 2000
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from marlinctl.cli import main
from tests.evaluation.local_copies import parquet_layout
from tests.faults.checkpoints import read_shard, write_shard
from tests.packed import make_packed, make_sparse_packed
from tests.pruned import prune
from tests.tiny import make_tiny

CODES = {0, 1, 2, 3, 4, 5, 6, 7}
PATIENCE = 60  # seconds
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1,
}  # fmt: skip
SMALL = ["--recipe", "mine.yaml", "--group-size", "32", "--samples", "2", "--sequence-length", "32", "--calibration", "text.txt"]
MEASURED = ["--tokens", "128", "--window", "32", "--text", "rows.jsonl"]
TRAINED = ["--tokens", "128", "--sequence-length", "32", "--batch-tokens", "64", "--data", "text.txt"]
# What each verb is asked for where nothing is damaged, and how often: the quick ones more.
COMMANDS: list[tuple[int, list[str]]] = [
    (4, ["inspect", "dense"]), (4, ["inspect", "ct", "--json"]), (3, ["inspect", "marlin"]), (2, ["inspect", "gptq", "--weights"]),
    (3, ["inspect", "sparse", "--weights"]),
    (4, ["plan", "dense", *SMALL]), (3, ["plan", "model.gguf", *SMALL]), (3, ["plan", "pruned", *SMALL, "--format", "marlin_24"]),
    (2, ["plan", "dense", *SMALL, "--module-map", "map.json", *MEASURED]),
    (4, ["verify", "published", "--no-load"]), (3, ["verify", "ct", "--no-load", "--source", "dense"]), (2, ["verify", "marlin"]),
    (2, ["verify", "sparse", "--no-load"]),
    (4, ["pack", "ct", "out", "--format", "gptq"]), (3, ["pack", "gptq", "out", "--format", "marlin"]),
    (3, ["pack", "marlin", "out", "--format", "ct"]), (2, ["pack", "sparse", "out", "--format", "marlin_24", "--also", "ct"]),
    (2, ["pack", "ct", "--check", "--tp", "2"]),
    (4, ["report", "published", "--scores", "scores.json"]), (2, ["report", "published", "--bench", "bench.json"]),
    (3, ["jobs", "ls", "."]), (2, ["jobs", "rm", "begun", "--yes"]),
    (3, ["recipes", "check", "mine.yaml"]), (2, ["recipes", "show", "mine.yaml"]),
    (2, ["bench", "--from", "bench.json", "--json"]),
    (2, ["resume", "begun"]), (1, ["resume", "begun", "--from-block", "0"]),
    (2, ["quantize", "dense", "out", *SMALL]), (1, ["quantize", "dense", "out", *SMALL, "--calibration", "chats.jsonl"]),
    (1, ["quantize", "dense", "out", *SMALL, "--calibration", "rows.parquet", "--module-map", "map.json"]),
    (1, ["quantize", "model.gguf", "out", *SMALL, "--calibration", "rows.jsonl.gz"]), (1, ["quantize", "pruned", "out", *SMALL]),
    (1, ["sparsify", "dense", "out", *SMALL, *MEASURED, "--max-kl", "9"]), (1, ["compress", "dense", "out", *SMALL, *MEASURED]),
    (1, ["distill", "pruned", "out", "--teacher", "dense", *TRAINED]),
    (1, ["distill", "ct", "out", "--teacher", "dense", "--mode", "scales", *TRAINED]),
    (2, ["eval", "ct", "--against", "dense", *MEASURED]), (1, ["eval", "gptq", *MEASURED, "--out", "scores.json", "--resume"]),
    (1, ["eval", "dense", "--tasks", "winogrande", "--task-data", "data", "--limit", "2"]),
    (1, ["doctor", "--quick"]), (1, ["completion", "bash"]), (1, ["explain", "E255"]),
]  # fmt: skip
FLAGS = [
    "--max-kl", "--max-ppl-ratio", "--damping", "--drift-correction", "--samples", "--sequence-length", "--seed", "--tokens", "--window",
    "--limit", "--group-size", "--bits", "--skip", "--override", "--include", "--dtype", "--device", "--threads", "--max-memory",
    "--module-map", "--cache-dir", "--log-file", "--recipe", "--text", "--tasks", "--task-data", "--calibration", "--format", "--also",
    "--revision", "--from-block", "--num-fewshot", "--batch-size", "--scores", "--bench", "--source", "--tp", "--shape", "--arch",
    "--refine", "--ls-iterations", "--learning-rate", "--temperature", "--micro-batch", "--save-every", "--cache-logits",
    "--device-memory", "--out",
]  # fmt: skip
SWITCHES = ["--json", "-q", "-v", "--overwrite", "--keep-job", "--resume", "--strict", "--offline", "--debugg", "--no-eval", "--help"]
VALUES = [
    "", " ", "nan", "inf", "-inf", "-1", "0", "1", "1e999", "1e-300", "9" * 30, "9" * 5000, "-" + "9" * 30, "0x10", "1_000", "٣", "\x1b[2J",
    "ü😀", "\udcff", "a" * 300, "a/" * 3000, "../x", "/", ".", "..", "~nobody/x", "-", "--", "org/name", "file:///etc", "/dev/null",
    "/proc/self/mem", "re:(", "re:(a+)+$", "*", "[",
    "k_proj=group_size:32", "=group_size:" + "9" * 5000, "cuda", "cuda:99", "cpu:7", "meta",
    "4GiB", "9" * 400 + "GiB", "self", "pythondoc", "dense", "ct", "text.txt", "rows.jsonl", "mine.yaml", "data", "absent", "absent/absent",
]  # fmt: skip
SCALARS: list[Any] = [None, True, False, -1, 0, 1, 2**31, 2**70, -(2**70), 1.5, 1e308, float("nan"), float("inf"), "", "x", "\0", [], {}]
SCALARS += ["\x1b[2J", [1], {"a": 1}, "../x", "/etc/passwd", ["x", None], "9" * 5000]


# ---- the room ------------------------------------------------------------------------------------------------------------------------


def furnish(root: Path) -> Path:
    """One of every kind of file that a verb reads, small."""
    from marlinctl.benchmarking.documents import write_document
    from tests.benchmarking.figures import made_up
    from tests.checkpoint.gguf.test_gguf import write_model

    root.mkdir(parents=True)
    make_tiny(root / "dense", shards=2, **SIZES)
    prune(root / "dense", root / "pruned")
    for name, fmt in (("ct", "ct"), ("gptq", "gptq"), ("marlin", "marlin")):
        make_packed(root / "dense", root / name, fmt)
    make_sparse_packed(root / "dense", root / "sparse", "ct")
    write_model(root / "model.gguf", "llama")
    text = " ".join(f"The {i}th of the many words that are read here is plain." for i in range(400))
    (root / "text.txt").write_text(text)
    rows = [{"text": text[i * 200 : (i + 1) * 200]} for i in range(60)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "rows.jsonl.gz").write_bytes(gzip.compress((root / "rows.jsonl").read_bytes()))
    chat = [{"role": "user", "content": "Say something. " * 9}, {"role": "assistant", "content": "Something, then. " * 9}]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(9)))
    _write_parquet(root / "rows.parquet", rows)
    (root / "mine.yaml").write_text("extends: int4\ncalibration: {minimum_tokens: 32}\nevaluate: {tokens: 128, window: 32}\n")
    branch = {"module": "self_attn", "first": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "last": "self_attn.o_proj"}
    mlp = {"module": "mlp", "first": ["mlp.gate_proj", "mlp.up_proj"], "last": "mlp.down_proj"}
    names = {"decoder": "model", "blocks": "model.layers", "embedding": "model.embed_tokens", "norm": "model.norm"}
    (root / "map.json").write_text(json.dumps({"attention": branch, "mlp": mlp, **names}))
    parquet_layout(root / "data")
    write_document(made_up(), root / "bench.json")
    with contextlib.chdir(root), _quiet():
        assert main(["quantize", "dense", "published", *SMALL, "-q"]) == 0
        assert main(["eval", "published", *MEASURED, "--out", "scores.json", "-q"]) == 0
        _interrupted(["quantize", "dense", "begun", *SMALL, "-q", "--keep-job"])
    for log in root.glob("*.log"):
        log.unlink()
    return root


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def _interrupted(arguments: list[str]) -> None:
    """Leaves a job whose only block is solved."""
    from marlinctl.checkpoint.writer import StagedCheckpoint

    finish = StagedCheckpoint.finish

    def stopping(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    StagedCheckpoint.finish = stopping  # type: ignore[method-assign]
    try:
        assert main(arguments) == 130
    finally:
        StagedCheckpoint.finish = finish  # type: ignore[method-assign]


# ---- a trial -------------------------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """seed: all that is random follows from it. `told` says what was done."""

    seed: int
    arguments: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def prepare(self, room: Path) -> None:
        """Draw a command and damage what lies in `room`, a copy that is thrown away."""
        draw = random.Random(self.seed)
        weights = [weight for weight, _ in COMMANDS]
        self.arguments = list(draw.choices([command for _, command in COMMANDS], weights)[0])
        kind = draw.choices(["files", "arguments", "both"], [6, 3, 1])[0]
        if kind != "arguments":
            for _ in range(draw.choices([1, 2], [4, 1])[0]):
                self._damage(draw, room)
        if kind != "files":
            for _ in range(draw.choices([1, 2], [3, 1])[0]):
                self._change_arguments(draw)

    def _damage(self, draw: random.Random, room: Path) -> None:
        """Mostly a file that the command reads."""
        named = [room / word for word in self.arguments[1:] if word and "/" not in word and len(word) < 99 and (room / word).exists()]
        if self.arguments[0] == "resume" or self.arguments[:2] == ["jobs", "rm"]:
            named.append(room / "begun.job")
        place = draw.choice(named) if named and draw.random() < 0.9 else room
        files = sorted(path for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file() and not path.is_symlink())
        if not files:
            return
        path = draw.choice(files)
        damages = [_cut, _flip, _replaced, _replaced, _appended]
        if path.suffix in (".json", ".jsonl"):
            damages += [_json_value] * 8 + [_json_text]
        if path.suffix == ".safetensors":
            damages += [_header] * 4
        if path.suffix in (".yaml", ".txt", ".jinja", ".gguf", ".jsonl"):
            damages += [_lines] * 3
        damage = draw.choice(damages)
        with contextlib.suppress(ValueError, KeyError, IndexError, UnicodeDecodeError):  # damaged before: the second damage finds no JSON
            self.told.append(f"{path.relative_to(room)}: {damage(draw, path, room)}")

    def _change_arguments(self, draw: random.Random) -> None:
        place = draw.randrange(1, len(self.arguments) + 1)
        what = draw.choice(["value", "value", "flag", "switch", "drop", "swap"])
        if what == "value" and place < len(self.arguments):
            self.arguments[place] = draw.choice(VALUES)
        elif what == "switch":
            self.arguments.insert(place, draw.choice(SWITCHES))
        elif what == "drop" and len(self.arguments) > 1:
            del self.arguments[min(place, len(self.arguments) - 1)]
        elif what == "swap" and len(self.arguments) > 2:
            other = draw.randrange(1, len(self.arguments))
            place = min(place, len(self.arguments) - 1)
            self.arguments[place], self.arguments[other] = self.arguments[other], self.arguments[place]
        else:
            self.arguments += [draw.choice(FLAGS), draw.choice(VALUES)]
        self.told.append("arguments changed")

    def __str__(self) -> str:
        words = " ".join(word if len(word) < 60 else f"{word[:20]}...({len(word)})" for word in self.arguments)
        return f"seed {self.seed}: marlinctl {words!r}; {'; '.join(self.told)}"


# ---- damages: each returns what it did -----------------------------------------------------------------------------------------------


def _cut(draw: random.Random, path: Path, _room: Path) -> str:
    data = path.read_bytes()
    keep = draw.choice([0, len(data) // 2, max(0, len(data) - 1), draw.randrange(len(data) + 1)])
    path.write_bytes(data[:keep])
    return f"cut to {keep} bytes"


def _flip(draw: random.Random, path: Path, _room: Path) -> str:
    data = bytearray(path.read_bytes())
    places = [draw.randrange(len(data)) for _ in range(draw.choice([1, 1, 3, 20]))] if data else []
    for place in places:
        data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))
    return f"bits flipped at {places[:3]}"


def _appended(draw: random.Random, path: Path, _room: Path) -> str:
    more = draw.choice([b"\0", b"\n", b"{}", b"\xff\xfe", b"a" * 5000, b"\n" * 5000])
    with path.open("ab") as file:
        file.write(more)
    return f"{more[:8]!r} appended"


def _replaced(draw: random.Random, path: Path, room: Path) -> str:
    """By something that is no such file."""
    path.unlink()
    how = draw.choice(["nothing", "folder", "fifo", "dangling", "loop", "outside", "other", "garbage", "deep", "null", "closed"])
    others = sorted(other for other in room.rglob("*") if other.is_file() and not other.is_symlink())
    if how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "dangling":
        path.symlink_to("absent")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "outside":
        path.symlink_to(room.parent / "outside" / "secret")
    elif how == "other":
        shutil.copy(draw.choice(others), path)
    elif how == "garbage":
        path.write_bytes(draw.randbytes(300))
    elif how == "deep":
        path.write_text("[" * 100_000 + "]" * 100_000)
    elif how == "null":
        path.write_text(draw.choice(["null", "[]", "{}", "3", '"x"', "NaN"]))
    elif how == "closed":
        path.write_text("{}")
        path.chmod(0)
    return how


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON document, the whole included."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:50]):
            yield from _places(item, (*path, index))


def _json_value(draw: random.Random, path: Path, _room: Path) -> str:
    """A value of another kind, a key gone, renamed or added, at any place of the document."""
    lines = path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
    number = draw.randrange(len(lines))
    document = json.loads(lines[number])
    told = _change(draw, document)
    lines[number] = json.dumps(document)
    path.write_text("\n".join(lines) + ("\n" if path.suffix == ".jsonl" else ""))
    return told


def _change(draw: random.Random, document: Any) -> str:
    places = [place for place in _places(document) if place]
    if len(places) > 400:  # a vocabulary outnumbers all that is worth changing
        places = [place for place in places if len(place) < 3] + draw.sample(places, 20)
    place = draw.choice(places)
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    how = draw.choice(["set", "set", "set", "delete", "rename", "add"])
    if how == "delete":
        del holder[place[-1]]
    elif how == "rename" and isinstance(holder, dict):
        holder[draw.choice(["x", "", "\0", "../x", "a" * 300])] = holder.pop(place[-1])
    elif how == "add" and isinstance(holder, dict):
        keys = ["quantization_config", "auto_map", "text_config", "rope_scaling", "schema_version", "layer_types", "sliding_window"]
        holder[draw.choice(keys)] = draw.choice(SCALARS)
    else:
        holder[place[-1]] = draw.choice(SCALARS)
        how = f"set to {str(holder[place[-1]])[:20]!r}"
    return f"{'.'.join(map(str, place))[:80]} {how}"


def _json_text(draw: random.Random, path: Path, _room: Path) -> str:
    """A key twice, a number of thousands of digits, NaN, half of a surrogate pair."""
    text = path.read_text("utf-8")
    place = draw.randrange(max(1, len(text)))
    more = draw.choice(['"a": 1, "a": 2,', "9" * 5000, "NaN", '"\\ud83d"', "\ufeff", ",,", "}", "\x00"])
    path.write_text(text[:place] + more + text[place:], "utf-8")
    return f"{more[:9]!r} put in at {place}"


def _header(draw: random.Random, path: Path, _room: Path) -> str:
    header, data = read_shard(path)
    told = _change(draw, header)
    write_shard(path, header, data)
    return f"header: {told}"


def _lines(draw: random.Random, path: Path, _room: Path) -> str:
    data = path.read_bytes().split(b"\n")
    place = draw.randrange(len(data))
    junk = [b"", b"\xff\xfe", b"a: *b", b"!!python/object:os.system {}", b"\t- x: [", b"x" * 70000]
    junk += [b"{{ raise_exception('no') }}", b"{% for x in 3 %}"]
    data[place] = draw.choice([*junk, b"quantize: {damping: .nan}", b"calibration: {samples: 99999999999999999999}", b"extends: mine.yaml"])
    path.write_bytes(b"\n".join(data))
    return f"line {place} is {data[place][:30]!r}"


# ---- running and judging -------------------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    pass


def furnished_copy(room: Path, base: Path) -> Path:
    """A copy of the room, and beside it what must not be touched."""
    shutil.copytree(room, base / "room", symlinks=True)
    (base / "outside").mkdir()
    (base / "outside" / "secret").write_text("nobody may write here")
    return base / "room"


def run(trial: Trial, room: Path, base: Path) -> list[str]:
    """What is wrong, nothing where all is right. base: an empty folder for the copy of the room."""
    copy = furnished_copy(room, base)
    trial.prepare(copy)
    before = _contents(base)
    out, err = io.StringIO(), io.StringIO()
    environment = dict(os.environ)
    os.environ["MARLINCTL_CACHE"] = str(base / "cache")
    code: object = "nothing"

    try:
        with _patience(), contextlib.chdir(copy), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(trial.arguments)
    except BaseException as error:  # noqa: BLE001  nothing may get past main
        code = f"{type(error).__name__} out of main"
        traceback.print_exc(file=err)
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return [*_judge_end(code, out.getvalue(), err.getvalue(), base), *_judge_files(trial, before, _contents(base))]


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """TooLong after PATIENCE seconds. pytest-timeout has the same timer, and gets it back."""

    def too_long(_number: int, _frame: object) -> None:
        raise TooLong

    handler = signal.signal(signal.SIGALRM, too_long)
    started = time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(0.1, left - (time.monotonic() - started)) if left else 0)
        signal.signal(signal.SIGALRM, handler)


def _judge_end(code: object, out: str, err: str, base: Path) -> list[str]:
    told = err[-1500:] + out[-1500:]
    if code not in CODES:
        log = max((base / "cache" / "logs").glob("*.log"), default=None) if (base / "cache" / "logs").is_dir() else None
        last = log.read_text(errors="replace")[-3000:] if log is not None else ""
        return [f"exit code {code}: {told}\n{last}"]
    return [f"a traceback: {told}"] if "Traceback (most recent call last)" in err + out else []


def _judge_files(trial: Trial, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Files that appeared, changed or went, and may not."""
    verb = trial.arguments[0] if trial.arguments else ""
    may = [r"cache(/|$)", r"room/[^/]*\.log$"]
    if verb in ("pack", "quantize", "sparsify", "compress", "distill", "resume", "jobs", "eval", "bench"):
        # Any folder may be OUT once arguments are drawn, but what it held stays: only names that were not there are let through.
        may += [r"new:room/.*"]
    if verb in ("resume", "jobs"):
        may += [r"room/begun(\.job)?(/|$)"]
    if verb == "eval":
        may += [r"room/scores\.json$"]
    if verb == "report":
        may += [r"room/[^/]+/(README\.md|marlinctl_report\.(json|md|html))$"]
    if "--log-file" in trial.arguments:
        may += [r"room/[^/]+$"]
    if "--overwrite" in trial.arguments:
        may += [r"room/.*"]
    wrong = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) == after.get(name):
            continue
        label = name if name in before else f"new:{name}"
        if not any(re.match(pattern, text) for pattern in may for text in (name, label)):
            wrong.append(f"{'changed' if name in before and name in after else 'removed' if name in before else 'new'}: {name}")
    return wrong


def _contents(base: Path) -> dict[str, str]:
    found = {}
    for path in sorted(base.rglob("*")):
        name = str(path.relative_to(base))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"  # noqa: PTH115  of a loop too
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if os.access(path, os.R_OK) else "closed"
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---- more of it ----------------------------------------------------------------------------------------------------------------------


def _main(first: int, last: int) -> int:
    """Trials first to last, each in a fork; prints what is wrong, grouped by where it went wrong."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="every-verb-") as folder:
        room = furnish(Path(folder) / "furnished")
        for seed in range(first, last):
            base = Path(folder) / f"trial-{seed}"
            base.mkdir()
            for problem in _forked(partial(_told, seed, room, base)):
                print(problem, flush=True)
                place = (re.findall(r"where: (.*?)[;\n]", problem) or [problem.splitlines()[-1]])[-1]
                found.setdefault(place, []).append(str(seed))
            shutil.rmtree(base, ignore_errors=True)
    print(f"\n{last - first} trials, {sum(map(len, found.values()))} failures in {len(found)} places")
    for place, seeds in sorted(found.items(), key=lambda item: -len(item[1])):
        print(f"{len(seeds):5}  {place}   seeds {', '.join(seeds[:6])}")
    return 1 if found else 0


def _told(seed: int, room: Path, base: Path) -> list[str]:
    trial = Trial(seed)
    return [f"{trial}\n    {problem}" for problem in run(trial, room, base)]


def _forked(work: Callable[[], list[str]]) -> list[str]:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        try:
            answer = json.dumps(work())
        except BaseException:  # noqa: BLE001  a fork must never continue with what its parent was doing
            answer = json.dumps([traceback.format_exc()])
        with os.fdopen(theirs, "w") as stream:
            stream.write(answer)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    return list(json.loads(text)) if text else [f"the process died: status {status}"]


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), int(sys.argv[2])))
