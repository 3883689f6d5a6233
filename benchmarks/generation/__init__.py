"""Generation speed of mygpt's engines and of other programs, on the same random weights."""
