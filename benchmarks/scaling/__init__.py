"""Speed of `mygpt train` with several processes and with a token store."""
