"""Import of models from other programs, and export to them.

Files of other programs are not trusted: no pickled code is run, and every shape is checked before
it is used.
"""

from mygpt.formats.conversion import export_checkpoint, import_checkpoint, read_foreign
from mygpt.formats.tensors import Imported

__all__ = ["Imported", "export_checkpoint", "import_checkpoint", "read_foreign"]
