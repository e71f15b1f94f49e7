import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import own_clock
import rankprune as rp
from command_line import invoke
from rankprune.backends.onnxruntime import OnnxRuntime
from rankprune.backends.pytorch import Eager
from rankprune.cli import demo, main
from rankprune.cli.target import example_input
from rankprune.recipes.experiment import Experiment, TrpConfig
from rankprune.recipes.resnet import resnet, resnet20
from rankprune.recipes.schedule import TrainConfig

MODEL = ["--model", "rankprune.recipes.resnet:resnet20"]
INPUT = ["--input", "1,3,32,32"]
RELU = ["--model", "torch.nn:ReLU", "--input", "1,4"]
LATENCY = ["bench", "latency", *MODEL, *INPUT]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Weights as a user has them: under DataParallel, nested, and of low rank so that decomposing them loses nothing."""
    model = resnet20()
    rp.project(model, rp.make_plan(model, torch.zeros(1, 3, 32, 32), scheme="spatial", rule=rp.RankFraction(0.25)))
    model.linear.bias.data[1] = 1e3
    path = tmp_path / "weights.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of 32x32 pictures, eight of each in train and test."""
    for split in ("train", "test"):
        for label, shade in (("dark", 40), ("light", 200)):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (32, 32), (shade, shade + i, shade)).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_plan_decompose_evaluate_count_export_a_users_own_model(tmp_path, checkpoint, images):
    weights = ["--checkpoint", str(checkpoint)]
    plan = tmp_path / "plan.json"
    choice = ["--scheme", "spatial", "--rule", "RankFraction(fraction=0.25)"]
    shown = invoke("plan", *MODEL, *weights, *INPUT, *choice, "--out", str(plan))
    assert "layer3.2.conv2" in shown
    assert "stays dense" in shown
    made = rp.Plan.load(plan)
    assert made.ranks["layer1.0.conv1"] == 12
    assert made.ranks["layer3.2.conv2"] == 48

    out = tmp_path / "small"
    invoke("decompose", *MODEL, *weights, "--plan", str(plan), "--out", str(out))
    small = rp.load(out, resnet20()).eval()
    dense = resnet20()
    dense.load_state_dict({k.removeprefix("module."): v for k, v in torch.load(checkpoint)["state_dict"].items()})
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(small(x), dense.eval()(x), rtol=1e-3, atol=1e-4)

    accuracies = [
        re.search(r"top-1 ([\d.]+) % of 16 images", invoke("evaluate", *MODEL, *which, "--data", str(images)))
        for which in (weights, ["--artefact", str(out)])
    ]
    assert [found and found[1] for found in accuracies] == ["50.00", "50.00"], "all are taken for the second class"

    assert f"MACs {made.macs:,}" in invoke("count", *MODEL, "--artefact", str(out), *INPUT, "--time")
    assert "largest difference from PyTorch" in invoke(
        "export", *MODEL, "--artefact", str(out), *INPUT, "--out", str(out / "s.onnx")
    )
    (found,) = OnnxRuntime().read(out / "s.onnx", x)(x)  # two images, not one
    torch.testing.assert_close(found, small(x), rtol=1e-3, atol=1e-4)

    invoke("export", *MODEL, *weights, *INPUT, "--out", str(out / "d.onnx"))
    (found,) = OnnxRuntime().read(out / "d.onnx", x)(x)
    torch.testing.assert_close(found, dense(x), rtol=1e-3, atol=1e-4)
    invoke("plan", *MODEL, *weights, *INPUT, "--scheme", "spatial", "--rule", "Energy(keep=0.9)", "--out", str(plan))
    assert rp.Plan.load(plan).ranks == rp.make_plan(dense, x[:1], scheme="spatial", rule=rp.Energy(0.9)).ranks


