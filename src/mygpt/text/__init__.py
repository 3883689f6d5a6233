"""Reading text: files, folders, glob patterns, standard input, or the built-in corpus.

Text is not changed: line ends are kept. gzip and zstd files are decompressed. A corpus is a list
of documents in memory; a text too large for memory is refused, before it is read where its size
is known. A stream yields the same documents in pieces, so that they need not fit into memory.
"""

from mygpt.text.corpus import name_of, read_corpus, read_text, require_existing
from mygpt.text.documents import SEPARATOR, Corpus, Document, as_bytes, split_documents, split_note
from mygpt.text.reading import shown
from mygpt.text.sources import find_sources
from mygpt.text.streams import READING_VERSION, Piece, RecordOptions, TextSource, pieces

__all__ = [
    "READING_VERSION",
    "SEPARATOR",
    "Corpus",
    "Document",
    "Piece",
    "RecordOptions",
    "TextSource",
    "as_bytes",
    "find_sources",
    "name_of",
    "pieces",
    "read_corpus",
    "read_text",
    "require_existing",
    "shown",
    "split_documents",
    "split_note",
]
