"""The command line: `convext COMMAND`. Each command checks its options and hands over to the module that does the work.

Whatever a user can get wrong ends in one line on stderr, which names the option, the value and what was expected, and
in exit status 2; a check that fails (results that disagree, training that misses its target) gives 1.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from . import options
from .bench.tables import Grid
from .options import DType, MemoryFormat, OptionError, UsageError

app = typer.Typer(
    name="convext",
    help="Convolutions for PyTorch: swap a network's, compare, measure, and see what runs where.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure whole networks or single layers.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
DTypeOption = Annotated[DType, typer.Option(help="Type of weights and activations.")]
Format = Annotated[MemoryFormat, typer.Option(help="Of the network and its input.")]
Threads = Annotated[Optional[str], typer.Option(metavar="N", help="Threads; default: as many as torch takes.")]
Batch = Annotated[str, typer.Option(metavar="N", help="Images at a time.")]
Model = Annotated[str, typer.Option(help="A network of torchvision's.")]
Json = Annotated[Optional[Path], typer.Option("--json", help="Also write the figures to this file.")]
Csv = Annotated[Optional[Path], typer.Option("--csv", help="Also write the figures as a table to this file.")]
Html = Annotated[
    Optional[Path], typer.Option("--html", help="Also write a page with charts and all figures to this file.")
]
Seconds = Annotated[float, typer.Option(min=0.0, help="Time to spend on each comparison.")]


@app.command()
def doctor() -> None:
    """Print versions, CPU features, GPUs and backends: the text to paste into a bug report."""
    from .doctor import report

    print(report())


@app.command()
def demo(
    device: Device = "cpu",
    dtype: DTypeOption = DType.float32,
    batch: Batch = "2",
    threads: Threads = None,
    image: Annotated[Optional[Path], typer.Option(help="A photograph of yours.")] = None,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Train on digits as well.")] = True,
    output: Annotated[
        Path, typer.Option(help="Where the picture goes; that of the training beside it, as NAME-digits.")
    ] = Path("convext-demo.png"),
) -> None:
    """Swap ResNet-50 and MobileNetV2, compare before and after on photographs, then train small networks on digits."""
    _needs("demo", "torchvision", "sklearn", "matplotlib", "PIL")
    from .demo import Settings, run

    images, output = options.integer("--batch", batch), options.output("--output", output)
    with _threads(threads):
        settings = Settings(options.device(device), dtype.torch, images, image, train, output)
        raise typer.Exit(run(settings, Console()))


@app.command()
def tune(
    name: Annotated[
        Optional[str],
        typer.Argument(metavar="[MODEL|FILE]", help="A network of torchvision's, or a shape file (bench layers)."),
    ] = None,
    batch: Annotated[
        Optional[str], typer.Option(metavar="N", help="Images at a time; default: 1, and of a file what it says.")
    ] = None,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: DTypeOption = DType.float32,
    memory_format: Format = MemoryFormat.contiguous,
    train: Annotated[bool, typer.Option("--train/--eval", help="Both gradients as well.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure what is kept already, too.")] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="For each pass over a problem.")] = 0.15,
    export: Annotated[
        Optional[Path], typer.Option("--export", metavar="FILE", help="Write what is kept there.")
    ] = None,
    import_: Annotated[
        Optional[Path], typer.Option("--import", metavar="FILE", help="Keep what such a file says, too.")
    ] = None,
) -> None:
    """Measure who computes each convolution of a network fastest here, and keep it for every process.

    Each is measured by itself, and with the batch norm, sum and activation that a swapped network fuses with it; the
    layers of a shape file by themselves. An interrupted run goes on where it stopped. `convext explain` says what was
    found of a layer. --export and --import carry what was found to other machines of the kind, with the same build.
    """
    from .backends import tuned

    if name is None and export is None and import_ is None:
        raise UsageError("tune: expected a MODEL, a FILE, --export FILE or --import FILE")
    options.output("--export", export)
    place, images = options.device(device), None if batch is None else options.integer("--batch", batch)
    choices = tuned.of(place.type)
    if import_ is not None:
        try:
            count = choices.add(import_)
        except (OSError, ValueError) as error:
            expected = f"a file that --export wrote on such a machine ({error})"
            raise OptionError("--import", str(import_), expected) from error
        print(f"{count} choices read from {import_}; kept in {choices.write()}")
    if name is not None:
        _tune(name, images, threads, place, dtype, memory_format, train=train, again=again, seconds=seconds)
    if export is not None:
        export.write_text(json.dumps(choices.as_json(), indent=1) + "\n")
        print(f"{len(choices.choices)} choices written to {export}")


def _tune(
    name: str,
    images: Optional[int],
    threads: Optional[str],
    place: torch.device,
    dtype: DType,
    memory_format: MemoryFormat,
    **how: Any,
) -> None:
    with _threads(threads), _progress() as progress:
        task = progress.add_task(name, total=1)

        def advance(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=max(total, 1), description=what or name)

        try:
            run = _tune_file if Path(name).is_file() else _tune_network
            tuned = run(name, images, place, dtype, memory_format, on_progress=advance, **how)
        except KeyboardInterrupt:
            print("convext: stopped; what was measured is kept, the same command goes on from there", file=sys.stderr)
            raise typer.Exit(130) from None
    print(tuned)


def _tune_network(
    name: str, images: Optional[int], place: torch.device, dtype: DType, memory_format: MemoryFormat, **how: Any
) -> object:
    _needs("demo", "torchvision")
    import convext

    from . import zoo

    network = zoo.build(name, calibrated=False)[0].to(place, dtype.torch, memory_format=memory_format.torch)  # type: ignore[call-overload]
    x = zoo.sample(name, images or 1).to(place, dtype.torch, memory_format=memory_format.torch)
    return convext.tune(convext.swap(network), x, **how)


def _tune_file(
    name: str, images: Optional[int], place: torch.device, dtype: DType, memory_format: MemoryFormat, **how: Any
) -> object:
    from .bench import problems
    from .tune import tune_layers

    channels_last = memory_format is MemoryFormat.channels_last
    layers = {
        problems.placed(layer, batch=images, dtype=dtype.torch, device=place.type, channels_last=channels_last): count
        for layer, count in problems.read(Path(name)).items()
    }
    return tune_layers(layers, place, **how)


@app.command()
def explain(
    name: Annotated[str, typer.Argument(metavar="MODEL")],
    layer: Annotated[str, typer.Argument(metavar="LAYER", help="Such as layer3.0.conv2.")],
    pass_: Annotated[str, typer.Option("--pass", help="fprop, dgrad or wgrad.")] = "fprop",
    batch: Batch = "1",
    threads: Threads = None,
    device: Device = "cpu",
    dtype: DTypeOption = DType.float32,
    memory_format: Format = MemoryFormat.contiguous,
) -> None:
    """Say of one layer who computes it, what every other kernel would take, and why it does not serve."""
    _needs("demo", "torchvision")
    import convext

    from . import zoo

    place, images = options.device(device), options.integer("--batch", batch)
    if pass_ not in ("fprop", "dgrad", "wgrad"):
        raise OptionError("--pass", pass_, "fprop, dgrad or wgrad")
    with _threads(threads), torch.no_grad():
        network = zoo.build(name)[0].eval().to(place, dtype.torch, memory_format=memory_format.torch)  # type: ignore[call-overload]
        x = zoo.sample(name, images).to(place, dtype.torch, memory_format=memory_format.torch)
        convext.swap(network)(x)
        try:
            print(convext.explain(network, layer, pass_))
        except (KeyError, RuntimeError) as error:
            raise UsageError(f"LAYER: {error.args[0]}") from error


@bench.command("model")
def bench_model(
    names: Annotated[Optional[list[str]], typer.Argument(metavar="[NAMES]...")] = None,
    batch: Annotated[str, typer.Option(metavar="N...", help="One or more, such as: 1 8.")] = "1,8",
    threads: Annotated[str, typer.Option(metavar="N...", help="One or more, such as: 1 2.")] = "1,2",
    dtype: DTypeOption = DType.float32,
    memory_format: Format = MemoryFormat.contiguous,
    train: Annotated[bool, typer.Option("--train/--eval", help="A training step, or inference.")] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Of a training step, also that of convext.swap(model, recompute=True).")
    ] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also the engines that people leave PyTorch for.")] = False,
    peer: Annotated[
        Optional[list[str]], typer.Option(help="One of those alone, such as OpenVINO; may be given more than once.")
    ] = None,
    output_pool: Annotated[
        bool,
        typer.Option("--output-pool/--no-output-pool", help="Reuse memory of dropped results, or take it from malloc."),
    ] = True,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    seconds: Seconds = 10.0,
    output: Json = None,
    table: Csv = None,
    page: Html = None,
) -> None:
    """Time whole networks, swapped beside unswapped, in turns in one run, after checking that results agree.

    Default networks: resnet50 and mobilenet_v2. A cell reads median ± distance between the quartiles; a second table
    has the memory that eager and convext take. Weights are warm, as they are in a program that runs a network.
    """
    _needs("demo", "torchvision")
    import convext

    from . import zoo
    from .bench import machine, model, results

    batches, counts = options.integers("--batch", batch), options.integers("--threads", threads)
    _written_to(output, table, page)
    if recompute and not train:
        raise UsageError("bench model --recompute: expected --train as well: inference keeps nothing")
    known = model.peers(train)
    for name in peer or ():
        if name not in known:
            raise options.OptionError("--peer", name, f"one of {', '.join(known)}")
    asked = known if peers else peer or ()
    names = names or ["resnet50", "mobilenet_v2"]
    for name in names:
        zoo.check(name)
    setting = dict(dtype=dtype, memory_format=memory_format, train=train, recompute=recompute)
    cases = list(model.cases(names, batches, counts, **setting))
    outcomes = []
    with _progress() as progress, convext.output_pool(convext.output_pool.limit() if output_pool else 0):
        record = machine.record()
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            outcomes.append(model.run(case, peers=asked, seconds=seconds))
            progress.console.print(model.images_per_second(outcomes[-1]), soft_wrap=True)
            progress.advance(task)
    _print_table(model.table(outcomes), markdown)
    what = "a step: saved for the backward pass, and the most" if train else "a call: the most"
    print(f"Memory of {what} that its tensors take at once.")
    _print_table(model.memory_table([o for o in outcomes if o.case.threads == counts[0]]), markdown)
    for count in counts:
        print(machine.ceilings(count))
    for reason in dict.fromkeys(f"skipped {name}: {why}" for o in outcomes for name, why in o.skipped.items()):
        print(reason)
    _print_machine(record)
    results.publish(record, [outcome.as_json() for outcome in outcomes], json=output, csv=table, html=page)


@bench.command("layers")
def bench_layers(
    files: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[FILE]...", help="Shape files, or short names of those that convext brings."),
    ] = None,
    from_model: Annotated[
        Optional[list[str]],
        typer.Option("--from-model", metavar="MODEL", help="A network of torchvision's; may be given more than once."),
    ] = None,
    batch: Annotated[
        Optional[str], typer.Option(metavar="N", help="Images at a time; default: 1, and of a file what it says.")
    ] = None,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: DTypeOption = DType.float32,
    memory_format: Format = MemoryFormat.channels_last,
    passes: Annotated[str, typer.Option(help="Of fprop, dgrad, wgrad, with commas.")] = "fprop,dgrad,wgrad",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    seconds: Seconds = 0.3,
    output: Json = None,
    table: Csv = None,
    page: Html = None,
) -> None:
    """Time every convolution of shape files or networks, convext's backends beside ATen, and check who is selected.

    Results are checked before they are timed. On the CPU caches are warm: a visit begins with a call that is not timed.
    On a GPU: ATen with cuDNN's benchmark mode, caches cold, time on the device; fprop also with batch norm and ReLU.
    """
    from .bench import layers, machine, problems, results
    from .problem import Pass

    _written_to(output, table, page)
    wanted = [p for p in Pass if p.name.lower() in passes.split(",")]
    if not wanted or len(wanted) != len(set(passes.split(","))):
        raise OptionError("--passes", passes, "some of fprop, dgrad, wgrad, with commas")
    place = options.device(device)
    images = None if batch is None else options.integer("--batch", batch)
    if not files and not from_model:
        raise UsageError(f"bench layers: expected FILE, such as {', '.join(problems.names())}, or --from-model MODEL")
    collected: Counter[problems.Layer] = Counter()
    for path in [problems.find(name) for name in files or ()]:
        collected.update(problems.read(path))
    for name in from_model or ():
        _needs("demo", "torchvision")
        collected.update(_layers_of_model(name))
    channels_last = memory_format is MemoryFormat.channels_last
    with _threads(threads), machine.current(place):
        found: Counter[problems.Layer] = Counter()
        for layer, count in collected.items():
            how: dict[str, Any] = {"dtype": dtype.torch, "device": place.type, "channels_last": channels_last}
            found[problems.placed(layer, batch=images, **how)] += count
        if place.type == "cpu":
            ceilings = machine.ceilings(torch.get_num_threads(), dtype.torch)
        else:
            ceilings = machine.gpu_ceilings(place, dtype.torch)
            layers.compile_ahead(found, wanted)
        measured = []
        with _progress() as progress:
            todo = list(layers.jobs(found, wanted))
            task = progress.add_task("", total=len(todo))
            for layer, count, pass_, fused in todo:
                progress.update(task, description=f"{pass_.name.lower()} {problems.title(*layer)}")
                try:
                    measured.append(layers.measure(layer, count, pass_, seconds, fused))
                except layers.WrongResult as error:
                    raise UsageError(f"bench layers: {error}") from error
                progress.advance(task)
        caches = "warm" if place.type == "cpu" else "cold"
        setting = {
            "model": ", ".join([*(from_model or ()), *(Path(name).stem for name in files or ())]),
            "batch": images,
            "dtype": dtype.value,
            "memory_format": memory_format.value,
            "threads": torch.get_num_threads(),
            "caches": caches,
        }
        record = machine.record(place) | {"setting": setting, "ceilings": dataclasses.asdict(ceilings)}
        _print_table(layers.table(measured, ceilings), markdown)
        print(layers.summary(measured))
        print(f"{ceilings}; medians, caches {caches}")
    _print_machine(record)
    results.publish(record, [m.as_json() for m in measured], json=output, csv=table, html=page)


def _layers_of_model(name: str) -> dict[Any, int]:
    from . import zoo
    from .bench import problems

    return problems.collect_layers(zoo.build(name)[0], zoo.sample(name, 1))


@bench.command("shape-files")
def bench_shape_files(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]")] = Path("benchmarks/shapes"),
    kernelbench: Annotated[
        Optional[Path], typer.Option(metavar="PATH", help="A checkout of KernelBench, to renew its file as well.")
    ] = None,
) -> None:
    """Write the shape files of `bench layers` anew, from the networks whose layers they hold."""
    _needs("demo", "torchvision")
    from .bench import networks

    if not folder.is_dir():
        raise OptionError("FOLDER", folder, "an existing folder")
    for name, text in networks.files(kernelbench):
        (folder / name).write_text(text)
        print(f"{folder / name}: {text.count(chr(10)) - 2} layers")


@bench.command("shapes")
def bench_shapes(
    count: Annotated[int, typer.Argument(min=1)] = 200,
    seed: Annotated[int, typer.Option(help="The same shapes for each.")] = 0,
    threads: Threads = None,
    dtype: DTypeOption = DType.float32,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="For each shape.")] = 0.15,
    output: Json = None,
) -> None:
    """Time convolutions of shapes drawn at random: the cost model's choice, the best, ATen. Nothing of it is kept."""
    import convext

    from .bench import machine, results, shapes
    from .tune import measure

    options.output("--json", output)
    measured = []
    with convext.tuning("off"), _threads(threads), _progress() as progress:
        record = machine.record() | {"threads": torch.get_num_threads(), "seed": seed, "dtype": dtype.value}
        for pass_, problem in progress.track(shapes.draw(count, seed, dtype.torch), total=count):
            measured.append(measure(pass_, problem, seconds=seconds))
    _print_table(shapes.table(measured), markdown)
    print(shapes.summary(measured))
    _print_machine(record)
    results.write(output, record, [shapes.as_json(one) for one in measured])


