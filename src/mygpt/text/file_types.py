"""Recognise by its first bytes a file that is not plain UTF-8 text.

All code that reads text uses this: compressed files are decompressed whatever their name is,
documents of other programs are refused with a remedy, and UTF-16 without a byte-order mark is
recognised.
"""

from __future__ import annotations

import codecs
import re
import unicodedata

FIRST_BYTES = 2**16  # of a file: enough to recognise its type
BOMS = (  # UTF-32's begins with UTF-16's, so it must be tried first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_OWN_BOMS = {"utf-8-sig": "utf-8", "utf-16": "utf-16-", "utf-32": "utf-32-"}  # codecs remove these
_NAMES = 2**12  # bytes at a zip archive's start that contain its first file names

_ZSTD = rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"  # the second: a skippable frame
_PLAIN_ASCII = bytes(32 <= byte < 127 or byte in b"\n\r" for byte in range(256))

_UNPACK = "unpack it and name the text in it"
_EXPORT = "export its text, for instance as JSON lines"
_SAVE = "save it as plain text"
_OTHER = "name a text file"

# File types that are not text: a pattern for the first bytes, the type with its article, and what
# the user can do to train on its text. No plain text begins like that: where the magic bytes are
# short or printable, the pattern also requires bytes that text does not contain, mostly a NUL.
_SIGNATURES = (
    (rb"%PDF-", "a PDF document", f"{_SAVE} (pdftotext FILE FILE.txt)"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Microsoft Office document", _SAVE),
    (rb"AT&TFORM", "a DjVu document", _SAVE),
    (rb"\x1f\x8b", "a gzip file", _UNPACK),
    (_ZSTD, "a zstd file", f"{_UNPACK} (unzstd FILE)"),
    (rb"BZh.(1AY&SY|\x17\x72\x45\x38\x50\x90)", "a bzip2 file", f"{_UNPACK} (bunzip2 FILE)"),
    (rb"\xfd7zXZ\0|\x5d\0\0", "an xz or LZMA file", f"{_UNPACK} (unxz FILE)"),
    (
        rb"\x1f\x9d|\x04\x22\x4d\x18|\xff\x06\0\0sNaPpY|LZIP\x01",
        "a compressed file",
        f"{_UNPACK} (uncompress, unlz4, snzip or lzip -d)",
    ),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (rb"MSCF\0\0\0\0", "a cabinet archive", _UNPACK),
    (
        rb"(?=.{0,256}\0).{257}ustar",
        "a tar archive",
        "unpack it and name the folder (tar xf FILE)",
    ),
    (
        rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*|\0\0\x01\0|BM.{4}\0{4}|RIFF.{4}WEBP",
        "an image",
        _OTHER,
    ),
    (rb"RIFF.{4}WAVE|(ID3|\xff\xfb).{0,60}\0|OggS\0|fLaC\0", "an audio file", _OTHER),
    (rb"RIFF.{4}AVI |\0{3}.ftyp|\x1a\x45\xdf\xa3", "a video or HEIF image", _OTHER),
    (rb"(wOF2|OTTO\0|\0\x01\0\0\0).{0,58}\0\0", "a font", _OTHER),
    (
        rb"\x7fELF|MZ.{0,60}\0\0|\xcf\xfa\xed\xfe|\xca\xfe\xba\xbe|\0asm",
        "a compiled program",
        _OTHER,
    ),
    (rb"SQLite format 3\0", "an SQLite database", _EXPORT),
    (rb"PAR1.*\0", "a Parquet table", "give its name the ending .parquet"),
    (rb"ARROW1\0|FEA1.*\0", "an Arrow table", _EXPORT),
    (rb"ORC.*\0", "an ORC table", _EXPORT),
    (rb"Obj\x01", "an Avro file", _EXPORT),
    (rb"\x89HDF", "an HDF5 file", _EXPORT),
    (rb"\x93NUMPY", "a NumPy array", _OTHER),
    (rb"GGUF.{0,20}\0", "a GGUF model", _OTHER),
    (rb".{5}\0{3}\{\"", "a safetensors model", _OTHER),
    (rb"PACK\0\0\0", "a Git pack file", _OTHER),
    (rb"\x80[\x02-\x05]", "a Python pickle", _EXPORT),
)
# What the names of a zip archive's first files contain, file type and remedy.
_ZIPPED = (
    (b"word/", "a Word document", f"{_SAVE} (pandoc FILE -t plain -o FILE.txt)"),
    (b"xl/", "an Excel workbook", "save it as CSV"),
    (b"ppt/", "a PowerPoint document", _SAVE),
    (b"opendocument.text", "an OpenDocument text", f"{_SAVE} (pandoc FILE -t plain -o FILE.txt)"),
    (b"opendocument.spreadsheet", "an OpenDocument spreadsheet", "save it as CSV"),
    (b"opendocument", "an OpenDocument file", _SAVE),
    (b"application/epub+zip", "an EPUB book", f"{_SAVE} (pandoc FILE -t plain -o FILE.txt)"),
    (b"/data.pkl", "a PyTorch checkpoint", _OTHER),
    (b".npy", "an archive of NumPy arrays", _OTHER),
    (b"META-INF/", "a Java archive", _OTHER),
    (b"[Content_Types].xml", "a Microsoft Office document", _SAVE),
    (b"", "a zip archive", "unpack it and name the text or the folder (unzip FILE)"),
)


def compression_of(start: bytes) -> str:
    """The compression of a file with these first bytes: "gzip", "zstd", or "" for none."""
    if start.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    return "zstd" if re.match(_ZSTD, start) else ""


def signature_of(start: bytes) -> list[str] | None:
    """The type of a file with these first bytes, and the remedy; None if it is none of these."""
    if start[:4] in (b"PK\3\4", b"PK\5\6", b"PK\7\x08"):
        return next(kind for name, *kind in _ZIPPED if name in start[:_NAMES])
    return next((kind for magic, *kind in _SIGNATURES if re.match(magic, start, re.DOTALL)), None)


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
        return "is {}, not plain text: {}".format(*kind)
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
