"""Reading text: files, folders, globs, standard input, packed or not; or the built-in corpus.

Text is taken as it is: line ends stay what they are. A corpus is a list of documents in memory:
what does not fit there is refused before it is read, or as soon as that shows. A stream gives the
same documents in pieces, however long they are.
"""

from mygpt.text.corpus import (
    BUILTIN,
    builtin_documents,
    name_of,
    read_corpus,
    read_text,
    require_existing,
)
from mygpt.text.documents import SEPARATOR, Corpus, Document, as_bytes, split_documents, split_note
from mygpt.text.streams import (
    READING_VERSION,
    Piece,
    RecordOptions,
    TextSource,
    find_sources,
    pieces,
)

__all__ = [
    "BUILTIN",
    "READING_VERSION",
    "SEPARATOR",
    "Corpus",
    "Document",
    "Piece",
    "RecordOptions",
    "TextSource",
    "as_bytes",
    "builtin_documents",
    "find_sources",
    "name_of",
    "pieces",
    "read_corpus",
    "read_text",
    "require_existing",
    "split_documents",
    "split_note",
]
