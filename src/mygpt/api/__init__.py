"""The functions of `import mygpt`: typed options, and messages that name arguments.

As `cli` is for the command, this package is for Python programs and notebooks.
"""
