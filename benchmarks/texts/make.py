"""Make the benchmark's texts from Debian packages, CPython and installed Python packages.

Nothing of the texts is stored in the repository, only how each is made; the digest that is printed
shows whether two machines have the same texts. Debian packages are downloaded and unpacked into the
folder, not installed.

Usage: python -m benchmarks.texts.make FOLDER [--shakespeare tinyshakespeare.txt]
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

KB, MB = 1000, 1000_000
PACKAGES = ("fortunes", "fortunes-min", "iso-codes", "manpages-ru", "perl-doc", "python3-doc")


class Sources:
    """Where the material is; Debian packages are unpacked when one is first used."""

    def __init__(self, folder: Path, shakespeare: Path | None) -> None:
        self.packages = folder / "packages"
        self.shakespeare = shakespeare

    def debian(self, package: str) -> Path:
        """The folder into which a Debian package is unpacked."""
        place = self.packages / package
        if not place.exists():
            self.packages.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", package], cwd=self.packages, check=True)
            (archive,) = self.packages.glob(f"{package}_*.deb")
            subprocess.run(["dpkg", "-x", str(archive), str(place)], check=True)
            archive.unlink()
        return place

    def fortunes(self) -> list[str]:
        """Short quotations, one string each."""
        found = []
        for package in ("fortunes", "fortunes-min"):
            folder = self.debian(package) / "usr/share/games/fortunes"
            files = sorted(path for path in folder.iterdir() if path.suffix == "")
            for path in files:
                found += path.read_text(encoding="utf-8", errors="replace").split("\n%\n")
        return [text.strip("\n") for text in found if text.strip()]


def joined(parts: Iterable[str], most: int) -> str:
    """Parts of a text up to about `most` characters, cut at the end of a line."""
    text, kept = io.StringIO(), 0
    for part in parts:
        text.write(part)
        kept += len(part)
        if kept >= most:
            break
    whole = text.getvalue()
    return whole if len(whole) <= most else whole[: whole.rindex("\n", 0, most) + 1]


def prose(sources: Sources) -> str:
    """Python's documentation: paragraphs of running text, without markup and code."""
    folder = sources.debian("python3-doc")
    pages = sorted(folder.rglob("*.rst.txt"))
    if not pages:  # the package is a pointer to that of one version
        version = f"python3.{sys.version_info.minor}-doc"
        pages = sorted(sources.debian(version).rglob("*.rst.txt"))
    shuffled = random.Random(1).sample(pages, len(pages))
    paragraphs = []
    for page in shuffled:
        for block in page.read_text(encoding="utf-8").split("\n\n"):
            lines = block.splitlines()
            running = len(block) > 150 and all(line[:1].isalpha() for line in lines)
            if running and "::" not in block:
                plain = re.sub(r":[\w:]+:`[~!]?([^`<]+?)(?: <[^>]*>)?`|``([^`]*)``", r"\1\2", block)
                paragraphs.append(plain + "\n\n")
    return "".join(paragraphs)


def licences(sources: Sources) -> str:
    """Licence texts in short lines, as verse: repetitive."""
    files = sorted(Path("/usr/share/common-licenses").iterdir())
    words = " ".join(path.read_text() for path in files if not path.is_symlink()).split()
    return "\n".join(textwrap.wrap(" ".join(words), 44)) + "\n"


def chat(sources: Sources) -> str:
    """A log of a chat: times, names, and quotations as what is said."""
    rng = random.Random(2)
    names = ["ada", "grace_h", "linus", "kt", "margaret", "edsger", "barb", "dmr", "tux"]
    lines, minute = [], 0
    for text in rng.sample(quoted := sources.fortunes(), len(quoted)):
        speakers = rng.sample(names, 3)
        for line in textwrap.wrap(" ".join(text.split()), rng.randint(40, 110)):
            minute += rng.choice((0, 0, 0, 1, 1, 3))
            time = f"{minute // 60 % 24:02d}:{minute % 60:02d}"
            lines.append(f"[{time}] <{rng.choice(speakers)}> {line}\n")
    return "".join(lines)


def table(sources: Sources) -> str:
    """Regions of all countries as CSV: code, name, kind, and a number."""
    data = sources.debian("iso-codes") / "usr/share/iso-codes/json/iso_3166-2.json"
    regions = json.loads(data.read_text(encoding="utf-8"))["3166-2"]
    rng = random.Random(3)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["code", "name", "type", "parent", "stations"])
    for _ in range(2):  # twice, with other numbers and in another order
        for one in rng.sample(regions, len(regions)):
            rows.writerow(
                [one["code"], one["name"], one["type"], one.get("parent", ""), rng.randrange(4000)]
            )
    return text.getvalue()


