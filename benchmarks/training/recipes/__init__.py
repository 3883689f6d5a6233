"""Other recipes in plain PyTorch, each in one file that imports nothing from mygpt."""
