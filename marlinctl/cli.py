"""The command line: the table of verbs, and how every way of stopping becomes three lines and an exit code.

    error: what is wrong
      where: which file, tensor, byte, option or line
      fix: what would be right
      docs: marlinctl explain E312

     0  done                            5  disk or memory ran out      129  SIGHUP: the terminal went away
     1  a check said no                 6  NaN, or no factorisation    130  Ctrl-C
     2  wrong usage or recipe           7  hub or network              141  the reader of stdout went away
     3  bad input                      70  a defect of marlinctl       143  SIGTERM
     4  this machine lacks something

With --json the same fields are one JSON document on stdout. A traceback appears with --debug only; the log always has it.
A verb's module is imported when the verb is used, so that help answers without torch (tests/test_startup.py).
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from marlinctl import __version__
from marlinctl.commands.common import COMPLETION_VARIABLE, add_common_options
from marlinctl.commands.help import continue_examples
from marlinctl.errors import BadInput, EnvironmentProblem, MarlinctlError, Problem, ResourceProblem, UsageError
from marlinctl.system.console import Console
from marlinctl.system.log import libraries_in_log, printable, visible_streams

VERBS = {
    "compress": "Quantize, pack, verify and evaluate a model in one go.",
    "quantize": "Quantize a model to 4 bits with GPTQ.",
    "sparsify": "Prune a model to 2:4, at 16 bits or together with int4.",
    "distill": "Train a 2:4 or 4-bit model toward its original.",
    "pack": "Convert a 4-bit checkpoint to another format, losslessly.",
    "eval": "Score a model on tasks; compare it with its original.",
    "bench": "Check and time the INT4 kernels; compile them ahead of time.",
    "resume": "Continue a run that was stopped or killed.",
    "jobs": "List or remove unfinished runs.",
    "plan": "Show what compress would do, what it needs, and whether it fits.",
    "inspect": "Describe a checkpoint from its headers.",
    "report": "Rewrite the report and model card of a published folder.",
    "verify": "Check a checkpoint's digests, structure and numbers.",
    "doctor": "Check this machine.",
    "recipes": "List, show and check recipes.",
    "explain": "Explain an error: its cause, and how to fix it.",
    "completion": "Print the completion script of a shell.",
}
SHOWN = 3  # problems of one kind; --json has all


class _Terminated(BaseException):
    """SIGTERM or SIGHUP, raised where the program stands so that every `with` and `finally` cleans up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


class _Verbs(click.Group):
    """Knows the names of the verbs without importing their modules."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"marlinctl.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS and not args[0].startswith("-"):
            raise UsageError(
                "E202", f"there is no verb '{args[0]}'", where=f"marlinctl {args[0]}", fix=_nearest(args[0], VERBS, "marlinctl --help")
            )
        return super().resolve_command(ctx, args)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        before = len(formatter.buffer)
        super().format_help_text(ctx, formatter)
        continue_examples(formatter, before)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}, no_args_is_help=False)
@click.version_option(__version__, prog_name="marlinctl", message="%(prog)s %(version)s")
@add_common_options
def marlinctl(**_common: Any) -> None:
    """Compress language models to 4-bit checkpoints that real runtimes load.

    \b
    Example:
      marlinctl compress Qwen/Qwen3-0.6B out/qwen3-int4 --also marlin
      marlinctl eval out/qwen3-int4 --tasks mmlu,arc,winogrande --against Qwen/Qwen3-0.6B
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code. Nothing but SystemExit of the interpreter itself gets past it."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    if instruction := os.environ.get(COMPLETION_VARIABLE):
        from click.shell_completion import shell_complete

        return shell_complete(marlinctl, {}, "marlinctl", COMPLETION_VARIABLE, instruction)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the locale cannot spell must not stop the program
    consoles: list[Console] = []  # the running verb puts its console here
    try:
        with _signals_raise(), visible_streams(), libraries_in_log():
            code = _run(args, consoles)
            _flush()
    except BaseException as error:  # noqa: BLE001  the edge: every exception becomes an exit code here
        with _deaf_to_ctrl_c():  # whoever is in a hurry presses it twice, and would get a traceback of this very report
            code = _report(error, args, consoles)
    finally:
        for console in consoles:
            console.close()
    _silence_broken_streams()
    return code


