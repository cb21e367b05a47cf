"""Who may import whom (read off the source with ast), and that ``import jmoe`` is light and touches no device."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jmoe
import metal_bridge
import pallas_kernels

JMOE, PALLAS, METAL = (Path(next(iter(package.__path__))) for package in (jmoe, pallas_kernels, metal_bridge))
TESTS = Path(__file__).parent
SIBLINGS = {"pallas_kernels", "metal_bridge"}

# jmoe from the bottom up: a module imports from its own row and from rows before it. What is not listed stands on top.
ROWS = (
    {"formats", "activations"},
    {"stack"},
    {"checks", "devices", "folding", "gathered", "grouping", "reference", "routing", "gguf_file", "cpu_kernels"},
    {"dispatch"},
    {"moe"},
    {"layer"},
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}


def imports(path: Path, root: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Dotted names of the modules that a file imports, absolute; a name imported from a package counts as its module.

    Without ``everywhere`` only what importing the file executes: no function bodies, no ``if TYPE_CHECKING``.
    """
    package = (root.name, *path.relative_to(root).parent.parts)
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if everywhere or not (lazy or typing_only):
            pending.extend(ast.iter_child_nodes(node))


def sources(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)


def part_of(path: Path) -> str:
    """``jmoe/formats/q4_k.py`` -> "formats", ``jmoe/moe.py`` -> "moe"."""
    return path.relative_to(JMOE).parts[0].removesuffix(".py")


def test_the_reader_of_imports_sees_every_kind(tmp_path):
    root = tmp_path / "pkg"
    (root / "sub").mkdir(parents=True)
    at_once = "import a.b\nfrom . import c\nfrom ..d import e\n"
    later = "if TYPE_CHECKING:\n    import f\ndef g():\n    from .h import i\n"
    (root / "sub" / "m.py").write_text(at_once + later)
    found = {"a.b", "pkg.sub.c", "pkg.d.e"}
    assert set(imports(root / "sub" / "m.py", root, everywhere=False)) == found
    assert set(imports(root / "sub" / "m.py", root)) == found | {"f", "pkg.sub.h.i"}


@pytest.mark.parametrize("root", [PALLAS, METAL], ids=lambda root: root.name)
def test_a_sibling_imports_jax_numpy_and_the_standard_library_only(root):
    allowed = {"jax", "jaxlib", "numpy", root.name, *sys.stdlib_module_names}
    for path in sources(root):
        # metal_bridge/__main__.py is a program: its self-test compares with jmoe. mlx.py serves MLX's users.
        extra = {METAL / "__main__.py": {"jmoe"}, METAL / "mlx.py": {"mlx"}}.get(path, set())
        at_once = {name.partition(".")[0] for name in imports(path, root, everywhere=False)}
        assert "mlx" not in at_once, f"{path} imports MLX before it is called"
        foreign = {name for name in imports(path, root) if name.partition(".")[0] not in allowed | extra}
        assert not foreign, f"{path} imports {foreign}"


def test_dispatch_alone_imports_the_siblings():
    importers = {
        part_of(path) for path in sources(JMOE) if SIBLINGS & {n.partition(".")[0] for n in imports(path, JMOE)}
    }
    assert importers == {"dispatch"}


def test_no_part_of_jmoe_imports_one_above_it():
    for path in sources(JMOE):
        own = ROW_OF.get(part_of(path), len(ROWS))
        for name in imports(path, JMOE, everywhere=False):
            package, _, rest = name.partition(".")
            other = ROW_OF.get(rest.partition(".")[0], len(ROWS))
            assert package != "jmoe" or other <= own, f"{path} imports {name}, which stands above it"


def test_nothing_that_computes_imports_what_reads_files():
    for path in sources(JMOE):
        if part_of(path) in set().union(*ROWS) - {"gguf_file"}:
            at_once = set(imports(path, JMOE, everywhere=False))
            assert not any(name.startswith("jmoe.gguf_file") for name in at_once), f"{path} reads files at import"
    assert not any("gguf_file" in name for name in imports(JMOE / "moe.py", JMOE))


def test_jmoe_imports_no_test():
    tests = {path.stem for path in sources(TESTS)}
    for root in (JMOE, PALLAS, METAL):
        for path in sources(root):
            assert not tests & {name.partition(".")[0] for name in imports(path, root)}, path


def test_the_oracle_and_the_tolerances_import_nothing_of_jmoe():
    for name in ("oracle.py", "tolerances.py"):
        tops = {imported.partition(".")[0] for imported in imports(TESTS / name, TESTS)}
        assert tops <= {"gguf", "numpy", *sys.stdlib_module_names}, f"{name} imports {tops}"


def run_python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_jmoe_initialises_no_backend():
    # With a platform that does not exist, whoever asks for a device fails.
    code = """
import jax, jmoe, jmoe.gguf_file
try:
    jax.devices()
except RuntimeError:
    print("no device was asked for until now")
"""
    assert run_python(code, JAX_PLATFORMS="no_such_platform") == "no device was asked for until now\n"


def test_importing_jmoe_loads_nothing_heavy():
    heavy = ("tqdm", "matplotlib", "pytest", "hypothesis", "jax.experimental.pallas", "torch", "jmoe.cli")
    code = f"import sys, jmoe\nprint([name for name in {heavy} if name in sys.modules])"
    assert run_python(code) == "[]\n"