@bench.command("calibrate")
def bench_calibrate(
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to measure for, at most.")] = 600.0,
    destination: Annotated[
        Optional[Path], typer.Option("--output", metavar="FILE", help="Write the table there; default: your own.")
    ] = None,
    samples: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="Keep what is measured there, and go on where such a file ends."),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="With --check: of weights and activations.")] = DType.float32,
    seed: Annotated[Optional[int], typer.Option(help="The same problems for each; default: 1, with --check 0.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Measure how good the choice is; write no table.")] = False,
    names: Annotated[
        Optional[list[str]],
        typer.Option("--model", metavar="MODEL", help="With --check: its layers, or unet's; more than once."),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N...", help="Of those, one or more, such as: 1 8.")] = "1,8",
    count: Annotated[int, typer.Option(min=0, help="With --check: as many shapes drawn at random.")] = 500,
    output: Json = None,
) -> None:
    """Measure what convolutions cost on this CPU, and write the table by which kernels and ATen are chosen.

    One thread. The table is fitted to shapes drawn at random and counts in every process from then on. With --check:
    how often the choice is within 10 % of the best, of other shapes and of networks' layers, every pass.
    """
    import convext

    from .backends import costs, native
    from .bench import calibrate, machine, results, shapes

    options.output("--json", output), options.output("--output", destination)
    if (reason := native.BACKEND.unavailable("cpu")) is not None:
        raise UsageError(f"bench calibrate: {reason}")
    if not check and (names or output is not None):
        raise UsageError("bench calibrate: --model and --json go with --check")
    path = destination or costs.user_path()
    if not check and path is None:
        raise UsageError("bench calibrate: there is no folder for it: name a file by --output, or set CONVEXT_CACHE")
    with convext.tuning("off"), _threads("1"), _progress() as progress:
        task = progress.add_task("measured", total=1.0)

        def advance(share: float, done: int) -> None:
            progress.update(task, completed=share, description=f"{done} problems")

        if not check:
            found = _samples(samples, calibrate.problems(1 if seed is None else seed), seconds, advance)
            fitted = calibrate.fit(found, costs.table().limits | {"call_saving": calibrate.call_saving()})
            assert path is not None
            calibrate.write(fitted, path)
            costs.use(fitted)
            try:
                groups = {"what it was fitted to": calibrate.check(found)}
            finally:
                costs.use(None)
        else:
            record = machine.record() | {"threads": 1, "dtype": dtype.value, "seed": seed or 0}
            record |= {"tables": [Path(source).name for source in costs.sources()]}
            asked = {f"{n} at a time": _layers(names or [], n, dtype) for n in options.integers("--batch", batch)}
            asked["shapes at random"] = list(shapes.draw(count, seed or 0, dtype.torch))
            todo = [(name, job) for name, jobs_of in asked.items() for job in jobs_of]
            found = _samples(samples, (job for _, job in todo), math.inf, lambda _, n: advance(n / len(todo), n))
            if [(one.pass_, one.problem) for one in found] != [job for _, job in todo]:
                raise OptionError("--samples", str(samples), "a file that the same command wrote, or none")
            groups = {name: [] for name in asked}
            besides = [calibrate.beside(problem) for _, problem in progress.track(asked["shapes at random"])]
            for (group, _), one in zip(todo, calibrate.check(found), strict=True):
                groups[group].append(one)
            results.write(
                output,
                record | {"summary": {name: calibrate.summary(found) for name, found in groups.items() if found}},
                [one.as_json() | {"group": name} for name, found in groups.items() for one in found]
                + [one.as_json() | {"group": calibrate.BESIDE} for one in besides],
            )
    _print_table(calibrate.table(groups))
    if check and besides:
        print(calibrate.said_of(besides))
    counts = f"{path} counts from now on" if not check and destination is None else ""
    print(counts or f"tables: {', '.join(costs.sources())}")


