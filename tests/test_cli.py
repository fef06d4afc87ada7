"""The command line: what it prints, and how it refuses."""

import json
import subprocess
import sys

import pytest
import torch

import convext
from convext import cli, doctor, dry_run, options
from convext.backends import tuned
from convext.bench import host, problems, shapes
from convext.bench.timing import Timing
from convext.problem import ConvProblem, DType, Pass


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        (["bench", "model", "--batch", "1", "8"], ["bench", "model", "--batch", "1,8"]),
        (["--batch", "1", "8", "--threads", "1", "2"], ["--batch", "1,8", "--threads", "1,2"]),
        (["--batch", "4", "resnet18", "8"], ["--batch", "4", "resnet18", "8"]),
        (["--batch", "1,8", "9"], ["--batch", "1,8,9"]),
        (["--seconds", "1", "2"], ["--seconds", "1", "2"]),
        ([], []),
    ],
)
def test_options_take_several_integers(given, joined):
    assert options.gather_integers(given) == joined


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("demo --image nowhere.jpg", "--image: got 'nowhere.jpg', expected an existing picture"),
        ("demo --batch 0", "--batch: got '0', expected an integer of at least 1"),
        ("demo --threads two", "--threads: got 'two', expected an integer of at least 1"),
        ("demo --dtype float7", "'float7' is not one of"),
        ("demo --device tpu", "--device: got 'tpu', expected cpu, cuda or cuda:N"),
        ("demo --device cuda:99", "--device: got 'cuda:99', expected a GPU that torch sees"),
        (
            "demo --output nowhere/picture.png",
            "--output: got 'nowhere/picture.png', expected a file in an existing folder",
        ),
        ("demo --epochs 3", "No such option: --epochs"),
        ("bench model resnet51", "got 'resnet51', expected a network of torchvision's"),
        ("bench model --batch 1 x", "x"),
        ("bench model --peer MATLAB", "--peer: got 'MATLAB', expected one of eager channels-last, torch.compile,"),
        ("bench layers resnet50 --passes fprop,sideways", "--passes: got 'fprop,sideways', expected some of"),
        ("bench layers", "bench layers: expected FILE, such as aspp, "),
        ("bench layers resnet18", "FILE: got 'resnet18', expected a shape file or one of aspp, "),
        ("bench layers --from-model resnet51", "got 'resnet51', expected a network of torchvision's"),
        ("bench shape-files nowhere", "FOLDER: got 'nowhere', expected an existing folder"),
        ("tune resnet51", "got 'resnet51', expected a network of torchvision's"),
        ("tune", "tune: expected a MODEL, a FILE, --export FILE or --import FILE"),
        ("tune --import nowhere.json", "--import: got 'nowhere.json', expected a file that --export wrote"),
        ("tune resnet18 --batch 0", "--batch: got '0', expected an integer of at least 1"),
        ("explain resnet18 nowhere", "LAYER: no convolution 'nowhere'; there are conv1, layer1.0.conv1"),
        ("explain resnet18 conv1 --pass sideways", "--pass: got 'sideways', expected fprop, dgrad or wgrad"),
        ("report --model resnet51", "got 'resnet51'"),
        ("report --model resnet18 --device tpu --dry-run", "--device: got 'tpu', expected cpu or cuda"),
        ("frobnicate", "frobnicate"),
    ],
)
def test_a_wrong_option_gives_one_line_and_status_2(arguments, expected, capsys):
    assert cli.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("convext: ") and expected in error
    assert error.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["bench", "model"]) == 2
    assert 'pip install "convext[demo]"' in capsys.readouterr().err


