"""
The ``shiftkern`` command.

Exit codes: 0 done, 1 a file could not be read or written, 2 wrong usage or a missing optional package,
130 interrupted.

To add a command, write ``_add_<name>(commands)``: it adds a parser, its arguments, and ``set_defaults(run=...)`` with
a function from the parsed arguments to an exit code. Import what the command needs inside that function.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["main"]

_DEMO_PACKAGES = {"sklearn", "matplotlib", "rich"}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; default ``sys.argv[1:]``.

    Returns
    -------
    int
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # `shiftkern demo --seed 1` means `shiftkern demo adapt --seed 1`; `shiftkern demo --help` lists all demos.
    if arguments[:1] == ["demo"] and not (arguments[1:] and _names_or_helps(arguments[1])):
        arguments.insert(1, "adapt")
    try:
        args = _parser().parse_args(arguments)
        code: int = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("shiftkern: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `shiftkern methods | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(str(error), 1)
    return code


def _names_or_helps(argument: str) -> bool:
    return not argument.startswith("-") or argument in ("-h", "--help")


def _fail(message: str, code: int) -> int:
    print(f"shiftkern: error: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shiftkern", description="Fused CPU kernels for adapting models: demos, methods and build information."
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_merge(commands)
    _add_methods(commands)
    _add_bench(commands)
    _add_info(commands)
    return parser


class _Version(argparse.Action):
    """Reads the version only when asked for it."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import shiftkern

        print(f"shiftkern {shiftkern.__version__}")
        parser.exit()


def _add_demo(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="watch the library at work on real data",
        description="Watch the library at work on real data. Without a name: adapt.",
    )
    demos = parser.add_subparsers(title="demos", metavar="DEMO", required=True)
    _add_demo_adapt(demos)
    _add_demo_transport(demos)
    _add_demo_merge(demos)
    _add_demo_finetune(demos)


