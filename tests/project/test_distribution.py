"""What is distributed: its name, its version, and the files of the wheel and the source archive."""

from __future__ import annotations

import re
import subprocess
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from flit_core import buildapi

import mygpt
from mygpt.errors import DISTRIBUTION
from paths import PACKAGE, ROOT, SOURCES

OWN = ("dev", "docs", "fuzz", "notebooks", "pictures")  # extras for work on the project itself


@pytest.fixture
def at_a_fixed_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def test_messages_name_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == DISTRIBUTION


def test_no_line_installs_the_package_of_another_project() -> None:
    """Messages and documents advised `pip install 'mygpt[serve]'`, which another project owns."""
    files = [
        *PACKAGE.rglob("*.py"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("*.md"),
        *ROOT.glob("Dockerfile"),
        *ROOT.glob(".github/workflows/*"),
    ]
    advised = r"pip install\b[^\n`]*['\" ]mygpt(?![-\w/.]).*"
    found = [
        f"{path.relative_to(ROOT)}: {line[0]}"
        for path in files
        for line in re.finditer(advised, path.read_text(encoding="utf-8"))
    ]
    assert [line for line in found if "installs another project's package" not in line] == []


def test_the_oldest_releases_are_those_of_the_requirements() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (lines for name, lines in project["optional-dependencies"].items() if name not in OWN)
    wanted = [
        line.partition(";")[0] for lines in (project["dependencies"], *extras) for line in lines
    ]
    text = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE))
    numbers = {name: tuple(map(int, version.split("."))) for name, version in pinned.items()}
    for line in wanted:
        name, least = line.strip().split(">=")
        given = tuple(map(int, least.split(".")))
        assert numbers.pop(name)[: len(given)] == given, line
    assert set(numbers) == {"transformers"}, "for the tests: one that takes these tokenizers"


@pytest.mark.slow
@pytest.mark.checkout
def test_the_wheel_has_every_file_of_the_package(tmp_path: Path, at_a_fixed_date: None) -> None:
    """One that the package reads at run time, such as a page's script, was easily omitted."""
    wheel = zipfile.ZipFile(tmp_path / buildapi.build_wheel(str(tmp_path)))
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = (path for path in PACKAGE.rglob("*") if path.is_file())
    wanted = {path.relative_to(SOURCES).as_posix() for path in files if path.suffix != ".pyc"}
    assert packed == wanted
    assert {"mygpt/py.typed", "mygpt/views/static/playground.html"} <= packed

    name = f"{DISTRIBUTION.replace('-', '_')}-{mygpt.__version__}.dist-info/"
    metadata = HeaderParser().parsestr(wheel.read(name + "METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == (DISTRIBUTION, mygpt.__version__)
    assert "mygpt=mygpt.cli:main" in wheel.read(name + "entry_points.txt").decode()
    assert wheel.read(name + "licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
@pytest.mark.checkout
def test_the_source_archive_has_every_file_of_the_repository(
    tmp_path: Path, at_a_fixed_date: None
) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("these files are not a git checkout")
    with tarfile.open(tmp_path / buildapi.build_sdist(str(tmp_path))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in listed.stdout.split("\0") if name} <= packed


@pytest.mark.slow
@pytest.mark.checkout
def test_two_builds_have_the_same_bytes(tmp_path: Path, at_a_fixed_date: None) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        buildapi.build_wheel(str(folder))
        buildapi.build_sdist(str(folder))
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert len(first) == 2
    assert first == second