def _run(args: list[str], consoles: list[Console]) -> int:
    if not args:
        args = ["--help"]
    try:
        with marlinctl.make_context("marlinctl", list(args), obj=consoles) as context:  # click empties the list
            marlinctl.invoke(context)
    except click.exceptions.Exit as finished:  # --help and --version
        return finished.exit_code
    except click.exceptions.NoArgsIsHelpError as asked:  # a verb with verbs of its own, alone
        click.echo(asked.format_message())
    except click.Abort as abort:  # Ctrl-C or end of input at a question
        raise KeyboardInterrupt from abort
    except click.ClickException as error:
        raise _usage_error(error, args) from error
    return 0


def _report(error: BaseException, args: list[str], consoles: list[Console]) -> int:
    """The exit code of an error, after reporting it, with --json as JSON."""
    options = args[: args.index("--")] if "--" in args else args
    console = consoles[-1] if consoles else Console(json="--json" in options, colour="--no-color" not in options)
    if console not in consoles:
        consoles.append(console)
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    try:
        if isinstance(error, (KeyboardInterrupt, _Terminated)):
            cause, number = ("Ctrl-C", signal.SIGINT) if isinstance(error, KeyboardInterrupt) else (error.signal.name, error.signal)
            console.error(f"by {cause}; nothing unfinished was published", label="interrupted:")
            return 128 + number
        console.traceback(error, show="--debug" in options)
        problem = _as_marlinctl_error(error)
        if problem is None:
            problem = _internal_error(error, console)
        _show(problem, problem.exit_code, console)
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except (OSError, ResourceProblem):
        return ResourceProblem.exit_code  # not even the report fits: stdout or the log lies on the full disk
    return problem.exit_code


def _show(error: MarlinctlError, code: int, console: Console) -> None:
    docs = f"marlinctl explain {error.error_id}"
    if console.json:
        problems = [{"what": problem.what, "where": problem.where, "fix": problem.fix} for problem in error.problems]
        console.write_json({"error": {"id": error.error_id, "exit_code": code, "problems": problems, "docs": docs}})
        return
    kinds: dict[str, list[Problem]] = {}
    for problem in error.problems:
        kinds.setdefault(_kind(problem), []).append(problem)
    for problems_of_kind in kinds.values():
        for problem in problems_of_kind[:SHOWN]:
            console.error(printable(problem.what, one_line=True))
            console.error(printable(problem.where, one_line=True), label="  where:")
            console.error(printable(problem.fix, one_line=True), label="  fix:")
        if len(problems_of_kind) > SHOWN:
            console.error(f"and {len(problems_of_kind) - SHOWN} more of the kind (--json lists them)", label="  ...")
    console.error(docs, label="  docs:")


def _kind(problem: Problem) -> str:
    """The sentence without the names and numbers in it."""
    return re.sub(r"""\[[^]]*\]|'[^']*'|\S*[\d._/\\]\S*""", "", problem.what)


# What others raise, in our words

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FAILED = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.EBADF)  # the last: stdout is open for reading alone
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_SUCH_NAME = (errno.ENAMETOOLONG, errno.ELOOP)


def _as_marlinctl_error(error: BaseException) -> MarlinctlError | None:
    if isinstance(error, MarlinctlError):
        return error
    if _is_out_of_memory(error):
        return ResourceProblem(
            "E590",
            f"memory ran out: {str(error) or type(error).__name__}",
            where=_notes(error) or "this run",
            fix="close other programs, lower --max-memory, or use fewer or shorter calibration samples",
        )
    if type(error).__name__ == "PanicException":  # of a library in Rust; it derives from BaseException and from nothing else
        what, fix = f"a file of the model or a text makes a library give up: {error}", "take the tokenizer's files from the original model"
        return BadInput("E325", what, where=_notes(error) or "the tokenizer, most often", fix=fix)
    if isinstance(error, ImportError) and (error.name or "marlinctl").partition(".")[0] != "marlinctl":
        return EnvironmentProblem(
            "E402",
            f"a package that marlinctl needs is missing or too old: {error}",
            where=f"{_place(error)}; Python is {sys.executable}",
            fix="marlinctl doctor --quick names every such package and the pip command for it",
        )
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        where = str(error.filename) if error.filename else "the output of this run"
        return ResourceProblem("E500", f"writing failed: {error.strerror}", where=where, fix="free some space, or write to another disk")
    if isinstance(error, OSError) and error.errno in _DISK_FAILED:
        where = str(error.filename) if error.filename else "a file or stdout"
        return ResourceProblem(
            "E500", f"reading or writing failed: {error.strerror}", where=where, fix="check the disk, or use another one"
        )
    if isinstance(error, OSError) and error.errno in _NO_SUCH_NAME:
        where = str(error.filename) if error.filename else "a path of the command line"
        return UsageError("E240", f"the path cannot be used: {error.strerror}", where=where, fix="give another path")
    if isinstance(error, FileNotFoundError) and not _is_somewhere():
        fix = "change into a folder that exists, then run it again"
        return EnvironmentProblem("E490", "the current folder was deleted", where="this run", fix=fix)
    if isinstance(error, OSError) and error.errno in _NOT_ALLOWED:
        where = str(error.filename) if error.filename else "this run"
        return EnvironmentProblem(
            "E490", f"the system refused: {error.strerror}", where=where, fix="check the owner and the permissions of that path"
        )
    return None


