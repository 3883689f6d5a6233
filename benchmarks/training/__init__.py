"""Training: `mygpt train` compared with other recipes, on the same text and budget."""