@pytest.mark.parametrize(
    ("suffix", "package", "files"),
    [
        (".xml", "openvino", {"small.xml", "small.bin"}),
        pytest.param(".pt2", "torch", {"small.pt2"}, marks=pytest.mark.slow),
        pytest.param(".pte", "executorch", {"small.pte"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")  # the exporters' own
def test_export_chooses_the_runtime_by_the_suffix(suffix, package, files, tmp_path):
    pytest.importorskip(package)
    assert "largest difference from PyTorch 0.0e+00" in invoke("export", *RELU, "--out", str(tmp_path / f"small{suffix}"))
    assert {f.name for f in tmp_path.iterdir()} == files


def test_layers_and_ranks_are_chosen_by_options(tmp_path):
    choice = ["--include", "layer3.*.conv2", "--exclude", "layer3.1.*", "--round-to", "4", "--scheme", "spatial"]
    invoke("plan", *MODEL, *INPUT, *choice, "--rule", "FixedRank(5)", "--out", str(tmp_path / "plan.json"))
    assert rp.Plan.load(tmp_path / "plan.json").ranks == {"layer3.0.conv2": 8, "layer3.2.conv2": 8}
    invoke("decompose", *MODEL, *INPUT, *choice, "--rule", "FixedRank(5)", "--out", str(tmp_path / "small"))
    assert rp.load_plan(tmp_path / "small").ranks == rp.Plan.load(tmp_path / "plan.json").ranks


def test_inputs_may_be_whole_numbers(monkeypatch, tmp_path):
    lines = ["from torch import nn", "def build():", "    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))"]
    (tmp_path / "tokens.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    assert "MACs 64" in invoke("count", "--model", "tokens:build", "--input", "int:1,8")


def test_a_closed_batch_takes_one_size_only(tmp_path):
    invoke("export", *RELU, "--no-dynamic-batch", "--out", str(tmp_path / "one.onnx"))
    program = OnnxRuntime().read(tmp_path / "one.onnx", torch.zeros(1, 4))
    assert [t.shape for t in program(torch.zeros(1, 4))] == [(1, 4)]
    with pytest.raises(Exception, match="invalid dimensions"):
        program(torch.zeros(2, 4))


def test_bench_latency_times_what_it_is_given_and_shows_the_curve_of_a_layer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKPRUNE_CACHE", str(tmp_path / "cache"))
    own_clock.use(monkeypatch)  # on which a busy machine makes no noise
    own_clock.add(monkeypatch, own_clock.TimedEager())
    invoke("decompose", *MODEL, *INPUT, "--rule", "RankFraction(0.1)", "--out", "dense")  # called like the dense network's row
    quick = ["bench", "latency", *MODEL, *INPUT, "--rounds", "2", "--threads", "1"]
    backends = ["--backend", "eager", "--backend", "eager"]
    which = ["--layer", "layer1.0.conv1", "--scheme", "channel"]
    shown = invoke(*quick, *backends, "--artefact", "dense", *which, "--plot", "curve.svg", "--out", "out.json")
    assert "layer1.0.conv1 of resnet20, eager, in parts of the dense layer" in " ".join(shown.split())
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    result = json.loads((tmp_path / "out.json").read_text())
    assert {point["scheme"] for point in result["curve"]} == {"channel"}
    assert all(f"{point['macs']:.2f}" in shown for point in result["curve"])
    dense, small = result["rows"]
    assert (dense["network"], small["network"]) == ("dense", "artefact dense")
    assert small["macs"] < 0.5 * dense["macs"]
    assert dense["speedup"] == dense["macs_speedup"] == 1


def test_bench_latency_predicts_only_what_it_measures(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKPRUNE_CACHE", str(tmp_path / "cache"))
    own_clock.use(monkeypatch)
    load_each = Eager.load_each

    def timed(self, models, x):
        programs = load_each(self, models, x)
        return [own_clock.timed(p, rp.count(m, x).params / 1e6) for p, m in zip(programs, models, strict=True)]

    monkeypatch.setattr(Eager, "load_each", timed)
    rule = "Budget(latency=0.6)"
    quick = ["bench", "latency", *MODEL, *INPUT, "--rounds", "2", "--backend", "eager", "--threads", "1"]
    row = next(line for line in invoke(*quick, "--rule", rule).splitlines() if rule in line)
    assert len(re.findall(r"[\d.]+x", row)) == 3  # faster, predicted, fewer MACs
    elsewhere = "Budget(latency=0.6, threads=2)"
    shown = invoke(*quick, "--rule", elsewhere)
    row = next(line for line in shown.splitlines() if elsewhere in line)
    assert len(re.findall(r"[\d.]+x", row)) == 2
    assert "in eager with 2 threads, which is not measured here" in shown


def test_train_goes_through_to_an_artefact_and_continues_when_called_again(tmp_path, images):
    out = tmp_path / "run"
    command = [
        "train",
        "--data",
        str(images),
        "--epochs",
        "1",
        "--batch",
        "8",
        "--every",
        "1",
        "--no-compile",
        "--out",
        str(out),
    ]
    assert "decomposed" in invoke(*command)
    first = json.loads((out / "result.json").read_text())
    assert first["macs_dense"] / first["macs"] > 2.19
    small = rp.load(out / "artefact", resnet("resnet20", classes=2))
    assert rp.count(small, torch.zeros(1, 3, 32, 32)).macs == first["macs"]
    invoke(*command)
    second = json.loads((out / "result.json").read_text())
    assert second["log"] == first["log"]
    assert second["top1"] == first["top1"]


def test_demo_prints_its_table_and_writes_everything_it_names(tmp_path, monkeypatch):
    shown = []
    demonstrate = demo.demonstrate
    monkeypatch.setattr(demo, "demonstrate", lambda **given: shown.append(demonstrate(**given)) or shown[0])
    output = invoke("demo", "--epochs", "2", "--out", str(tmp_path / "demo"))
    assert "TRP, decomposed" in output
    dense, plain, projected, small = shown[0].rows
    assert [step for step, _ in shown[0].history][:2] == [10, 20], "while it trains"
    assert plain.macs <= 0.3 * dense.macs == 0.3 * projected.macs
    assert plain.macs == pytest.approx(small.macs, rel=0.03)
    assert projected.top1 == small.top1
    assert {p.name for p in (tmp_path / "demo").iterdir()} == {"artefact", "plan.json", "spectra.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--model", "nonsense", *INPUT], "package.module:callable"),
        (["plan", "--model", "no.such.module:f", *INPUT], "cannot import"),
        (["plan", "--model", "rankprune.recipes.resnet:resnet7", *INPUT], "has no 'resnet7'"),
        (["plan", *MODEL, "--input", "1,3,x"], "shape of one batch"),
        (["plan", *MODEL, "--input", "1,5,32,32"], "does not run on --input 1,5,32,32"),
        (["plan", "--model", "math:sqrt", *INPUT], "called without arguments"),
        (["plan", "--model", "math:pi", *INPUT], "called without arguments"),
        (["plan", "--model", ":net", *INPUT], "package.module:callable"),
        (["plan", *MODEL, *INPUT, "--out", "/no/such/folder/plan.json"], "there is no folder"),
        (["train", "--data", "/no/such", "--precision", "bf16"], "precision='bf16'"),
        (["train", "--size", "64"], "--size would do nothing: resnet20 is for small images"),
        (["train", "--method", "dense", "--ramp", "0.1"], "--ramp would do nothing: --method dense decomposes nothing"),
        (["train", "--method", "decompose", "--every", "5"], "--every would do nothing: --method decompose trains without TRP"),
        (["plan", *MODEL, *INPUT, "--rule", "Energy(keep=2)"], "keep=2"),
        (["plan", *MODEL, *INPUT, "--rule", "print(1)"], "cannot read the rule"),
        (["plan", *MODEL, *INPUT, "--exclude", "nothing*"], "'nothing*' matches no layer"),
        (["export", *MODEL, *INPUT, "--out", "x.pt"], "end it in one of .onnx, .xml, .pt2, .pte"),
        (["export", *RELU, "--out", "x.onnx", "--tolerance=-1"], "differs from the model by"),
        (["export", *MODEL, *INPUT, "--out", "/no/such/folder/x.onnx"], "there is no folder"),
        (["export", *MODEL, "--input", "1,5,32,32", "--out", "x.onnx"], "does not run on --input 1,5,32,32"),
        (
            ["train", "--method", "decompose", "--epochs", "5", "--lr", "1"],
            "--epochs and --lr would do nothing: --method decompose trains nothing",
        ),
        (["train", "--method", "decompose", "--seed", "3"], "--seed would do nothing: --method decompose trains nothing"),
        (["report", "--each", "--html", "x.html"], "--each would do nothing: no tables are printed"),
        (["train", "--time-batch", "8"], "--time-batch would do nothing: nothing goes by latency"),
        (["decompose", *MODEL, "--plan", "p", "--out", "o", "--rule", "FixedRank(3)"], "--rule would do nothing: --plan says"),
        (["decompose", *MODEL, "--plan", "p", "--out", "o", *INPUT], "--input would do nothing: --plan says"),
        (["decompose", *MODEL, "--out", "o"], "give the shape of one batch, like --input 1,3,224,224"),
        ([*LATENCY, "--rule", "Budget(latency=0.5)", "--rule", "Budget(mac=0.5)"], "'Budget(mac=0.5)'"),
        ([*LATENCY, "--plot", "x.svg"], "name it with --layer"),
        ([*LATENCY, "--plot", "/no/such/x.svg", "--layer", "layer9"], "there is no folder"),
        ([*LATENCY, "--plot", "x.gif", "--layer", "layer1.0.conv1"], "ends in .png or .svg"),
        ([*LATENCY, "--layer", "layer9"], "there is no layer 'layer9'"),
        ([*LATENCY, "--backend", "cuda"], "there is no backend 'cuda'"),
        ([*LATENCY, "--artefact", "small", "--scheme", "channel"], "--scheme would do nothing"),
        (["evaluate", *MODEL, "--data", "/no/such/folder"], "no 'test' images"),
        (["bench", "run", "/no/such.toml"], "cannot read the experiment"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rankprune", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_planned_for_counted_and_timed(tmp_path, checkpoint, dtype):
    state = torch.load(checkpoint)["state_dict"]
    torch.save(
        {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}, tmp_path / "w.pth"
    )
    weights = ["--checkpoint", str(tmp_path / "w.pth")]
    small = str(tmp_path / "small")
    invoke("decompose", *MODEL, *weights, *INPUT, "--rule", "RankFraction(0.1)", "--out", small)
    assert rp.load(small, resnet20()).conv1.weight.dtype == dtype
    counted = invoke("count", *MODEL, "--artefact", small, *INPUT, "--time")
    assert re.search(r"\d ms \(median of", counted)
    out = tmp_path / "out.json"
    invoke(*LATENCY, "--artefact", small, "--backend", "eager", "--rounds", "2", "--out", str(out))  # the dense one in float32
    assert len(json.loads(out.read_text())["rows"]) == 2


class Bright(torch.nn.Module):
    """Answers by whether the mean of all pixels is above a half."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([torch.full_like(mean, 0.5), mean], 1)


def test_images_are_normalised_as_asked_for(images, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    bright = ["evaluate", "--model", "test_cli:Bright", "--data", str(images)]
    assert "top-1 100.00 % of 16 images" in invoke(*bright)  # shades of 40 and 200; ImageNet's mean is about 116
    assert "top-1 50.00 %" in invoke(*bright, "--mean", "0", "0", "0")
    assert "top-1 50.00 %" in invoke(*bright, "--mean", "0.9", "0.9", "0.9")
    assert "top-1 50.00 %" in invoke(*bright, "--std", "1", "1", "1")


def test_train_hands_every_option_on(images, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("rankprune.cli.train.run", lambda e, *rest: ran.append(e))
    options = {
        **{"method": "trp+nu", "scheme": "channel", "rule": "Energy(keep=0.9)", "every": 7, "nuclear": 0.002, "ramp": 0.25},
        **{"freeze": 0.75, "epochs": 3, "batch": 4, "lr": 0.03, "weight-decay": 0.003, "seed": 5, "checkpoint-steps": 9},
        **{"holdout": 2, "precision": "float32", "model": "resnet32", "start": "timm:x"},
        **{"teacher": "run:y", "teacher-model": "resnet56", "distill": 0.6},
    }
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    invoke("train", "--data", str(images), "--out", str(tmp_path / "out"), "--no-compile", *given)
    trp = TrpConfig("Energy(keep=0.9)", "channel", every=7, nuclear=0.002, ramp=0.25, freeze=0.75)
    training = TrainConfig(
        3, 0.03, weight_decay=0.003, distill=0.6, precision="float32", compile=False, seed=5, checkpoint_steps=9
    )
    wanted = Experiment(
        "out", "trp+nu", "resnet32", "images", "timm:x", "run:y", "resnet56", batch=4, holdout=2, training=training, trp=trp
    )
    assert ran == [wanted]
    invoke("train", "--data", str(images), "--distill", "0.5", "--teacher", "run:a", "--teacher", "run:b")
    assert ran[1].teacher == ("run:a", "run:b")


def test_weights_in_half_precision_are_evaluated_as_others_are(tmp_path, checkpoint, images):
    state = torch.load(checkpoint)["state_dict"]
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pth")
    said = [invoke("evaluate", *MODEL, "--checkpoint", str(tmp_path / "half.pth"), "--data", str(images))]
    said.append(invoke("evaluate", *MODEL, "--checkpoint", str(checkpoint), "--data", str(images)))
    assert said[0] == said[1]


def test_an_error_of_several_lines_is_put_into_one(monkeypatch, capsys, tmp_path):
    (tmp_path / "raising.py").write_text("def build():\n    raise RuntimeError('one\\n  two')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rankprune", "plan", "--model", "raising:build", *INPUT])
    with pytest.raises(SystemExit):
        main()
    assert "RuntimeError: one two; it is called" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def build(:", "importing 'broken' raised SyntaxError"),
        ("import math\nmath.nothing", "importing 'broken' raised AttributeError: module 'math' has no attribute 'nothing'"),
        ("import no_such_module", "cannot import 'broken' (No module named 'no_such_module')"),
        ("", "'broken' has no 'build'"),
    ],
)
def test_a_module_that_cannot_be_imported(monkeypatch, capsys, tmp_path, code, said):
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    monkeypatch.setattr(sys, "argv", ["rankprune", "plan", "--model", "broken:build", *INPUT])
    with pytest.raises(SystemExit):
        main()
    assert said in capsys.readouterr().err


def test_the_version_is_told():
    assert invoke("--version").strip() == rp.__version__


def test_a_model_without_a_file_is_told_to_have_the_weights_of_its_builder(checkpoint):
    said = f"weights  as {MODEL[1]} makes them"
    assert said in invoke("plan", *MODEL, *INPUT)
    assert said not in invoke("plan", *MODEL, *INPUT, "--checkpoint", str(checkpoint))


def test_without_typer_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from rankprune.cli import main; main()"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: ")
    assert "pip install 'rankprune[cli]'" in outcome.stderr


def test_an_example_input_is_where_the_model_is():
    assert example_input("2,3", torch.nn.Linear(3, 1, device="meta")).is_meta
