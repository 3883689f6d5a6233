"""Whether other programs do with an exported model what mygpt does with its own."""