def _samples(path: Optional[Path], jobs: Any, seconds: float, advance: Any) -> list[Any]:
    from .bench import calibrate

    try:
        return calibrate.collect(jobs, seconds, path, advance)
    except ValueError as error:
        raise OptionError("--samples", str(path), f"a file that this command wrote ({error})") from error


def _layers(names: list[str], images: int, dtype: DType) -> list[tuple[Any, Any]]:
    """Every pass over every distinct convolution of the networks, in channels_last."""
    _needs("demo", "torchvision")
    from . import zoo
    from .bench import problems
    from .problem import Pass

    found: dict[Any, None] = {}
    for name in names:
        if name == "unet":
            for layer in problems.read(problems.find(name)):
                if not layer.transposed:
                    at = problems.placed(layer, batch=images, dtype=dtype.torch, device="cpu", channels_last=True)
                    found[at.problem] = None
            continue
        x = zoo.sample(name, 1).to(dtype.torch, memory_format=torch.channels_last)
        network = zoo.build(name)[0].to(dtype.torch)
        for problem in problems.collect(network, x):
            found[dataclasses.replace(problem, n=images)] = None
    return [(pass_, problem) for problem in found for pass_ in Pass]


@bench.command("kernelbench")
def bench_kernelbench(
    folder: Annotated[Path, typer.Argument(metavar="PATH", help="A checkout of KernelBench.")],
    level: Annotated[str, typer.Option(help="Of 1, 2, 3, with commas.")] = "1,2,3",
    number: Annotated[Optional[list[int]], typer.Option(help="One problem's; may be given more than once.")] = None,
    scale: Annotated[
        Optional[float],
        typer.Option(
            min=0.0,
            help="10^9 operations that a forward may take; larger problems shrink. 0: as far as memory goes. "
            "Default: 4 on the CPU, 0 on a GPU.",
        ),
    ] = None,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: DTypeOption = DType.float32,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Beside torch.compile, too.")] = True,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="For each problem.")] = 1.0,
    output: Json = None,
    table: Csv = None,
    page: Html = None,
) -> None:
    """Run KernelBench's problems with a convolution: check the swapped model by its rule, time it beside eager's.

    Status 1 where a result is wrong, or a problem does not run.
    """
    from .bench import kernelbench, machine, memory, results

    _written_to(output, table, page)
    levels = options.integers("--level", level)
    if not set(levels) <= set(kernelbench.LEVELS):
        raise OptionError("--level", level, "some of 1, 2, 3, with commas")
    place = options.device(device)
    most = scale if scale is not None else 4.0 if place.type == "cpu" else 0.0
    found = kernelbench.problems(folder, levels, number or ())
    outcomes = []
    with _threads(threads), _progress() as progress:
        record = machine.record(place) | {"threads": torch.get_num_threads(), "dtype": dtype.value, "scale": most}
        task = progress.add_task("", total=len(found))
        for problem in found:
            progress.update(task, description=str(problem))
            outcomes.append(
                kernelbench.run(
                    problem,
                    device=place,
                    dtype=dtype.torch,
                    most_flops=most * 1e9 or math.inf,
                    most_bytes=memory.free_memory(place) / 4,
                    compiled=compiled,
                    seconds=seconds,
                )
            )
            progress.advance(task)
    _print_table(kernelbench.table(outcomes), markdown)
    print(kernelbench.summary(outcomes))
    for line in kernelbench.skipped(outcomes):
        print(line)
    _print_machine(record)
    results.publish(record, [outcome.as_json() for outcome in outcomes], json=output, csv=table, html=page)
    raise typer.Exit(0 if all(outcome.ok for outcome in outcomes) else 1)


