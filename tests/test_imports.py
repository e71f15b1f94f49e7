import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rankprune

ROOT = Path(rankprune.__file__).parent

# Each imports only from what stands before it. "" is the package itself, which gives the public names.
ORDER = [
    "version",
    "errors",
    "columns",
    "files",
    "inputs",
    "machine",
    "precision",
    "wrappers",
    "schemes",
    "spectrum",
    "linalg",
    "distributed",
    "passes",
    "layers",
    "state_dicts",
    "cost",
    "replacement",
    "backends",
    "timing",
    "stopwatch",
    "optimizer_step",
    "calibration",
    "latency",
    "rules",
    "schedule",
    "plan",
    "survey",
    "factorizer",
    "planner",
    "projection",
    "iteration",
    "decompose",
    "trp",
    "checkpoint",
    "export",
    "comparison",
    "",
    "integrations",
    "recipes",
    "report",
    "cli",
    "__main__",
]
# Each is imported in one file, so that one message can say how to install it; typer in one folder.
OPTIONAL = [
    *("typer", "rich", "matplotlib", "sklearn", "pyarrow", "PIL", "onnxruntime", "onnx", "onnxscript"),
    *("openvino", "executorch", "lightning", "transformers", "accelerate", "huggingface_hub"),
    *("datasets", "timm", "torchvision"),
]


def sources() -> dict[str, str]:
    """The text of every file by its path within the package."""
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.rglob("*.py")}


def concept(path: str) -> str:
    """The module or sub-package directly under the root that a file belongs to."""
    return path.split("/")[0].removesuffix(".py").replace("__init__", "")


def imported(source: str, package: list[str]) -> set[str]:
    """The full names of all modules a file imports, at its top or later; relative ones are from `package`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def violations(files: dict[str, str]) -> list[str]:
    """Imports that go to the right in ORDER, and concepts that have no place in it."""
    found = [f"{concept(path)!r} is not in ORDER" for path in files if concept(path) not in ORDER]
    known = {concept(path) for path in files}
    for path, source in files.items():
        package = ["rankprune", *path.split("/")[:-1]]
        for name in imported(source, package):
            root, _, rest = name.partition(".")
            target = rest.split(".")[0] if rest.split(".")[0] in known else ""
            if root != "rankprune" or concept(path) not in ORDER or target == concept(path):
                continue
            if ORDER.index(target) > ORDER.index(concept(path)):
                found.append(f"{path} imports {name}")
    return found


def importers(package: str, files: dict[str, str]) -> list[str]:
    return [path for path, source in files.items() if any(n.split(".")[0] == package for n in imported(source, ["rankprune"]))]


def test_nothing_imports_to_its_right() -> None:
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("linalg.py", "from rankprune.plan import Plan"),
        ("linalg.py", "import rankprune.plan"),
        ("linalg.py", "from rankprune import plan"),
        ("linalg.py", "from rankprune import Plan"),
        ("linalg.py", "from .plan import Plan"),
        ("linalg.py", "from . import plan"),
        ("linalg.py", "def late():\n    from rankprune import plan"),
        ("linalg.py", "import rankprune"),
        ("schemes/base.py", "from ..plan import Plan"),
        ("schemes/base.py", "from rankprune.linalg import project"),
        ("report/figures.py", "from rankprune.cli import main"),
        ("helpers.py", ""),
    ],
)
def test_the_order_check_sees(path: str, line: str) -> None:
    files = {"linalg.py": "", "plan.py": "", "schemes/base.py": "", "cli/__init__.py": "", "__init__.py": ""}
    assert violations(files) == []
    assert len(violations(files | {path: line})) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("plan.py", "from rankprune import linalg\nfrom rankprune.linalg import project"),
        ("schemes/base.py", "from rankprune.schemes.linear import Linear\nfrom .linear import Linear"),
        ("plan.py", "import torch.linalg\nfrom torch import cli"),
        ("recipes/experiment.py", "import rankprune\nfrom rankprune import TRP"),
    ],
)
def test_the_order_check_lets_pass(path: str, line: str) -> None:
    assert violations({"linalg.py": "", "plan.py": "", "cli/__init__.py": "", path: line}) == []


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_package_is_imported_in_one_file(package: str) -> None:
    files = importers(package, sources())
    if not files:
        pytest.skip("nothing imports it")
    assert len(files) == 1 or (package == "typer" and all(path.startswith("cli/") for path in files))


def test_the_optional_check_sees_late_imports() -> None:
    files = {"a.py": "import PIL.Image", "b.py": "def f():\n    from PIL import Image", "c.py": "import pillow"}
    assert importers("PIL", files) == ["a.py", "b.py"]


def test_the_package_itself_needs_only_torch_and_safetensors() -> None:
    third_party = [path for path in sources() if concept(path) in ORDER[: ORDER.index("") + 1]]
    allowed = {"rankprune", "torch", "safetensors", *OPTIONAL, *sys.stdlib_module_names}
    for path in third_party:
        assert {n.split(".")[0] for n in imported(sources()[path], ["rankprune"])} <= allowed, path


def loaded_by(statement: str) -> set[str]:
    """The packages that are loaded in a fresh interpreter after `statement`, beyond those that torch loads."""
    code = f"import sys, torch, safetensors.torch\nb = set(sys.modules)\n{statement}\nprint(*set(sys.modules) - b)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return {name.split(".")[0] for name in run.stdout.split()}


def test_import_rankprune_loads_no_optional_package() -> None:
    loaded = loaded_by("import rankprune")
    assert "rankprune" in loaded
    assert not loaded & {*OPTIONAL, "numpy", "scipy"}


def test_the_subprocess_sees_what_is_loaded() -> None:
    assert "rich" in loaded_by("import rich.table")


# -- one call site ----------------------------------------------------------------------------------------------------

FACTORIZATION = re.compile(r"\btorch\.linalg\b|\.(svd|svd_lowrank|pca_lowrank|qr|pinverse|lobpcg)$")


def factorizations(source: str) -> list[str]:
    """What a file uses of PyTorch's factorisations, however it imports them."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if FACTORIZATION.search(name)]


def test_torch_linalg_is_used_in_one_file() -> None:
    uses = {str(path.relative_to(ROOT)): factorizations(path.read_text()) for path in ROOT.rglob("*.py")}
    assert [name for name, found in uses.items() if found] == ["linalg.py"]


@pytest.mark.parametrize(
    "line",
    [
        "torch.linalg.eigh(a)",
        "import torch.linalg as la",
        "from torch import linalg",
        "from torch.linalg import svd",
        "torch.svd(a)",
        "u = a.svd()",
        "torch.pca_lowrank(a)",
        "lambda a: torch.linalg.svd(a)[1]",
    ],
)
def test_the_scan_sees(line: str) -> None:
    assert factorizations(line)


@pytest.mark.parametrize("line", ["from rankprune import linalg", "linalg.bases(a, b)", "torch.nn.Linear(2, 2)"])
def test_the_scan_lets_pass(line: str) -> None:
    assert not factorizations(line)


def test_the_map_for_contributors_has_every_module() -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    told = set(re.findall(r"`(\w+)(?:/|\.py)`", text))
    assert {name for name in ORDER if name} - told == {"version", "__main__"}