def _add_demo_adapt(demos: Commands) -> None:
    parser = demos.add_parser(
        "adapt",
        help="a digit classifier on corrupted and class-ordered streams, with every adaptation method",
        description="Train a small network on handwritten digits, run every adaptation method on shifted streams, "
        "print error rates and times, and write a picture. Takes less than a minute; --quick a few seconds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="decides data split, network and noise")
    parser.add_argument("--severity", type=int, default=3, choices=range(1, 6), help="strength of the corruptions")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per step of a stream")
    parser.add_argument("--methods", default="all", metavar="NAME,...", help="which methods to run, by name")
    parser.add_argument(
        "--out", type=Path, default=Path("shiftkern-demo"), metavar="DIR", help="where to write picture and results"
    )
    parser.add_argument("--quick", action="store_true", help="less training, fewer images")
    parser.set_defaults(run=_demo_adapt, parser=parser)


def _demo_adapt(args: argparse.Namespace) -> int:
    try:
        from shiftkern.demo.adapt import Options
        from shiftkern.demo.show import main as show
    except ModuleNotFoundError as error:
        return _missing(error)
    names = () if args.methods == "all" else [name.strip() for name in args.methods.split(",")]
    try:
        options = Options(args.seed, args.severity, args.batch_size, names, args.quick)
    except ValueError as error:
        args.parser.error(str(error))
    return show(options, args.out)


def _add_demo_transport(demos: Commands) -> None:
    parser = demos.add_parser(
        "transport",
        help="colours moved between two photographs, and training digits moved to shifted ones",
        description="Move the colours of two photographs onto each other, and training digits onto shifted ones, by "
        "entropic optimal transport; print costs, distances, accuracies and times, and write two pictures. Takes less "
        "than a minute; --quick a few seconds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="decides pixels, data split and noise")
    parser.add_argument(
        "--out", type=Path, default=Path("shiftkern-demo"), metavar="DIR", help="where to write pictures and results"
    )
    parser.add_argument("--quick", action="store_true", help="fewer pixels, fewer digits")
    parser.set_defaults(run=_demo, demo="transport", parser=parser)


def _add_demo_merge(demos: Commands) -> None:
    parser = demos.add_parser(
        "merge",
        help="three experts merged into one network by every method, and two strangers aligned",
        description="Fine-tune a small network on three kinds of shifted digits, merge the three by every method, and "
        "align two networks that were trained independently; print accuracies, loss barriers and times, and write a "
        "picture. Takes less than a minute; --quick a few seconds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="decides data split, networks and noise")
    parser.add_argument(
        "--out", type=Path, default=Path("shiftkern-demo"), metavar="DIR", help="where to write picture and results"
    )
    parser.add_argument("--quick", action="store_true", help="less training, fewer images")
    parser.set_defaults(run=_demo, demo="merge", parser=parser)


def _add_demo_finetune(demos: Commands) -> None:
    parser = demos.add_parser(
        "finetune",
        help="a digit classifier fine-tuned to turned digits by every kind of adapter",
        description="Train a small network on upright digits and adapt it to turned ones by many methods with about as "
        "many trained numbers each; print accuracies on both, times and how orthogonal rotations stay, and write a "
        "picture. Takes less than a minute; --quick some seconds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="decides data split and networks")
    parser.add_argument(
        "--out", type=Path, default=Path("shiftkern-demo"), metavar="DIR", help="where to write picture and results"
    )
    parser.add_argument("--quick", action="store_true", help="less training, fewer images")
    parser.set_defaults(run=_demo, demo="finetune", parser=parser)


def _demo(args: argparse.Namespace) -> int:
    """Run the demo whose options are a seed and whether to be quick."""
    try:
        options_of = importlib.import_module(f"shiftkern.demo.{args.demo}").Options
        show = importlib.import_module(f"shiftkern.demo.{args.demo}_show").main
    except ModuleNotFoundError as error:
        return _missing(error)
    try:
        options = options_of(args.seed, args.quick)
    except ValueError as error:
        args.parser.error(str(error))
    code: int = show(options, args.out)
    return code


def _missing(error: ModuleNotFoundError, command: str = "demo") -> int:
    """Name the optional package that a command lacks; anything else that is missing is a fault of ours."""
    package = (error.name or "").partition(".")[0]
    if package not in _DEMO_PACKAGES:
        raise error
    return _fail(f"the {command} needs {package}: pip install 'shiftkern[demo]'", 2)


def _add_merge(commands: Commands) -> None:
    parser = commands.add_parser(
        "merge",
        help="merge models in safetensors files, as a mergekit configuration says",
        description="Merge models in safetensors files, as a mergekit configuration says: linear, slerp, "
        "task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs or della of whole models. Needs little memory; a "
        "merge that was stopped goes on when the same command is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the configuration, in YAML")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder to make, or a .safetensors file")
    parser.add_argument("--memory", default="1GB", metavar="SIZE", help="bound on buffers, such as 512MB")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file in a folder")
    parser.add_argument("--seed", type=int, default=0, help="for the methods that draw")
    parser.add_argument("--threads", type=int, metavar="N", help="how many threads to use")
    parser.add_argument("--no-resume", action="store_true", help="start anew what was stopped")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no report")
    parser.set_defaults(run=_merge, parser=parser)


def _merge(args: argparse.Namespace) -> int:
    import shiftkern
    from shiftkern.merge.config import read_config
    from shiftkern.merge.files import merge_files

    try:
        if args.threads is not None:
            shiftkern.set_num_threads(args.threads)
        config = read_config(args.config, seed=args.seed)
        report = merge_files(
            config.base,
            config.models,
            args.out,
            config.method,
            memory=args.memory,
            resume=not args.no_resume,
            progress=not args.quiet,
            max_shard_size=args.max_shard_size,
            **config.options,
        )
    except shiftkern.ArgumentError as error:
        return _fail(str(error), 2)
    if not args.quiet:
        speed = f"{report.bytes_read / 1e6:.0f} MB read and {report.bytes_written / 1e6:.0f} MB written"
        print(f"{report.out}: {report.tensors} tensors, {speed} in {report.seconds:.1f} s")
    return 0


def _add_methods(commands: Commands) -> None:
    parser = commands.add_parser("methods", help="list the published methods the library holds")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.set_defaults(run=_methods)


def _methods(args: argparse.Namespace) -> int:
    from shiftkern.methods import METHODS

    if args.json:
        print(json.dumps([asdict(method) for method in METHODS], indent=1))
        return 0
    rows = [("id", "system", "api", "follows", "status")]
    rows += [(str(m.id), m.system, m.api, m.follows, m.status) for m in METHODS]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _add_bench(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time some kernels of each family beside plain torch on this machine",
        description="Time some kernels of each family beside the same work in torch operations, in turn, and print "
        "medians and ratios. Both sides must agree first. Takes about half a minute; --quick some seconds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="how often each side is timed, at least 5")
    parser.add_argument("--threads", type=int, metavar="N", help="for both sides; default: what torch uses")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.set_defaults(run=_bench, parser=parser)


def _bench(args: argparse.Namespace) -> int:
    import torch

    import shiftkern
    from shiftkern.bench import show

    if args.rounds < 5:
        args.parser.error(f"argument --rounds: expected at least 5, got {args.rounds}")
    if args.threads is not None:
        try:
            shiftkern.set_num_threads(args.threads)
        except shiftkern.ArgumentError as error:
            args.parser.error(str(error))
        torch.set_num_threads(args.threads)
    try:
        return show(args.quick, args.rounds)
    except ModuleNotFoundError as error:
        return _missing(error, "bench")


def _add_info(commands: Commands) -> None:
    parser = commands.add_parser("info", help="print version, build, threads and torch version, for bug reports")
    parser.set_defaults(run=_info)


def _info(_: argparse.Namespace) -> int:
    import platform

    import torch

    import shiftkern

    rows: dict[str, object] = {
        **shiftkern.build_info(),
        "threads": shiftkern.get_num_threads(),
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name.ljust(width)}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
