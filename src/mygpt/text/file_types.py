"""Recognise by its first bytes a file that is not plain UTF-8 text.

All code that reads text uses this: compressed files are decompressed whatever their name is,
documents of other programs are refused with a remedy, and UTF-16 without a byte-order mark is
recognised.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

FIRST_BYTES = 2**16  # of a file: enough to recognise its type
BOMS = (  # UTF-32's begins with UTF-16's, so it must be tried first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_OWN_BOMS = {
    "utf-8-sig": "utf-8",
    "utf-16": "utf-16-",
    "utf-32": "utf-32-",
}  # these codecs remove it
_NAMES = 2**12  # bytes at a zip archive's start that contain its first file names

# A compressed file's first bytes, and its format.
_PACKED = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    *((bytes([0x50 + n, 0x2A, 0x4D, 0x18]), "zstd") for n in range(16)),  # skippable frames
)

_PLAIN_ASCII = bytes(32 <= byte < 127 or byte in b"\n\r" for byte in range(256))

_UNPACK = "unpack it and name the text in it"
_EXPORT = "export its text, for instance as JSON lines"
_SAVE = "save it as plain text"
_OTHER = "name a text file"


class Signature(NamedTuple):
    """A file type that is not text.

    Attributes:
        what: the type, with its article ("a PDF document").
        remedy: what the user can do to train on its text.
    """

    what: str
    remedy: str


# Offset, magic bytes there (one of several), file type and remedy. No plain text begins like that.
_SIGNATURES: tuple[tuple[int, bytes | tuple[bytes, ...], str, str], ...] = (
    (0, b"%PDF-", "a PDF document", f"{_SAVE} (pdftotext FILE)"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Microsoft Office document", _SAVE),
    (0, b"AT&TFORM", "a DjVu document", _SAVE),
    (0, b"\x1f\x8b", "a gzip file", _UNPACK),
    (0, b"BZh", "a bzip2 file", f"{_UNPACK} (bunzip2 FILE)"),
    (0, b"\xfd7zXZ\0", "an xz file", f"{_UNPACK} (unxz FILE)"),
    (0, b"\x5d\0\0", "an LZMA file", f"{_UNPACK} (unlzma FILE)"),
    (0, b"\x1f\x9d", "a file of compress (.Z)", f"{_UNPACK} (uncompress FILE)"),
    (0, b"\x04\x22\x4d\x18", "an LZ4 file", f"{_UNPACK} (unlz4 FILE)"),
    (0, b"\xff\x06\0\0sNaPpY", "a Snappy file", _UNPACK),
    (0, b"LZIP\1", "an lzip file", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (0, b"MSCF\0\0\0\0", "a cabinet archive", _UNPACK),
    (257, b"ustar", "a tar archive", "unpack it and name the folder (tar xf FILE)"),
    (0, b"\x89PNG", "a PNG image", _OTHER),
    (0, b"\xff\xd8\xff", "a JPEG image", _OTHER),
    (0, (b"GIF87a", b"GIF89a"), "a GIF image", _OTHER),
    (0, (b"II*\0", b"MM\0*"), "a TIFF image", _OTHER),
    (0, b"\0\0\1\0", "an icon", _OTHER),
    (6, b"\0\0\0\0", "a BMP image", _OTHER),
    (8, b"WEBP", "a WebP image", _OTHER),
    (8, b"WAVE", "a WAV audio file", _OTHER),
    (8, b"AVI ", "an AVI video", _OTHER),
    (4, b"ftyp", "an MP4 video or HEIF image", _OTHER),
    (0, (b"ID3", b"\xff\xfb"), "an MP3 audio file", _OTHER),
    (0, b"OggS\0", "an Ogg audio file", _OTHER),
    (0, b"fLaC\0", "a FLAC audio file", _OTHER),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video", _OTHER),
    (0, (b"wOF2", b"OTTO\0", b"\0\1\0\0\0"), "a font", _OTHER),
    (0, b"\x7fELF", "a program (ELF)", _OTHER),
    (0, b"MZ", "a Windows program", _OTHER),
    (0, b"\xcf\xfa\xed\xfe", "a macOS program", _OTHER),
    (0, b"\xca\xfe\xba\xbe", "a Java class or a macOS program", _OTHER),
    (0, b"\0asm", "a WebAssembly program", _OTHER),
    (0, b"SQLite format 3\0", "an SQLite database", _EXPORT),
    (0, b"PAR1", "a Parquet table", "give its name the ending .parquet"),
    (0, b"ARROW1\0", "an Arrow table", _EXPORT),
    (0, b"FEA1", "a Feather table", _EXPORT),
    (0, b"ORC", "an ORC table", _EXPORT),
    (0, b"Obj\x01", "an Avro file", _EXPORT),
    (0, b"\x89HDF", "an HDF5 file", _EXPORT),
    (0, b"\x93NUMPY", "a NumPy array", _OTHER),
    (0, b"GGUF", "a GGUF model", _OTHER),
    (8, b'{"', "a safetensors model", _OTHER),
    (0, b"PACK\0\0\0", "a Git pack file", _OTHER),
    (0, (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"), "a Python pickle", _EXPORT),
)
# Magic bytes that are short or printable could begin a text: these types need a second check.
_FURTHER: dict[str, Callable[[bytes], bool]] = {
    "a bzip2 file": lambda start: start[4:10] in (b"1AY&SY", b"\x17rE8P\x90"),
    "a BMP image": lambda start: start[:2] == b"BM",
    "a WebP image": lambda start: start[:4] == b"RIFF",
    "a WAV audio file": lambda start: start[:4] == b"RIFF",
    "an AVI video": lambda start: start[:4] == b"RIFF",
    "an MP4 video or HEIF image": lambda start: start[:3] == b"\0\0\0",
    "an MP3 audio file": lambda start: b"\0" in start[:64],
    "a Windows program": lambda start: b"\0\0" in start[:64],
    "a font": lambda start: b"\0\0" in start[:64],
    "a Parquet table": lambda start: b"\0" in start or not is_utf8(start),
    "a Feather table": lambda start: b"\0" in start,
    "an ORC table": lambda start: not is_utf8(start) and b"\0" in start,
    "a GGUF model": lambda start: b"\0" in start[4:24],
    "a safetensors model": lambda start: start[5:8] == b"\0\0\0",
    "a tar archive": lambda start: b"\0" in start[:257],
}

# What the names of a zip archive's first files contain, file type and remedy.
_ZIPPED = (
    (b"word/", "a Word document", _SAVE),
    (b"xl/", "an Excel workbook", "save it as CSV"),
    (b"ppt/", "a PowerPoint document", _SAVE),
    (b"opendocument.text", "an OpenDocument text", _SAVE),
    (b"opendocument.spreadsheet", "an OpenDocument spreadsheet", "save it as CSV"),
    (b"opendocument", "an OpenDocument file", _SAVE),
    (b"application/epub+zip", "an EPUB book", _SAVE),
    (b"/data.pkl", "a PyTorch checkpoint", _OTHER),
    (b".npy", "an archive of NumPy arrays", _OTHER),
    (b"META-INF/", "a Java archive", _OTHER),
    (b"[Content_Types].xml", "a Microsoft Office document", _SAVE),
    (b"", "a zip archive", "unpack it and name the text or the folder (unzip FILE)"),
)


def compression_of(start: bytes) -> str:
    """The compression of a file with these first bytes: "gzip", "zstd", or "" for none."""
    return next((how for magic, how in _PACKED if start.startswith(magic)), "")


def signature_of(start: bytes) -> Signature | None:
    """The type of a file with these first bytes; None if it is not a known type."""
    if start[:4] in (b"PK\3\4", b"PK\5\6", b"PK\7\x08"):
        return next(Signature(*kind) for name, *kind in _ZIPPED if name in start[:_NAMES])
    for place, magic, what, remedy in _SIGNATURES:
        if start.startswith(magic, place) and (what not in _FURTHER or _FURTHER[what](start)):
            return Signature(what, remedy)
    if compression_of(start) == "zstd":
        return Signature("a zstd file", f"{_UNPACK} (unzstd FILE)")
    return None


def unmarked_encoding(start: bytes) -> str | None:
    """The UTF-16 or UTF-32 encoding of a text without a byte-order mark; None if it is neither.

    Such a text contains NUL bytes, all at the same position within a code unit. If there are few
    of them (as in Chinese), the bytes must also be invalid as UTF-8.
    """
    sample = start[: FIRST_BYTES - FIRST_BYTES % 4]
    if b"\0" not in sample or sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return None
    for codec, high in (("utf-32-le", 3), ("utf-32-be", 0)):
        units = len(sample) // 4
        if units > 1 and sample[high : 4 * units : 4].count(0) == units and _reads(sample, codec):
            return codec
    units = len(sample) // 2
    zeros = {"utf-16-be": sample[0::2].count(0), "utf-16-le": sample[1::2].count(0)}
    likely = sorted(zeros, key=lambda codec: -zeros[codec])
    certain = zeros[likely[0]] >= 0.25 * units and zeros[likely[1]] <= 0.01 * units
    if units < 2 or _letters_in_pairs(sample) >= 0.45 * units:
        return None
    if not certain and _passes_for_utf8(sample):
        return None
    return next((codec for codec in likely if zeros[codec] and _reads(sample, codec)), None)


def _letters_in_pairs(sample: bytes) -> int:
    """The number of byte pairs that are both ASCII letters: high in text that contains NULs."""
    plain = sample.translate(_PLAIN_ASCII)
    return sum(first & second for first, second in zip(plain[0::2], plain[1::2], strict=False))


def is_utf8(sample: bytes) -> bool:
    """Whether it is valid UTF-8, apart from an incomplete character at its end."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return False
    return True


