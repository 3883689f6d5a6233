"""Reading text: files, folders, globs, standard input, gzip; or the built-in corpus.

Text is taken as it is: line ends stay what they are. A corpus is a list of documents. What does
not fit into memory is refused before it is read, or as soon as that shows.
"""

from mygpt.text.corpus import BUILTIN, builtin_documents, read_corpus, require_there
from mygpt.text.documents import Corpus, Document, as_bytes, split_documents

__all__ = [
    "BUILTIN",
    "Corpus",
    "Document",
    "as_bytes",
    "builtin_documents",
    "read_corpus",
    "require_there",
    "split_documents",
]
