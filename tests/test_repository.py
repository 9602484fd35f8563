"""What must hold of the repository as a whole: layout, floors, sizes, names, laziness."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import adaptivenet

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "adaptivenet"

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "adaptivenet", "research", "configs", "tests", "paper"),
    *("Makefile", ".ci", "docs", "LICENSE", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md"),
    ".gitignore",
}
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".cff", ".tex", ".typed", ""}

# From the ground up (docs/design.md); nothing imports from a floor above its own.
FLOORS = (
    {"trees", "counts", "selection", "chains", "moments"},
    {"posterior"},
    {"pruning", "consolidation"},
    {"spiking", "attention"},
    {"models", "compression"},
    {"training", "data", "emergence"},
    {"testing"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# The ground knows arrays and pytrees only: no layers, no pictures, no files.
UNKNOWN_BELOW = {"flax", "matplotlib", "orbax", "tyro", "rich", "yaml", "PIL"}
GROUND_FLOORS = 3


def tracked_files() -> list[Path]:
    """What git tracks or would add; skips outside a checkout."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names that a module of the package imports, wherever the statement stands."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    """``pruning`` for adaptivenet/pruning/prune.py, ``trees`` for adaptivenet/trees.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def package_modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def public_objects() -> dict[str, object]:
    """Dotted name -> object for each name of each public module's ``__all__``."""
    found: dict[str, object] = {}

    def visit(module: types.ModuleType) -> None:
        found[module.__name__] = module
        assert hasattr(module, "__all__"), f"{module.__name__} is public and has no __all__"
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, types.ModuleType):
                visit(value)
            elif not name.startswith("__"):
                found[f"{module.__name__}.{name}"] = value

    visit(adaptivenet)
    return found


def test_top_level_is_as_fixed():
    seen = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert seen <= TOP_LEVEL, f"not part of the fixed layout: {sorted(seen - TOP_LEVEL)}"
    missing = {name for name in TOP_LEVEL if not (ROOT / name).exists()}
    assert not missing


def test_no_file_names_this_machine_or_a_package_index():
    patterns = {
        "an absolute path of a machine": re.compile(
            r"(?<![\w.~}])/(?:root|home/\w+|Users/\w+|work|tmp/\w+)/"
        ),
        "a package index": re.compile(r"(?:extra-)?index-url|/simple/|pypi\.org|pythonhosted"),
    }
    here = [str(ROOT), str(Path.home())]
    problems = []
    for path in tracked_files():
        if path.suffix not in TEXT or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            where = f"{path.relative_to(ROOT)}:{number}"
            problems += [f"{where}: {what}" for what, p in patterns.items() if p.search(line)]
            problems += [f"{where}: {p}" for p in here if len(p) > 3 and p + "/" in line]
    assert not problems, "\n".join(problems)


def test_no_module_is_over_600_lines():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in tracked_files()
        if path.suffix == ".py"
    }
    assert lengths
    assert not {name: length for name, length in lengths.items() if length > 600}


def test_every_module_stands_on_a_floor():
    rooms = {room_of(path) for path in package_modules()}
    assert rooms <= FLOOR_OF.keys(), f"give it a floor: {sorted(rooms - FLOOR_OF.keys())}"


def test_nothing_imports_upward():
    upward = []
    for path in package_modules():
        floor = FLOOR_OF[room_of(path)]
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "research":
                upward.append(f"{path.relative_to(ROOT)} imports {name}")
            # A name such as __version__ belongs to no room.
            ours = parts[0] == "adaptivenet" and len(parts) > 1
            if ours and FLOOR_OF.get(parts[1], 0) > floor:
                upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upward, "\n".join(upward)


