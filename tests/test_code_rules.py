"""The rules of CONTRIBUTING.md that a machine can check: sizes, layers, docstrings, light imports, two rules
of the GPU.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_distill
from mlx_distill.tasks.task import load_task

PACKAGE = Path(mlx_distill.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "assets" not in p.relative_to(PACKAGE).parts)
MAX_LINES = 500
MAX_FUNCTION_LINES = 60
NAMES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in MODULES
    if path != PACKAGE / "__init__.py"
}


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_modules_fit_on_a_few_screens() -> None:
    lines = {_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


@pytest.mark.slow
def test_functions_fit_on_a_screen() -> None:
    """Of a function's lines its docstring does not count."""
    long = {}
    for path in MODULES:
        for node in ast.walk(_syntax(path)):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node) is not None
                first = node.body[0]
                lines = (
                    (node.end_lineno or 0)
                    - node.lineno
                    + 1
                    - ((first.end_lineno or 0) - first.lineno + 1 if documented else 0)
                )
                if lines > MAX_FUNCTION_LINES:
                    long[f"{_name(path)}: {node.name}"] = lines
    assert long == {}


def test_library_code_hard_codes_no_label() -> None:
    """A task's labels stand in its YAML file; no string of the library spells one of the packaged tasks'."""
    labels = {label for name in ("music", "moderation") for label in load_task(name).labels}
    assert {"RECOMMENDED", "hostile"} <= labels
    offences = []
    for path in MODULES:
        for node in ast.walk(_syntax(path)):
            if isinstance(node, ast.Constant) and node.value in labels:
                offences.append(f"{_name(path)}:{node.lineno}: {node.value!r}")
    assert offences == []


def _imports(path: Path) -> set[str]:
    """Modules of the package that a module imports, inside functions too, but not for type checkers alone."""
    out = set()
    tree = _syntax(path)
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in hidden:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                out.add(full if full in NAMES else node.module)
    return out & NAMES.keys()


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    todo = {name: _imports(path) - {name} for name, path in NAMES.items()}
    while leaves := [name for name, needs in todo.items() if not needs & todo.keys()]:
        for name in leaves:
            del todo[name]
    assert sorted(todo) == []


def test_import_is_light() -> None:
    heavy = (
        "mlx.core",
        "mlx_lm",
        "transformers",
        "datasets",
        "numpy",
        "jsonschema",
        "yaml",
        "rich",
        "torch",
        "click",
    )
    code = f"import sys, mlx_distill; print([name for name in {heavy!r} if name in sys.modules])"
    assert _run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_help_needs_no_heavy_import() -> None:
    heavy = ("mlx.core", "mlx_lm", "transformers", "datasets", "numpy", "jsonschema", "torch")
    code = (
        "import sys; from mlx_distill.cli import cli; cli(['--help'], standalone_mode=False);"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    result = _run(sys.executable, "-c", code)
    assert "mlx-distill demo" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac needs no other BLAS")
def test_the_fast_blas_is_loaded_before_mlx() -> None:
    code = (
        "import sys, mlx_distill; from mlx_distill import runtime;"
        "print('mlx.core' in sys.modules, runtime.load_blas().state in ('loaded', 'missing', 'disabled'))"
    )
    assert _run(sys.executable, "-c", code).stdout.split() == ["False", "True"]


def test_imports_go_down_the_layers() -> None:
    tool = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    if not (ROOT / "pyproject.toml").is_file() or tool is None:
        pytest.fail("the layers are checked from a checkout with the test extra installed")
    result = _run(tool, "--no-logo", cwd=ROOT)
    assert result.returncode == 0, result.stdout


def test_every_package_stands_in_the_contract() -> None:
    """A new package that no contract names would be free to import anything."""
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.importlinter]")[1]
    packages = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    missing = {package for package in packages - {"__init__"} if not re.search(rf"\b{package}\b", contract)}
    assert not missing


@pytest.mark.parametrize("name", mlx_distill.__all__)
def test_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(mlx_distill, name)
    assert name.startswith("__") or (value.__doc__ and value.__doc__.strip())


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        mlx_distill.lode  # noqa: B018
    assert "load" in dir(mlx_distill)


def _syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_public_definitions_are_documented_and_typed() -> None:
    offences = []
    for path in MODULES:
        for node in _syntax(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                offences += [f"{_name(path)}: {node.name} has no docstring"] * (not ast.get_docstring(node))
            if isinstance(node, ast.FunctionDef):
                offences += [f"{_name(path)}: {node.name} has no return type"] * (node.returns is None)
    assert offences == []


@pytest.mark.slow
def test_linear_algebra_names_the_cpu_stream() -> None:
    """On Metal, ``mx.linalg`` (but for ``norm``) runs on the CPU stream only; a call without it fails there
    and nowhere else.
    """
    offences = []
    for path in MODULES:
        for call in (node for node in ast.walk(_syntax(path)) if isinstance(node, ast.Call)):
            function = ast.unparse(call.func)
            if re.match(r"(mx|mlx\.core|core)\.linalg\.(?!norm$|cross$)", function):
                streams = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "stream"]
                offences += [f"{_name(path)}:{call.lineno}: {function}"] * (streams != ["mx.cpu"])
    assert offences == []