@bench.command("networks")
def bench_networks(
    names: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[NETWORK]...", help="torchvision's, or timm/NAME; default: one of each family."),
    ] = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="To time each network for; 0 for not at all.")] = 0.0,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    output: Json = None,
) -> None:
    """Networks at batch 1, swapped beside unswapped: how many layers are served, and whether the results are right.

    Exit status 1: a network raised or is wrong.
    """
    _needs("bench", "torchvision", "timm")
    from . import zoo
    from .bench import coverage, machine, results

    options.output("--json", output)
    chosen = names or [*coverage.TORCHVISION, *coverage.TIMM]
    for name in chosen:
        zoo.check(name)
    outcomes = []
    with _threads(threads), _progress() as progress:
        record = machine.record() | {"threads": torch.get_num_threads()}
        task = progress.add_task("", total=len(chosen))
        for name in chosen:
            progress.update(task, description=name)
            outcomes.append(coverage.run(name, seconds))
            progress.advance(task)
    _print_table(coverage.table(outcomes), markdown)
    print(coverage.summary(outcomes))
    _print_machine(record)
    results.write(output, record, [outcome.as_json() for outcome in outcomes])
    raise typer.Exit(0 if all(outcome.ok for outcome in outcomes) else 1)


@bench.command("sass")
def bench_sass(
    files: Annotated[
        Optional[list[Path]], typer.Argument(metavar="[FILE]...", help="Cubins or libraries; default: convext/_CUDA.")
    ] = None,
    name: Annotated[
        Optional[str],
        typer.Option("--model", metavar="MODEL", help="Predict its layers, in place of the kernels' table."),
    ] = None,
    batch: Batch = "256",
    dtype: DTypeOption = DType.bfloat16,
    write: Annotated[bool, typer.Option("--write", help="Renew csrc/cuda/machine_code.inc.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    output: Json = None,
) -> None:
    """Read the machine code of the CUDA kernels: registers, occupancy, what a loop issues, and what that predicts.

    Needs no GPU. What is printed is computed, not measured. Exit status 1: a kernel breaks a promise of its source.
    """
    from .bench import machine, problems, results, sass

    options.output("--json", output)
    csrc = machine.ROOT / "csrc"
    setting = {"computed": "from the machine code, not measured"}
    if name is not None:
        _needs("demo", "torchvision")
        from . import zoo
        from .backends import native_cuda

        if reason := native_cuda.not_built():
            raise UsageError(f"bench sass --model: {reason}")
        images = options.integer("--batch", batch)
        found = problems.collect(zoo.build(name)[0], zoo.sample(name, 1))
        grids = [sass.predictions({dataclasses.replace(p, n=images): n for p, n in found.items()}, dtype.name)]
        setting |= {"model": name, "batch": str(images), "dtype": dtype.value}
        broken: list[str] = []
    else:
        if not csrc.is_dir():
            raise UsageError("bench sass: promises are in the sources: run it in the source tree")
        files = files or sorted((machine.ROOT / "convext").glob("_CUDA*.so"))
        if not files:
            raise UsageError("bench sass: convext/_CUDA is not built: name a cubin, or build with nvcc")
        kernels = [kernel for file in files for kernel in sass.read(file)]
        said = sass.promises(csrc)
        grids = [sass.table(kernels, said), sass.accesses(kernels)]
        broken = [wrong for k in kernels if (p := sass.promised(k, said)) for wrong in p.broken_by(k)]
        broken += [wrong for kernel in kernels for wrong in sass.slow_in_main_loop(kernel)]
        if write:
            (csrc / "cuda" / "machine_code.inc").write_text(sass.machine_code(kernels, said))
    for grid in grids:
        _print_table(grid, markdown)
    for wrong in broken:
        print(wrong)
    record = machine.record() | {"device": "cuda", "kernels": machine.kernels("cuda"), "setting": setting}
    record["gpu"] = {"name": "computed for an H200, not measured"}
    rows = [dict(zip(grid.columns, row, strict=True)) for grid in grids for row in grid.rows]
    results.write(output, record, rows)
    raise typer.Exit(1 if broken else 0)


@bench.command("host")
def bench_host(
    threads: Threads = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="For each kind of call.")] = 1.0,
    output: Json = None,
    device: Device = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --device cuda: all but the launches; needs no GPU.")
    ] = False,
) -> None:
    """Time the call itself: of the smallest convolution, alone, as a layer and swapped, beside PyTorch's."""
    import time

    from .backends import native_cuda
    from .bench import host, machine, results

    options.output("--json", output)
    if dry_run and device != "cuda":
        raise OptionError("--device", device, "cuda, where --dry-run is given")
    if dry_run and (why := native_cuda.not_built()) is not None:
        raise OptionError("--dry-run", "it", f"the kernels that it asks, but {why}")
    place = None if dry_run else options.device(device)
    with _threads(threads), _progress() as progress:
        record = machine.record(place or torch.device("cpu")) | {"threads": torch.get_num_threads()}
        clock = time.thread_time if torch.get_num_threads() == 1 else None  # leaves out what others take
        found = host.measure(seconds, place, clock, progress.track)
    _print_table(host.table(found), markdown)
    print(host.summary(found) if place is not None and place.type == "cpu" else host.summary_on_gpu(found))
    _print_machine(record)
    results.write(output, record, [cost.as_json() for cost in found])


