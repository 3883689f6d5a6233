"""Training side by side: `mygpt train` and others' recipes, on the same text and budget."""