def test_a_call_off_the_cpu_stream_is_caught_in_every_test() -> None:
    """The fixture behind every test really intercepts, and only the package's own calls."""
    ours: dict[str, Any] = {"__name__": "mlx_distill.imagined", "mx": mx}
    exec("def factor(**options): return mx.linalg.qr(mx.eye(2), **options)", ours)
    with pytest.raises(
        AssertionError, match=r"mlx_distill\.imagined calls mx\.linalg\.qr without stream=mx\.cpu"
    ):
        ours["factor"]()
    assert ours["factor"](stream=mx.cpu)[0].shape == (2, 2)
    assert mx.linalg.norm(mx.ones(4)).item() == 2.0


def test_linear_algebra_is_called_by_its_full_name() -> None:
    """An alias (``from mlx.core import linalg``) would hide a call from the test above."""
    pattern = re.compile(
        r"from mlx\.core(\.linalg)? import|import mlx\.core\.linalg|= *mx\.linalg\s*$", re.MULTILINE
    )
    assert [_name(path) for path in MODULES if pattern.search(path.read_text(encoding="utf-8"))] == []


def test_double_precision_stays_on_the_cpu() -> None:
    """``float64`` does not exist on the GPU: a line that asks mlx for it says ``mx.cpu``."""
    offences = []
    for path in MODULES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            offences += [f"{_name(path)}:{number}"] * ("mx.float64" in line and "mx.cpu" not in line)
    assert offences == []


def test_no_machine_paths_or_registry_hosts_in_the_tree() -> None:
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".sh", ".ipynb", ".html", ".jinja"}
    folders = [
        d
        for d in ("mlx_distill", "tests", "examples", "benchmarks", "scripts", "docs", ".ci")
        if (ROOT / d).is_dir()
    ]
    files = [
        p for d in folders for p in (ROOT / d).rglob("*") if p.suffix in suffixes or p.parent.name == ".ci"
    ]
    files += [p for p in ROOT.iterdir() if p.is_file() and (p.suffix in suffixes or p.name == "Makefile")]
    pattern = re.compile(r"/wo" + r"rk/|/ro" + r"ot/|/ho" + r"me/[a-z]|/Us" + r"ers/[a-z]")
    for path in (p for p in files if p.is_file()):
        found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{path.relative_to(ROOT)} names a path of one machine: {found.group()}"


def test_public_names_import_their_modules() -> None:
    for target in mlx_distill._NAMES.values():
        module, _, attribute = target.partition(":")
        assert not attribute or hasattr(import_module(f"mlx_distill.{module}"), attribute)


@pytest.mark.skipif("UNCHECKED_SHAPES" in os.environ, reason="as asked")
def test_a_call_with_another_shape_is_an_error_in_every_test() -> None:
    from jaxtyping import TypeCheckError

    from mlx_distill.infer.sampling import choose

    assert choose(mx.zeros((1, 3)), [0.0], [0.0]).tolist() == [0]
    with pytest.raises(TypeCheckError):
        choose(mx.zeros((3,)), [0.0], [0.0])


@pytest.mark.skipif("UNCHECKED_SHAPES" in os.environ, reason="as asked")
def test_every_function_and_dataclass_with_a_shape_is_checked() -> None:
    from helpers.shape_checker import has_shapes

    checked, unchecked = 0, []
    for name, path in NAMES.items():
        if "\nfrom jaxtyping import " not in path.read_text(encoding="utf-8"):
            continue
        module = import_module(name)
        for made in vars(module).values():
            if getattr(made, "__module__", "") != name:
                continue
            found = [made, *vars(made).values()] if isinstance(made, type) else [made]
            if hasattr(made, "_fields"):  # of named tuples jaxtyping checks nothing
                continue
            for function in (getattr(f, "__func__", getattr(f, "fget", f)) for f in found):
                annotations = getattr(function, "__annotations__", {}) if callable(function) else {}
                if isinstance(function, type) or not has_shapes(annotations.values(), vars(module)):
                    continue
                checked += hasattr(function, "__wrapped__")
                if not hasattr(function, "__wrapped__"):
                    unchecked.append(f"{name}.{function.__qualname__}")
    assert unchecked == [] and checked > 180