@bench.command("page")
def bench_page(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What --json wrote.")],
    page: Annotated[Path, typer.Option("--html", help="Where the page goes.")],
) -> None:
    """Draw a page of files of results: of bench layers, model and kernelbench."""
    from .bench import results

    _written_to(None, None, page)
    from .bench import page as pages

    contents = []
    for file in files:
        try:
            contents.append(results.read(file))
            pages.sections(contents[-1])
        except (OSError, ValueError, KeyError) as error:
            expected = f"a file that --json of bench layers, model or kernelbench wrote ({error})"
            raise OptionError("FILE", file, expected) from error
    page.write_text(pages.render(contents), encoding="utf-8")
    print(f"{page}: {len(contents)} files of results")


@bench.command("figures")
def bench_figures() -> None:
    """Write the figures and pictures of README.md anew, from benchmarks/results, in the source tree."""
    _needs("bench", "matplotlib", "jinja2")
    from .bench import figures

    for path in figures.write():
        print(path)


@bench.command("results")
def bench_results(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]")] = Path("benchmarks/results"),
) -> None:
    """Say of every file of results what it was measured on, and whether the kernels are still those (status 1: not)."""
    from .bench import results

    if not folder.is_dir():
        raise OptionError("FOLDER", folder, "a folder with results")
    lines = [(path.name, *results.describe(path)) for path in sorted(folder.glob("*.json"))]
    for name, line, _ in lines:
        print(f"{name}: {line}")
    raise typer.Exit(0 if all(current for _, _, current in lines) else 1)