def _passes_for_utf8(sample: bytes) -> bool:
    """Whether it is UTF-8 with at most 2 % control characters, not counting NULs."""
    controls = sum(sample.count(byte) for byte in range(1, 32) if byte not in b"\t\n\v\f\r\x1b")
    return is_utf8(sample) and controls <= 0.02 * len(sample)


def _reads(sample: bytes, codec: str) -> bool:
    """Whether at most 3 % of its characters in that encoding are unassigned or control ones."""
    try:
        text = codecs.getincrementaldecoder(codec)().decode(sample)
    except UnicodeDecodeError:
        return False
    odd = sum(
        unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs")
        for character in text
        if character not in "\t\n\v\f\r\x1b"
    )
    return bool(text) and odd <= 0.03 * len(text)


def bom_of(start: bytes) -> tuple[bytes, str]:
    """The byte-order mark that a file begins with, and its encoding; both empty for none."""
    return next(((bom, codec) for bom, codec in BOMS if start.startswith(bom)), (b"", ""))


def why_not_text(start: bytes, encoding: str | None) -> str | None:
    """Why a file with these first bytes is not read as text, with the remedy; None if it may be.

    Args:
        start: the first `FIRST_BYTES` bytes of the file, or all of a shorter one.
        encoding: the encoding that the user gave; None is UTF-8, or that of a byte-order mark.
    """
    if (kind := signature_of(start)) is not None:
        return f"is {kind.what}, not plain text: {kind.remedy}"
    named = "" if encoding is None else codecs.lookup(encoding).name
    marked = bom_of(start)[1]
    if named and marked and not marked.startswith(_OWN_BOMS.get(named, named)):
        return f"begins with the byte-order mark of {marked}: do not give --encoding {encoding}"
    if not marked and not named.startswith(("utf-16", "utf-32")):
        found = unmarked_encoding(start)
        if found is not None:
            family = found.rpartition("-")[0].upper()
            return f"seems to be {family} without a byte-order mark: give --encoding {found}"
    return None


def may_be_encoded(start: bytes) -> bool:
    """Whether a file with these first bytes, not UTF-8, may be text in another encoding."""
    if not start or signature_of(start) is not None:
        return False
    controls = any(byte in start for byte in range(32) if byte not in b"\t\n\v\f\r\x1b")
    return not controls or unmarked_encoding(start) is not None
