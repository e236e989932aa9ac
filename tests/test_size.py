"""The house keeps its size: counts that only ever go down. `python tests/test_size.py` prints them.

Every count has one bar and no list of exemptions. Whoever lowers a count lowers its bar in the same change.
"""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "setpoint"

AT_MOST = {
    "wheel: lines": 30_172,
    "wheel: files": 171,
    "wheel: files under 60 lines": 5,
    "wheel: imports, share of lines in %": 7.01,
    "bench: lines": 17_427,
    "tests: lines": 32_798,
    "attach to first cut: files": 56,
    "attach to first cut: lines": 11_462,
    "training steps: files": 35,
    "training steps: lines": 7_293,
    "import setpoint: files": 74,
    "import setpoint: lines": 13_221,
    "looks at foreign code": 2,
    "hooks at import": 0,
}
AT_LEAST = {"wheel: comments, share of lines in %": 4.9}

FOREIGN = ("_getframe", "currentframe", "f_locals", "get_objects", "get_referrers", "get_referents", "meta_path")
"""Names by which code looks at frames, at the heap, or into the import system; `dis` counts as an import."""

PROFILED = """
import json, sys
from pathlib import Path
import torch
from torch import nn
import setpoint

SRC = str(Path(setpoint.__file__).resolve().parent)
ours = [module for name, module in sys.modules.items() if name.split(".")[0] == "setpoint"]
loaded = sorted({module.__file__ for module in ours if module.__file__})
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer, x = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.randn(16, 8)
seen = {"attach": set(), "steps": set()}
part = "attach"

def note(frame, event, _):
    code = frame.f_code  # a module that is imported late is executed only where one of its functions is called
    if event == "call" and code.co_filename.startswith(SRC) and code.co_name != "<module>":
        seen[part].add(code.co_filename)

sys.setprofile(note)
loop = setpoint.attach(model, optimizer, 0.5, example=(x,), total_steps=40)
part = "steps"
cut = False
for step in range(40):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if model[0].out_features < 64:
        cut = True
        break
sys.setprofile(None)
assert cut, "no cut was made"
print(json.dumps({"import": loaded, "first": sorted(seen["attach"] | seen["steps"]), "steps": sorted(seen["steps"])}))
"""


def num_lines(files: list[Path]) -> int:
    """Lines of these files, docstrings and blank lines included."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def lines_of_comments_and_imports(file: Path) -> tuple[int, int]:
    """How many lines of a file carry a comment, and how many belong to an import statement."""
    text = file.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    imported = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(commented), len(imported)


def looks_at_foreign_code(file: Path) -> list[str]:
    """Places where a file reads frames, scans the heap, disassembles code or changes how modules are imported."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr] if node.attr in FOREIGN else []
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name == "dis"]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if alias.name in FOREIGN or node.module == "dis"]
        found += [f"{file.name}:{node.lineno} {name}" for name in names if isinstance(node, ast.expr | ast.stmt)]
    return found


def hooks_at_import(file: Path) -> list[str]:
    """Calls on a module's own level that register something: hooks, exit handlers, finders."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    found = []
    todo: list[ast.AST] = list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop()
        if isinstance(node, functions):
            todo += getattr(node, "decorator_list", [])  # decorators are called at import, bodies are not
            continue
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if "hook" in name or "atexit" in name or "register_at_fork" in name or "meta_path" in name:
                found.append(f"{file.name}:{node.lineno} {name}")
        todo += ast.iter_child_nodes(node)
    return found


def profiled() -> dict[str, list[Path]]:
    """Files of the wheel that `import setpoint` loads and that a plain run executes, in a process of its own."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROFILED],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: [Path(file) for file in files if file] for name, files in found.items()}


def counts() -> dict[str, float]:
    """All that is counted, by name."""
    wheel = sources(SRC)
    total = num_lines(wheel)
    both = [lines_of_comments_and_imports(file) for file in wheel]
    small = [file for file in wheel if file.name not in ("__init__.py", "__main__.py") and num_lines([file]) < 60]
    runs = profiled()
    return {
        "wheel: lines": total,
        "wheel: files": len(wheel),
        "wheel: files under 60 lines": len(small),
        "wheel: comments, share of lines in %": round(100 * sum(comments for comments, _ in both) / total, 2),
        "wheel: imports, share of lines in %": round(100 * sum(imports for _, imports in both) / total, 2),
        "bench: lines": num_lines(sources(ROOT / "bench")),
        "tests: lines": num_lines(sources(ROOT / "tests")),
        "attach to first cut: files": len(runs["first"]),
        "attach to first cut: lines": num_lines(runs["first"]),
        "training steps: files": len(runs["steps"]),
        "training steps: lines": num_lines(runs["steps"]),
        "import setpoint: files": len(runs["import"]),
        "import setpoint: lines": num_lines(runs["import"]),
        "looks at foreign code": sum(len(looks_at_foreign_code(file)) for file in wheel),
        "hooks at import": sum(len(hooks_at_import(file)) for file in wheel),
    }


@pytest.fixture(scope="module")
def counted() -> dict[str, float]:
    return counts()


@pytest.mark.parametrize("name", AT_MOST)
def test_a_count_does_not_grow(name: str, counted: dict[str, float]) -> None:
    """Claim: no count is above its bar."""
    assert counted[name] <= AT_MOST[name], (name, counted[name])


@pytest.mark.parametrize("name", AT_LEAST)
def test_a_share_does_not_shrink(name: str, counted: dict[str, float]) -> None:
    """Claim: surprises keep their comments."""
    assert counted[name] >= AT_LEAST[name], (name, counted[name])


def main() -> None:
    """Print the counts and their bars; with `-v`, the files behind them."""
    for name, value in counts().items():
        print(f"{name:40} {value:>10,}   bar {AT_MOST.get(name, AT_LEAST.get(name)):,}")
    if "-v" in sys.argv:
        shown: dict[str, Any] = profiled()
        for name, files in shown.items():
            print(name, *(f"  {num_lines([file]):5} {file.relative_to(SRC)}" for file in files), sep="\n")
        for file in sources(SRC):
            for place in [*looks_at_foreign_code(file), *hooks_at_import(file)]:
                print(file.relative_to(SRC), place)


if __name__ == "__main__":
    main()