@app.command()
def report(
    model: Model,
    swap: Annotated[bool, typer.Option("--swap/--no-swap", help="Report on the swapped network.")] = True,
    device: Device = "cpu",
    dtype: DTypeOption = DType.float32,
    batch: Batch = "1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Ask the selection alone; needs no such device.")] = False,
) -> None:
    """Print what became of every layer of a network, and who serves it.

    With --dry-run: the compiled kernel for every layer, pass and dtype; exit status 1 where one is missing.
    """
    _needs("demo", "torchvision")
    import convext

    from . import zoo
    from .bench import problems

    images = options.integer("--batch", batch)
    network, _ = zoo.build(model)
    if dry_run:
        from . import dry_run as dry
        from .problem import DType as Kernels

        if device not in dry.DEVICES:
            raise OptionError("--device", device, "cpu or cuda")
        grid, reasons = dry.table(problems.collect(network, zoo.sample(model, images)), device, list(Kernels))
        _print_table(grid)
        told = [f"{count} entries have no compiled kernel: {reason}" for reason, count in reasons.items()]
        for line in told or ["all served"]:
            print(f"{model} on {device}: {line}")
        raise typer.Exit(1 if reasons else 0)
    place = options.device(device)
    network = network.to(place, dtype.torch)
    network = convext.swap(network) if swap else network
    with torch.no_grad():  # what has run can be told from what would run
        network(zoo.sample(model, images).to(place, dtype.torch))
    print(convext.report(network))


