"""Whether an exported model gives the same results in other programs as in mygpt."""
