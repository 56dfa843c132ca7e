"""What must hold for the whole tree: imports, README, cluster.yaml, public names."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("trainables", "explain", "analysis", "study")


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_there_and_documented(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name).__doc__, name


@pytest.mark.parametrize("package", ["trainables", "explain", "analysis"])
def test_plain_sessions_need_no_ray(package: str) -> None:
    """Training, explaining and analysing work where Ray is not installed."""
    code = f"import sys; sys.modules['ray'] = None; import {package}; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_explain_imports_nothing_of_the_project() -> None:
    for file in (ROOT / "explain").glob("*.py"):
        if file.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"trainables", "analysis", "study"}, file


def test_the_readme_names_every_module_and_nothing_else() -> None:
    tree = re.search(r"```\n(trainables/.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert tree
    folder, named = "", set()
    for line in filter(None, tree.group(1).splitlines()):
        name = line.split()[0]
        inside = line.startswith(" ")
        folder = folder if inside else name
        named.add(folder + name if inside else name)
    for path in named:
        assert (ROOT / path).exists(), path
    modules = {f"{package}/{file.name}" for package in PACKAGES for file in (ROOT / package).glob("*.py")}
    assert {path for path in modules if not path.endswith("__init__.py")} == {n for n in named if n.endswith(".py")}


def test_what_the_readme_imports_is_there() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    for node in ast.walk(ast.parse("\n".join(blocks))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert {alias.name for alias in node.names} <= set(module.__all__)


@pytest.mark.parametrize(
    "name", ["README.md", "benchmarks/README.md", "results/README.md", "results/cifar100/README.md"]
)
def test_links_lead_somewhere(name: str) -> None:
    """To files that exist, and to headings of these, by the anchors that GitHub gives them."""
    for link in re.findall(r"(?:\]\(|src=\")(?!http)([^)\"]+)", (ROOT / name).read_text()):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, link