@app.command()
def verify(
    model: Model,
    device: Device = "cpu",
    dtype: DTypeOption = DType.float32,
    batch: Batch = "2",
    threads: Threads = None,
) -> None:
    """Run a network swapped and unswapped, forward and backward, and tell how far apart they are (status 1: far)."""
    _needs("demo", "torchvision")
    import convext

    from . import zoo

    place, images = options.device(device), options.integer("--batch", batch)
    with _threads(threads):
        network = convext.swap(zoo.build(model)[0].to(place, dtype.torch))
        verification = convext.verify(network, zoo.sample(model, images).to(place, dtype.torch))
    print(verification)
    raise typer.Exit(0 if verification.ok else 1)


# ---- what commands share --------------------------------------------------------------------------------------------


def _needs(extra: str, *modules: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise UsageError(f'{", ".join(missing)} not installed: pip install "convext[{extra}]"')


def _written_to(output: Path | None, table: Path | None, page: Path | None) -> None:
    for option, path in (("--json", output), ("--csv", table), ("--html", page)):
        options.output(option, path)
    if page is not None:
        _needs("bench", "matplotlib", "jinja2")


@contextmanager
def _threads(count: str | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else options.integer("--threads", count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _progress() -> Progress:
    """A bar on stderr, where stderr is a terminal that can redraw a line."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal or console.is_dumb_terminal)


def _print_table(grid: Grid, markdown: bool = False) -> None:
    print(grid.markdown() if markdown else grid.text(None if sys.stdout.isatty() else 180))


def _print_machine(record: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {found}" for name, found in record["versions"].items() if found)
    device = f"{record['gpu']['name']}, driver {record['gpu'].get('driver')}; " if record["gpu"] else ""
    commit = f"commit {record['commit'] or 'unknown'}, kernels {record['kernels'] or 'unknown'}"
    print(f"{device}{record['cpu']}, {record['cores']} cores; {versions}; {commit}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = options.gather_integers(sys.argv[1:] if arguments is None else arguments)
    try:
        return app(arguments, standalone_mode=False) or 0
    except UsageError as error:
        message = str(error)
    except typer.Abort:
        return 130
    except Exception as error:
        # typer's own usage errors; the class they come from depends on the typer installed.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
    print(f"convext: {message}", file=sys.stderr)
    return 2
