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


def test_files_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"```\n(trainables/.*?)```", text, flags=re.DOTALL)
    assert tree
    folder = ""
    for line in filter(None, tree.group(1).splitlines()):
        name = line.split()[0]
        inside = line.startswith(" ")
        folder = folder if inside else name
        path = folder + name if inside else name
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
        assert (ROOT / link).exists(), link