@pytest.mark.smoke
@pytest.mark.parametrize("command", ["", "demo", "doctor", "report", "verify", "bench", "bench model", "bench layers"])
def test_every_command_has_help(command, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.smoke
def test_without_arguments_the_module_prints_the_doctors_report():
    found = subprocess.run([sys.executable, "-m", "convext"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("convext ")
    assert "running with: torch" in found.stdout


@pytest.mark.smoke
def test_doctor_names_versions_cpu_and_every_backend():
    import torch

    report = doctor.report()
    assert torch.__version__ in report
    for line in (
        "built with: ",
        "CPU: ",
        "threads: ",
        "GPUs",
        "backends:",
        "native on cpu: ",
        "aten on cpu: available",
    ):
        assert line in report


def test_doctor_says_why_the_library_is_missing_and_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "convext._C", None)
    report = doctor.report()
    assert "does not load" in report and "pip install ." in report


def test_doctor_names_what_an_uninstallation_leaves(monkeypatch, tmp_path):
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    lines = doctor.report().splitlines()
    assert f"  Triton's compiled kernels: {tmp_path}/.triton/cache (not there)" in lines
    assert f"  weights for the demo and the benchmarks: {tmp_path}/hub/checkpoints" in lines
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    assert f"  Triton's compiled kernels: {tmp_path}/other (not there)" in doctor.report().splitlines()


def test_dry_run_asks_for_every_layer_pass_and_dtype(capsys):
    status = cli.main(["report", "--model", "resnet18", "--device", "cuda", "--dry-run"])
    printed = capsys.readouterr().out
    for dtype in DType:
        assert dtype.name.lower() in printed
    assert "7×7 /2" in printed
    assert (status == 0) == ("all served" in printed)


def test_dry_run_counts_what_nobody_serves():
    problem = ConvProblem(1, 8, 4, 4, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    served = [dry_run.kernel(problem, pass_)[0] for pass_ in Pass]
    grid, reasons = dry_run.table({problem: 2}, "cpu", [DType.FLOAT32])
    assert sum(reasons.values()) == served.count(None)
    assert grid.rows[0][:2] == [problems.title(problem), "2"]


def test_dry_run_says_once_why_nobody_serves(monkeypatch, capsys):
    from convext.backends import native_cuda

    monkeypatch.setattr(native_cuda, "not_built", lambda: "the library is on holiday")
    assert cli.main(["report", "--model", "resnet18", "--device", "cuda", "--dry-run"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("on holiday") == 1 and " none " in printed
    entries = 3 * 4 * len([line for line in printed.splitlines() if "float32" in line])
    assert f"resnet18 on cuda: {entries} entries have no compiled kernel: the library is on holiday" in printed


def test_report_prints_a_line_for_a_layer(capsys):
    assert cli.main(["report", "--model", "resnet18"]) == 0
    assert "layer1.0.conv1" in capsys.readouterr().out


def test_verify_compares(capsys):
    assert cli.main(["verify", "--model", "resnet18", "--batch", "1", "--threads", "1"]) == 0
    assert capsys.readouterr().out.strip()


def test_json_has_machine_and_results(tmp_path, capsys):
    path = tmp_path / "figures.json"
    line = f"bench model resnet18 --batch 1 --threads 1 --seconds 0 --markdown --json {path}"
    assert cli.main(line.split()) == 0
    assert "| resnet18 | 1 | 1 |" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert {"cpu", "cores", "versions", "commit"} <= written["machine"].keys()
    assert written["results"][0]["candidates"]["convext"]["median_s"] > 0


@pytest.mark.parametrize("option", ["--output-pool", "--no-output-pool"])
def test_results_say_whether_the_output_pool_was_on(option, tmp_path, capsys):
    path, limit = tmp_path / "figures.json", convext.output_pool.limit()
    assert cli.main(f"bench model resnet18 --batch 1 --threads 1 --seconds 0 {option} --json {path}".split()) == 0
    assert json.loads(path.read_text())["machine"]["output_pool"] == (limit if option == "--output-pool" else 0)
    assert convext.output_pool.limit() == limit


def test_json_that_cannot_be_written_is_named_before_anything_is_timed(tmp_path, capsys):
    assert cli.main(f"bench model resnet18 --json {tmp_path}/nowhere/figures.json".split()) == 2
    assert "--json" in capsys.readouterr().err


def test_bench_host_says_what_a_call_costs(tmp_path, capsys):
    path = tmp_path / "host.json"
    assert cli.main(["bench", "host", "--seconds", "0", "--threads", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["results"]
    assert {one["what"] for one in found} == {*host.calls()}
    out = capsys.readouterr().out
    for one in found:
        assert one["pytorch"]["seconds"] > 0 and one["convext"]["seconds"] > 0 and one["what"] in out
    assert cli.main(["bench", "host", "--dry-run"]) == 2 and "--device" in capsys.readouterr().err
    slow = Timing((2e-6, 2e-6)), Timing((3e-6, 3e-6))
    assert host.summary([host.Cost("slow", *slow)]) == "Above 1.15 times PyTorch's: slow"
    assert "No call" in host.summary([host.Cost("fast", slow[1], slow[0])])


def test_bench_shapes_says_how_good_the_choice_is(tmp_path, capsys):
    path = tmp_path / "shapes.json"
    assert cli.main(["bench", "shapes", "6", "--seconds", "0", "--threads", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "6 problems; the cost model's choice is within 10 % of the best in" in printed
    assert "tuned: " in printed and "times as fast as ATen in geometric mean" in printed
    found = json.loads(path.read_text())
    assert len(found["results"]) == 6 and found["machine"]["seed"] == 0 and found["machine"]["threads"] == 1
    assert list(shapes.draw(6)) == list(shapes.draw(6)) != list(shapes.draw(6, seed=1))
    assert all(one["by the cost model"] in one["seconds"] for one in found["results"])


def test_tune_reads_shape_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CONVEXT_CACHE", str(tmp_path / "cache"))
    tuned.forget()
    file = tmp_path / "shapes.txt"
    file.write_text(
        "3: x 1x8x10x10, w 16x8x3x3, padding 1\n"
        "1: x 2x8x32, w 16x8x3  # a row\n"
        "1: transposed x 1x8x9x9, w 8x4x3x3, stride 2\n"
    )
    arguments = ["tune", str(file), "--seconds", "0", "--threads", "1"]
    assert cli.main(arguments) == 0
    assert "3 measured, 0 known before" in capsys.readouterr().out
    keys = [*tuned.of("cpu").choices]
    assert [key.split()[:4] for key in keys] == [
        ["fprop", "1", "8", "10"], ["fprop", "2", "8", "1"], ["dgrad", "1", "4", "19"],
    ]  # fmt: skip
    assert cli.main([*arguments, "--train"]) == 0
    assert "6 measured, 3 known before" in capsys.readouterr().out
    assert cli.main([*arguments, "--batch", "4", "--memory-format", "channels-last"]) == 0
    assert any(key.startswith("fprop 4 8 10 10 16") and "NHWC NHWC" in key for key in tuned.of("cpu").choices)
    file.write_text("x 1x8x10x10\n")
    assert cli.main(arguments) == 2
    assert f"FILE: got '{file}:1', expected a line of a shape file" in capsys.readouterr().err
    tuned.forget()


def test_tune_stops_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CONVEXT_CACHE", str(tmp_path / "cache"))
    tuned.forget()
    module = sys.modules["convext.tune.tuner"]
    real, count = module.measure, []

    def interrupted(*arguments, **how):
        count.append(1)
        if len(count) == 12:
            raise KeyboardInterrupt
        return real(*arguments, **how)

    monkeypatch.setattr(module, "measure", interrupted)
    arguments = ["tune", "resnet18", "--seconds", "0", "--threads", "1"]
    assert cli.main(arguments) == 130
    assert "stopped; what was measured is kept" in capsys.readouterr().err
    tuned.forget()
    assert cli.main(arguments) == 0
    assert ", 11 known before" in capsys.readouterr().out
    tuned.forget()


def test_tune_and_explain(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CONVEXT_CACHE", str(tmp_path / "cache"))
    tuned.forget()
    assert cli.main(["tune", "resnet18", "--seconds", "0", "--threads", "1"]) == 0
    first = capsys.readouterr().out
    assert "measured, 0 known before" in first and str(tmp_path) in first
    assert cli.main(["tune", "resnet18", "--threads", "1", "--export", str(tmp_path / "choices.json")]) == 0
    second = capsys.readouterr().out
    assert "0 measured" in second and "choices written to" in second
    assert cli.main(["explain", "resnet18", "layer1.0.conv1", "--threads", "1"]) == 0
    assert "it was measured to be the fastest on this machine" in capsys.readouterr().out
    monkeypatch.setenv("CONVEXT_CACHE", str(tmp_path / "another"))
    tuned.forget()
    assert cli.main(["tune", "--import", str(tmp_path / "choices.json")]) == 0
    assert f"kept in {tmp_path / 'another'}" in capsys.readouterr().out
    assert len(tuned.of("cpu").choices) > 20
    tuned.forget()
    convext.backends.forget()
