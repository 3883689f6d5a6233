"""`python -m mygpt` is the command `mygpt`."""

from mygpt.cli import main

if __name__ == "__main__":
    main()
