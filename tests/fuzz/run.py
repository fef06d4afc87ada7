"""Runs the stateful fuzz for long: python tests/fuzz/run.py --help, or ./dev fuzz.

Every batch has a seed of its own, from which all in it follows: `--seed S --batches 1` runs it again. It ends at the
first difference, with the steps that lead to it, made as few as hypothesis can in its time, and exit code 1.
A failure that depends on what the process did before (a cache met at an old address) is reported as flaky: then the
printed steps are those that failed, and the batch's seed alone brings it back.
"""

import argparse
import os
import pathlib
import random
import re
import sys
import time
import traceback
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import functional_machine  # noqa: E402
import machine as swap_machine  # noqa: E402
import torch  # noqa: E402
from changes import CHANGES  # noqa: E402
from hypothesis import HealthCheck, Phase, reproduce_failure, seed, settings  # noqa: E402
from hypothesis.errors import Flaky, HypothesisException  # noqa: E402
from hypothesis.stateful import run_state_machine_as_test  # noqa: E402

EXAMPLES, LENGTH = 20, 25


def options(shrink=True, examples=EXAMPLES, length=LENGTH):
    phases = [Phase.reuse, Phase.generate, *([Phase.shrink] if shrink else [])]
    return settings(
        max_examples=examples,
        stateful_step_count=length,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        report_multiple_bugs=False,
    )


def run_batch(machine, number, settings_, progress):
    """One batch, from its seed; returns what it found wrong as text, or None."""
    machine = type(machine.__name__, (machine,), {})
    progress.counts, progress.first = True, None
    if number is not None:
        machine = seed(number)(machine)
    try:
        run_state_machine_as_test(machine, settings=settings_)
    except (Exception, HypothesisException) as error:
        text = "".join(traceback.format_exception(error, limit=-2))
        if isinstance(error, Flaky) or progress.first is None:
            text += f"\nwhat failed first, and not again:\n{progress.first}\n"
        blob = re.search(r"reproduce_failure\('([^']+)', b'([^']+)'\)", text)
        hint = f"\nonly the failing steps again, with the same options: --replay {blob[1]}:{blob[2]}" if blob else ""
        return text + hint
    return None


def run_for(machine, progress, seconds, minimum, most=10**6):
    """Batches 0, 1, 2, ... below `most` until the time is over and at least `minimum` steps are done; raises what one
    found."""
    start = time.monotonic()
    before, number = progress.steps, 0
    while number < most and (time.monotonic() - start < seconds or progress.steps - before < minimum):
        found = run_batch(machine, number, options(shrink=False, examples=5), progress)
        if found:
            raise AssertionError(f"{found}\nbatch {number} of {time.monotonic() - start:.0f} s")
        number += 1
    return number, progress.steps - before


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="stop after that many steps (default 20000, unless --hours is given)")
    parser.add_argument("--hours", type=float, help="stop after that many hours")
    parser.add_argument("--batches", type=int, help="stop after that many batches")
    parser.add_argument("--seed", type=int, help="of the first batch; later ones count up (default: drawn)")
    parser.add_argument("--functional", action="store_true", help="the functional interface instead of the swap")
    parser.add_argument(
        "--twin",
        choices=swap_machine.TWINS,
        default="convext",
        help="what is compared: plain and rounding must find nothing, and test the fuzz itself",
    )
    parser.add_argument("--only", metavar="RULE,RULE", help="rules of the swap's fuzz to run alone")
    parser.add_argument("--without", metavar="RULE,RULE", default="", help="rules of the swap's fuzz to leave out")
    parser.add_argument("--no-shrink", action="store_true", help="print the first failing steps as they are")
    parser.add_argument("--keep-going", action="store_true", help="go on after a difference, and count them")
    parser.add_argument("--replay", metavar="VERSION:BLOB", help="what `reproduce_failure` of a failure's output says")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if arguments.functional:
        machine, progress = functional_machine.make_functional_machine(), functional_machine.PROGRESS
    else:
        only = arguments.only.split(",") if arguments.only else [c.__name__ for c in CHANGES]
        unknown = {*only, *filter(None, arguments.without.split(","))} - {c.__name__ for c in CHANGES}
        if unknown:
            parser.error(f"unknown rules {sorted(unknown)}: expected some of {[c.__name__ for c in CHANGES]}")
        changes = [c for c in CHANGES if c.__name__ in only and c.__name__ not in arguments.without.split(",")]
        machine, progress = swap_machine.make_machine(arguments.twin, changes), swap_machine.PROGRESS
    if arguments.replay:
        version, blob = arguments.replay.split(":", 1)
        found = run_batch(reproduce_failure(version, blob.encode())(machine), None, options(), progress)
        print(found or "no difference")
        return int(found is not None)
    first = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 31)
    limit = arguments.steps or (None if arguments.hours or arguments.batches else 20000)
    start, number, differences = time.monotonic(), first, 0
    while True:
        found = run_batch(machine, number, options(not arguments.no_shrink), progress)
        passed = time.monotonic() - start
        if found:
            differences += 1
            print(found, flush=True)
            print(f"a difference in batch {number}: again with --seed {number} --batches 1", flush=True)
        left = [] if limit is None else [passed * (limit / max(1, progress.steps) - 1)]
        left += [arguments.hours * 3600 - passed] if arguments.hours else []
        print(
            f"seeds {first} to {number}: {progress.steps} steps in {progress.runs} runs, {differences} "
            f"differences, {passed:.0f} s, {progress.steps / passed:.0f} steps a second"
            + (f", {max(0, min(left)):.0f} s left" if left else ""),
            flush=True,
        )
        number += 1
        if differences and not arguments.keep_going:
            return 1
        if (
            (limit and progress.steps >= limit)
            or (arguments.hours and passed >= arguments.hours * 3600)
            or (arguments.batches and number - first >= arguments.batches)
        ):
            break
    print("steps by change: " + ", ".join(f"{k} {v}" for k, v in sorted(progress.kinds.items(), key=lambda i: -i[1])))
    return int(differences > 0)


if __name__ == "__main__":
    sys.exit(main())
