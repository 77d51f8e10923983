"""`python -m cribsheet`: the command line."""

from cribsheet.cli import main

if __name__ == "__main__":
    main()
