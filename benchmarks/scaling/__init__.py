"""Several processes beside one, and a token store beside memory, by whole `mygpt train` runs."""