def test_the_ground_floors_know_neither_layers_nor_pictures_nor_files():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in package_modules()
        if FLOOR_OF[room_of(path)] < GROUND_FLOORS
        for name in imports_of(path)
        if name.split(".")[0] in UNKNOWN_BELOW
    ]
    assert not wrong, "\n".join(wrong)


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after the statement."""
    code = f"import sys\n{statement}\nprint(' '.join({{m.split('.')[0] for m in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_after("import adaptivenet")
    assert "adaptivenet" in loaded
    assert not loaded & {*UNKNOWN_BELOW, "jax", "numpy", "sklearn", "scipy"}


MODULES = sorted({*adaptivenet.__all__} - {"__version__", "with_posterior"})


@pytest.mark.parametrize("name", MODULES)
def test_importing_a_public_module_loads_only_what_it_needs(name):
    heavy = {"matplotlib", "orbax", "tyro", "rich", "PIL", "sklearn"}
    if FLOOR_OF[name] < GROUND_FLOORS or name == "data":
        heavy |= {"flax"}
    if name == "models":
        heavy -= loaded_after("import flax.nnx")  # what Flax itself loads is Flax's affair
    if name == "testing":
        heavy -= loaded_after("import flax.nnx, pytest")
    assert not loaded_after(f"import adaptivenet.{name}") & heavy


def test_public_names_are_listed_and_load_on_first_use():
    assert set(adaptivenet.__all__) <= set(dir(adaptivenet))
    for name in MODULES:
        assert getattr(adaptivenet, name) is importlib.import_module(f"adaptivenet.{name}")
    assert adaptivenet.with_posterior is adaptivenet.posterior.with_posterior


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names():
    with pytest.raises(AttributeError, match=r"no attribute 'prunning'.*pruning"):
        _ = adaptivenet.prunning
    assert not hasattr(adaptivenet, "__wrapped__")


def test_every_public_object_has_a_docstring_of_its_own():
    without = []
    for name, value in public_objects().items():
        alias = typing.get_origin(value) is not None or isinstance(value, types.UnionType)
        if alias or not (isinstance(value, types.ModuleType | type) or callable(value)):
            continue  # data and type aliases can have none
        text = (getattr(value, "__doc__", None) or "").strip()
        # A NamedTuple or dataclass without a docstring gets its signature as one.
        if not text or (isinstance(value, type) and text.startswith(f"{value.__name__}(")):
            without.append(name)
    assert not without


def test_all_lists_no_name_twice_and_nothing_private():
    for name, value in public_objects().items():
        if isinstance(value, types.ModuleType):
            assert len(value.__all__) == len(set(value.__all__)), name
            assert not [n for n in value.__all__ if n.startswith("_") and n != "__version__"], name


def test_init_files_of_packages_only_re_export():
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
    for path in package_modules():
        if path.name == "__init__.py":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            other = [ast.unparse(node)[:60] for node in body if not isinstance(node, allowed)]
            assert not other, f"{path.relative_to(ROOT)} does more than re-export: {other}"


def test_every_public_module_has_a_page_in_the_api():
    pages = {path.stem for path in (ROOT / "docs" / "api").glob("*.md")} - {"index"}
    modules = {n for n, value in public_objects().items() if isinstance(value, types.ModuleType)}
    assert pages == {name.removeprefix("adaptivenet.") for name in modules - {"adaptivenet"}}


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


@pytest.mark.parametrize(
    ("cell", "jax_version", "flax_version"),
    [("py311", r"0\.10\.2", r"0\.12\.8"), ("py312", r"0\.1[12]\..*", r"0\.12\.12")],
)
def test_constraints_pin_each_cell_whole_and_name_no_host(cell, jax_version, flax_version):
    lines = (ROOT / f".ci/constraints/constraints-{cell}.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in pins)
    assert all(re.fullmatch(r"[0-9][0-9A-Za-z.+]*", version) for version in pins.values())
    pins = {requirement_name(name): version for name, version in pins.items()}
    assert re.fullmatch(jax_version, pins["jax"])
    assert re.fullmatch(flax_version, pins["flax"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["test"], *extras["docs"], *extras["lint"]]
    assert not {requirement_name(line) for line in needed} - pins.keys()


def test_make_has_the_promised_targets():
    text = (ROOT / "Makefile").read_text()
    promised = ["setup", "demo", "test", "lint", "types", "docs"]
    promised += ["bench", "paper", "check", "clean", "help"]
    assert not [name for name in promised if not re.search(rf"^{name}:", text, re.MULTILINE)]


@pytest.mark.parametrize("script", [".ci/run", ".ci/install", ".ci/smoke"])
def test_scripts_parse_and_may_be_executed(script):
    path = ROOT / script
    assert os.access(path, os.X_OK)
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    process = subprocess.run([bash, "-n", str(path)], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_a_python_that_is_too_old_is_refused_with_what_to_do(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho 3.9\n")
    old.chmod(0o755)
    command = [str(ROOT / ".ci/install"), str(old), str(tmp_path / "venv"), ""]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "3.9" in process.stderr
    assert "3.11 or newer" in process.stderr
    assert "PYTHON=" in process.stderr
    assert not (tmp_path / "venv").exists()


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    folder = tmp_path / "venv"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    command = [str(ROOT / ".ci/install"), sys.executable, str(folder), ""]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "no virtual environment" in process.stderr
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_citation_names_this_version_and_the_founding_note():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == adaptivenet.__version__
    assert citation["license"] == "Apache-2.0"
    titles = {reference["title"] for reference in citation["references"]}
    assert "Modelo de Compresión de IA Basado en Sistemas Complejos Adaptativos" in titles


def test_configs_say_on_top_what_they_claim_cost_and_should_show():
    configs = sorted((ROOT / "configs").glob("*/*.yaml"))
    assert configs
    for path in configs:
        lines = path.read_text(encoding="utf-8").splitlines()
        top = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
        where = str(path.relative_to(ROOT))
        missing = [w for w in ("Claim", "Command", "Cost", "Expected") if f"# {w}:" not in top]
        assert not missing, f"{where} does not say on top: {missing}"
        assert where in top or "make demo" in top, f"{where}: the command names another file"
        assert (ROOT / "research" / f"{path.parent.name}.py").exists(), where


def test_the_examples_in_the_readme_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert examples
    for example in examples:
        names: dict[str, object] = {}
        exec(compile(example, "README.md", "exec"), names)
        # The claim the example makes, checked: zeros where the mask is False.
        mask = adaptivenet.pruning.mask(names["state"])["dense1"]["kernel"]
        kernel = names["params"]["dense1"]["kernel"]  # type: ignore[index]
        assert mask.shape == kernel.shape
        assert bool((kernel == 0)[~mask].all())


def test_test_modules_mirror_the_package():
    # A folder of tests that mirrors a package must not name one that is gone.
    special = {"contract", "properties", "distributed", "research", "fixtures", "__pycache__"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - special
    assert folders <= FLOOR_OF.keys()


def test_public_functions_annotate_their_parameters():
    bare = []
    for name, value in public_objects().items():
        if inspect.isfunction(value):
            parameters = inspect.signature(value).parameters.values()
            bare += [f"{name}({p.name})" for p in parameters if p.annotation is p.empty]
    assert not bare


def test_the_examples_in_the_quickstart_run(capsys):
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(example, "quickstart.md", "exec"), names)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    shown = [line.rstrip() for line in text.splitlines()]
    assert printed
    assert [line for line in printed if line not in shown] == []
