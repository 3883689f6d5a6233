"""Import of models from other programs, and export to them: one mapping file for each format.

Files of other programs are not trusted: no pickled code is run, and every shape is checked before
it is used.
"""

from mygpt.formats.exporting import KINDS, export_checkpoint
from mygpt.formats.imported import Imported
from mygpt.formats.importing import import_checkpoint, read_foreign

__all__ = ["KINDS", "Imported", "export_checkpoint", "import_checkpoint", "read_foreign"]
