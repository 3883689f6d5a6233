"""Shared by all tests: one thread, the same examples every time, and the fast tests."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Their assertions are then checked under `python -O` too.
pytest.register_assert_rewrite(*(path.stem for path in Path(__file__).parent.glob("*.py")))

from offline_pages import end_chromium  # noqa: E402
from paths import ROOT  # noqa: E402

SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"

# Of the processes that tests start, too. Where there are fewer cores than threads, those of OpenMP
# and OpenBLAS use more time to wait for each other than to compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


NOT_FAST = ("browser", "kernels", "processes", "slow")  # marks; pyproject.toml describes them
_CACHE = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help=f"deselect the tests that are marked {', '.join(NOT_FAST)}",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Compile the kernels before the tests' own processes start, once for all of them.

    With `--fast` no machine code is compiled, and none is found: its folder is an empty one.
    """
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import torch  # not in the process that only starts the workers: it takes seconds

        torch.set_num_threads(1)
    if config.getoption("--fast"):
        folder = tempfile.TemporaryDirectory(prefix="mygpt-tests-")
        config.add_cleanup(folder.cleanup)
        config.stash[_CACHE] = Path(folder.name)
        os.environ["MYGPT_CACHE"] = folder.name
        _train_small_models_with_torch()
    elif not hasattr(config, "workerinput"):
        from mygpt.cpu.common.build import TRAINING, compile_now

        compile_now()
        compile_now(TRAINING)


def _train_small_models_with_torch() -> None:
    """As on processors with AVX-512, where the kernels do not suit widths below 16.

    On others, with shorter vectors, tests that train a model of width 8 compiled machine code.
    """
    from mygpt.cpu.train import step

    suits = step.suits
    step.suits = lambda config: config.head_size % 16 == 0 and suits(config)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--fast`, a file that is marked as a whole is not even imported, which takes seconds."""
    if not config.getoption("--fast") or collection_path.suffix != ".py":
        return None
    marked = rf"^pytestmark = pytest\.mark\.({'|'.join(NOT_FAST)})$"
    return re.search(marked, collection_path.read_text("utf-8"), re.MULTILINE) is not None or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        slow = [i for i in items if any(map(i.get_closest_marker, NOT_FAST))]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where the wheel is tested, the sources are not here (`make test-wheel`)."""
    if item.get_closest_marker("checkout") and not (ROOT / "src").is_dir():
        pytest.skip("needs the project's sources")


@pytest.fixture(autouse=True)
def nothing_is_compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--fast`, a test that compiles machine code fails, in a process of its own too."""
    yield
    cache = request.config.stash.get(_CACHE, None)
    if cache is not None and (kept := list(cache.glob("*.o"))):
        for path in kept:
            path.unlink()
        pytest.fail("this test compiles machine code: mark it with `kernels`")


@pytest.fixture(scope="session", autouse=True)
def syncs_cost_nothing() -> Iterator[None]:
    """A sync waits 10 ms for the disk, and a small run has 30: tests lose no power.

    Tests of syncs replace `os.fsync` by their own function.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_chromium() -> Iterator[None]:
    """The tests of a process share a browser, which ends with them."""
    yield
    end_chromium()


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore some; training heeds that."""
    names = ("SIGINT", "SIGHUP")
    before = {number: signal.getsignal(number) for name in names if (number := _number(name))}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            default = number == signal.SIGINT and signal.default_int_handler
            signal.signal(number, default or signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _number(name: str) -> int | None:
    return getattr(signal, name, None)


@pytest.fixture
def shakespeare() -> Path:
    """Tiny Shakespeare's path; skips where the machine does not have it."""
    path = Path(os.environ.get("MYGPT_SHAKESPEARE", SHAKESPEARE))
    if not path.exists():
        pytest.skip("Tiny Shakespeare is not here: `mygpt data shakespeare` fetches it")
    return path