def _is_somewhere() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has its own class for CUDA and a bare RuntimeError for the CPU; torch is not imported to find out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _internal_error(error: BaseException, console: Console) -> MarlinctlError:
    place = _place(error)
    notes = _notes(error)
    log = _crash_log(console)
    return MarlinctlError(
        "E900",
        f"{type(error).__name__}: {error}",
        where=f"{place}{'; ' + notes if notes else ''}; {log}",
        fix="this is a defect of marlinctl: run again with --debug and report it with the log",
    )


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}" if frame else "unknown"


def _notes(error: BaseException) -> str:
    return "; ".join(getattr(error, "__notes__", ()))


def _crash_log(console: Console) -> str:
    """Where the log is; a run without a log file gets one now, in the cache."""
    if console.log_path is None:
        try:
            from marlinctl.checkpoint.source import cache_root

            folder = cache_root(None) / "logs"
            folder.mkdir(parents=True, exist_ok=True)
            console.log_to(folder / f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log")
        except Exception as failure:  # noqa: BLE001  whatever is broken, the crash itself must still be reported
            return f"no log could be written ({failure})"
    return f"log: {console.log_path}"


def _usage_error(error: click.ClickException, args: list[str]) -> MarlinctlError:
    context: click.Context | None = getattr(error, "ctx", None)  # None when click's parser itself stops
    command = context.command_path if context is not None else " ".join(["marlinctl", *[arg for arg in args if arg in VERBS][:1]])
    help_line = f"{command} --help"
    if isinstance(error, click.NoSuchOption):
        parameters = context.command.get_params(context) if context is not None else []
        known = [name for parameter in parameters if not getattr(parameter, "hidden", False) for name in parameter.opts]
        all_of_them = f"{command} --help-all" if "--help-all" in known else help_line
        return UsageError(
            "E202", f"there is no option {error.option_name}", where=command, fix=_nearest(error.option_name, known, all_of_them)
        )
    if isinstance(error, click.exceptions.NoSuchCommand):
        known = context.command.list_commands(context) if context is not None and isinstance(context.command, click.Group) else []
        return UsageError(
            "E202", f"there is no verb '{error.command_name}'", where=command, fix=_nearest(error.command_name, known, help_line)
        )
    return UsageError("E202", error.format_message().rstrip("."), where=command, fix=f"see {help_line}")


def _nearest(name: str, known: Sequence[str] | dict[str, str], help_line: str) -> str:
    from difflib import get_close_matches

    bare = {option.lstrip("-"): option for option in known}  # dashes alone would make short options alike
    near = [bare[word] for word in get_close_matches(name.lstrip("-"), list(bare), n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(near)}? {help_line} lists all" if near else f"see {help_line}"


# Signals and streams


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP as exceptions; one that the process was started to ignore (nohup) stays ignored."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise _Terminated(number)

    before: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # not the main thread: the embedding program owns the signals
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _open_closed_streams() -> None:
    """Standard streams that were closed (`>&-`) lead to nowhere instead.

    The system gives the next file that is opened the lowest free number. Without this a shard could be number 2, and whatever writes
    to stderr would write into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # what Python makes of a closed one
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  for as long as the process lives


def _flush() -> None:
    """While an error can still be reported: at interpreter exit it could not."""
    sys.stdout.flush()


def _silence_broken_streams() -> None:
    """A stream whose reader is gone, or whose disk is full, would complain once more when the interpreter exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError):
                continue