def python_library() -> list[Path]:
    """CPython's standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = [p for p in library.rglob("*.py") if "site-packages" not in p.parts]
    skipped = {"test", "encodings"}  # tests; tables of character codes
    return sorted(path for path in packages if not skipped & set(path.parts))


def installed() -> list[Path]:
    """The installed packages' Python code."""
    return sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))


def code(files: list[Path]) -> Iterable[str]:
    """Source files in random order."""
    for path in random.Random(4).sample(files, len(files)):
        try:
            yield path.read_text(encoding="utf-8").rstrip() + "\n\n\n"
        except (UnicodeDecodeError, OSError):
            continue


def perl(sources: Sources) -> Iterable[str]:
    """Perl's documentation."""
    pages = sorted(sources.debian("perl-doc").rglob("*.pod"))
    for path in random.Random(5).sample(pages, len(pages)):
        yield path.read_text(encoding="utf-8", errors="replace")


def russian(sources: Sources) -> Iterable[str]:
    """Manual pages in Russian, without formatting."""
    pages = sorted((sources.debian("manpages-ru") / "usr/share/man/ru").rglob("*.gz"))
    for path in random.Random(6).sample(pages, len(pages)):
        lines = gzip.decompress(path.read_bytes()).decode("utf-8", "replace").splitlines()
        kept = [line for line in lines if not line.startswith(('.\\"', "'"))]
        text = re.sub(r"^\.[A-Z]+ ?|\\f.|\\[,/]", "", "\n".join(kept), flags=re.MULTILINE)
        yield text.replace("\\-", "-") + "\n"


def shakespeare(sources: Sources) -> str:
    """Tiny Shakespeare; FileNotFoundError where it was not given."""
    if sources.shakespeare is None:
        raise FileNotFoundError("Tiny Shakespeare: name it with --shakespeare")
    return sources.shakespeare.read_text(encoding="utf-8")


def built_in() -> str:
    """The corpus that mygpt brings."""
    from mygpt.text import read_corpus

    return "\n".join(str(document.text) for document in read_corpus([]).documents)


# By size: name, what it is, and how it is made.
TEXTS: dict[str, tuple[str, Callable[[Sources], str]]] = {
    "20k-prose": ("Python documentation", lambda s: joined([prose(s)[500 * KB :]], 20 * KB)),
    "60k-licences": ("licence texts as verse", lambda s: joined([licences(s)], 60 * KB)),
    "60k-prose": ("Python documentation", lambda s: joined([prose(s)], 60 * KB)),
    "60k-shakespeare": ("Tiny Shakespeare", lambda s: joined([shakespeare(s)], 60 * KB)),
    "300k-chat": ("chat log", lambda s: joined([chat(s)], 300 * KB)),
    "300k-csv": ("CSV of regions", lambda s: joined([table(s)], 300 * KB)),
    "465k-builtin": ("built-in corpus", lambda s: built_in()),
    "1m-russian": ("Russian manual pages", lambda s: joined(russian(s), 900 * KB)),
    "1m-shakespeare": ("Tiny Shakespeare", shakespeare),
    "2m-python": ("CPython's library", lambda s: joined(code(python_library()), 2 * MB)),
    "2m-fortunes": ("short quotations", lambda s: "\n%\n".join(sources_shuffled(s)) + "\n"),
    "4m-perl": ("Perl's documentation", lambda s: joined(perl(s), 4 * MB)),
    "30m-python": ("installed Python packages", lambda s: joined(code(installed()), 30 * MB)),
}


def sources_shuffled(sources: Sources) -> list[str]:
    """The quotations in random order, so that the last tenth is of no other kind."""
    texts = sources.fortunes()
    return random.Random(7).sample(texts, len(texts))


def main() -> None:
    """Write every text that is not there yet, and print its size and digest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shakespeare", type=Path)
    parser.add_argument("--only", default="", help="names, separated by commas")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    sources = Sources(options.folder, options.shakespeare)
    for name in options.only.split(",") if options.only else TEXTS:
        path = options.folder / f"{name}.txt"
        if not path.exists():
            try:
                path.write_text(TEXTS[name][1](sources), encoding="utf-8")
            except (FileNotFoundError, subprocess.CalledProcessError) as error:
                print(f"{name:<16} not made: {error}", flush=True)
                continue
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()[:12]
        print(f"{name:<16} {len(data):>11,} bytes  {digest}  {TEXTS[name][0]}", flush=True)
    shutil.rmtree(sources.packages, ignore_errors=True)


if __name__ == "__main__":
    main()
