"""The command line's entry: `convext`, and `python -m convext`, which without arguments prints the doctor's report.

The commands want typer and rich. The doctor's report wants neither: it is asked for where something is missing.
"""

from __future__ import annotations

import importlib
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 2, after one line on stderr, where it cannot run.

    Args:
        arguments: those of the command line; default: the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["doctor"]:
        from .doctor import report

        print(report())
        return 0
    missing = [name for name in ("typer", "rich") if not _is_there(name)]
    if missing:
        print(
            f'convext: {" and ".join(missing)} not installed: pip install "convext[cli]"; `convext doctor` runs '
            "without",
            file=sys.stderr,
        )
        return 2
    from .cli import main as run

    return run(arguments)


def _is_there(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["doctor"]))
