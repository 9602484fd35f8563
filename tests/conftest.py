"""Settings that every test runs under, in whatever order and process."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import itertools
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")
# Tests are exact statements about arithmetic; they are made on the CPU unless asked otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import optax
import pytest

_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"

# XLA's older emitters compile the many small programs here in two thirds of the time; the cell of
# the newest JAX keeps those that users get. So do the tests on several devices: what is the same to
# the bit on any number of them with the default emitters differs in the last bit with the older
# ones. XLA aborts at a flag that it does not know.
_flags = os.environ.get("XLA_FLAGS", "")
_default_emitters = _EIGHT_DEVICES in _flags or "fusion_emitters" in _flags
if metadata.version("jaxlib") == "0.10.2" and not _default_emitters:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_cpu_use_fusion_emitters=false".strip()

# Promotion must be explicit and nothing may rely on 64-bit types.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", False)


def _compiled_programs() -> Path:
    """A folder for compiled programs, which most of the time of these tests goes into.

    One for each kind of processor, as programs are compiled for the one at hand; JAX itself tells
    its versions and options apart.
    """
    information = Path("/proc/cpuinfo")
    flags = information.read_text().partition("\nflags")[2].partition("\n")[0]
    kind = hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "adaptivenet" / f"tests-{kind}"


if sys.platform == "linux" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(_compiled_programs()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _with_standard_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def relaxed(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return relaxed


# Optax's bias correction computes `decay ** count` of a float and an int32; it alone keeps Adam and
# its kin from running under strict promotion. Whatever else of a peer mixes dtypes goes under
# `with jax.numpy_dtype_promotion("standard")` in the test that uses it.
_bias_correction = optax.tree_utils.tree_bias_correction
for _module in [m for name, m in sys.modules.items() if name.split(".")[0] == "optax"]:
    for _name, _value in list(vars(_module).items()):
        if _value is _bias_correction:
            setattr(_module, _name, _with_standard_promotion(_bias_correction))

# Compilation makes the first example slow, whence no deadline; in CI the examples are the same in
# every run, so that a red run can be repeated.
hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile(
    "ci",
    parent=hypothesis.settings.get_profile("default"),
    derandomize=True,
    database=None,
    print_blob=True,
)
hypothesis.settings.register_profile(
    "thorough", parent=hypothesis.settings.get_profile("default"), max_examples=1_000
)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")
)

# Tracing makes many small objects and few cycles, and JAX has a callback in every collection, which
# took a fifth of the time of these tests.
gc.set_threshold(100_000, 20, 10)

_DISTRIBUTED = Path(__file__).parent / "distributed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests/distributed where the process was not started with eight host devices."""
    if _EIGHT_DEVICES in os.environ.get("XLA_FLAGS", ""):
        return
    skip = pytest.mark.skip(reason=f"needs its own process with XLA_FLAGS={_EIGHT_DEVICES}")
    for item in items:
        if _DISTRIBUTED in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data that ADAPTIVENET_DATA names; the test is skipped without one."""
    folder = os.environ.get("ADAPTIVENET_DATA")
    if not folder:
        pytest.skip("needs real data: set ADAPTIVENET_DATA to the folder that holds it")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"ADAPTIVENET_DATA={folder} is not a folder")
    return path


# A process may hold 65,530 memory maps (Linux's default vm.max_map_count); every compiled program
# takes about ten, and memory, and JAX keeps them all, so a worker that runs a thousand tests dies
# without this.
_MAPS_KEPT = 20_000
_tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def _few_memory_maps():
    yield
    if next(_tests_run) % 20 == 0 and _memory_maps() > _MAPS_KEPT:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _no_figures_kept():
    """Closes what a test has drawn: pyplot keeps it, and warns at the twenty-first."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


def _memory_maps() -> int:
    maps = Path("/proc/self/maps")  # Linux; elsewhere there is no such limit
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


class _QuickDoctests:
    """Examples in docstrings are small programs that run once; fixtures here do not reach them."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        if not isinstance(item, pytest.DoctestItem):
            return (yield)
        with _without_optimizations():
            return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Lets a plugin see the tests outside of this folder as well."""
    config.pluginmanager.register(_QuickDoctests())


@contextlib.contextmanager
def _without_optimizations():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly(request):
    """Optimizing many small programs that run once would take most of the time of these tests."""
    folders = {"consolidation", "contract", "models", "posterior", "properties", "pruning"}
    folders |= {"research", "sleep"}
    names = ("epoch", "moments", "population", "posterior", "selection", "testing")
    files = {f"test_{name}.py" for name in names}
    long_runs = {"test_references.py"}  # where the program's own time counts
    name, folder = request.path.name, request.path.parent.name
    if (folder not in folders and name not in files) or name in long_runs:
        yield
        return
    with _without_optimizations():
        yield
